"""What runs that share engines get where a caller does not say."""

from __future__ import annotations

from typing import Final

# Positions of a prompt in one call: fewer cost products some of their speed.
CHUNK: Final = 128
# Memory for beginnings of prompts that are kept for other runs.
KEPT_BYTES: Final = 256 * 2**20
