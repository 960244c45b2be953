"""Processes that are killed midway."""

from __future__ import annotations

import os
import signal
import traceback
from collections.abc import Callable
from typing import NoReturn


def kill(*_: object, **__: object) -> NoReturn:
    """End this process as `kill -9` does, wherever it stands."""
    os.kill(os.getpid(), signal.SIGKILL)
    raise AssertionError("unreachable")


def killed_in(action: Callable[[], object]) -> None:
    """Run `action` in a child of this process, which must `kill` itself before it returns.

    What `action` replaces is replaced in the child alone.
    """
    child = os.fork()
    if child == 0:
        try:
            action()
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(1)
    _, status = os.waitpid(child, 0)
    assert os.WIFSIGNALED(status), "the child ended by itself"
    assert os.WTERMSIG(status) == signal.SIGKILL
