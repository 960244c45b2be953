"""What configs leave out because it equals the default of their family's class.

The table is made by tests/with_torch/config_defaults.py from transformers' classes, by model type.
`layer_cycle` repeats over the depth; it is empty where only the config can tell. `text_config` is a
model type. `names` are what the family calls entries in its files. `causal_class` is there where
its name does not say what it is. `code` is what the code of its models does that no config says.
"""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from typing import Any, Final

DEFAULTS_FILE: Final = Path(__file__).with_name("defaults.json")


def family_defaults(model_type: str) -> dict[str, Any]:
    """Return what configs of a model type may leave out; nothing for an unknown type."""
    return _all_defaults().get(model_type, {})


def known_types() -> tuple[str, ...]:
    """Return the model types that the table knows, sorted."""
    return tuple(sorted(_all_defaults()))


@cache
def _all_defaults() -> dict[str, dict[str, Any]]:
    table: dict[str, dict[str, Any]] = json.loads(DEFAULTS_FILE.read_bytes())
    return table
