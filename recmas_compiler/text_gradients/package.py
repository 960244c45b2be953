"""The package `textgrad`, imported without what it does to a process while it is imported."""

from __future__ import annotations

import logging
import os
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

from recmas_runtime.core.errors import missing_package

EXTRA = "textgrad"


def import_textgrad() -> None:
    """Import `textgrad` so that it neither writes into the working folder nor asks the network.

    Its import opens a log of all prompts below `./logs`, and that of litellm, which it imports,
    fetches a table of prices.

    Raises:
        RecmasError: RM201 if it is not installed.
    """
    with tempfile.TemporaryDirectory() as folder:
        # Both are read while the modules are imported, and nowhere else can they be given.
        with _variables({"TEXTGRAD_LOG_DIR": folder, "LITELLM_LOCAL_MODEL_COST_MAP": "True"}):
            try:
                import litellm
                import textgrad  # noqa: F401
            except ModuleNotFoundError as error:
                raise missing_package(error, extra=EXTRA) from error
        litellm.telemetry = False
        log = logging.getLogger("textgrad")
        for handler in list(log.handlers):
            log.removeHandler(handler)
            handler.close()
        # Without any, `logging` prints its errors, which proposals tell already.
        log.addHandler(logging.NullHandler())
        log.propagate = False


@contextmanager
def _variables(values: Mapping[str, str]) -> Iterator[None]:
    """Set environment variables for the block."""
    before = {name: os.environ.get(name) for name in values}
    os.environ.update(values)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value
