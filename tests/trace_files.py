"""Reading what a trace holds."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from recmas_runtime.running.run_trace import MESSAGES_NAME, RECORDS_ARRAY


def read_messages(folder: Path) -> dict[str, np.ndarray]:
    """Return messages [records, m, d] by link and round; NaN where a record has none."""
    with np.load(folder / MESSAGES_NAME, allow_pickle=False) as arrays:
        return {name: arrays[name] for name in arrays if name != RECORDS_ARRAY}
