"""`torchrun ... -m recmas_cli.training_main SPEC`: one of several processes of `recmasc train`."""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path
from typing import Final

from recmas_cli.main import main
from recmas_compiler.training.loop.distributed import STATUS_FILE

# Mistakes are found by all processes; torchrun ends the rest when it sees the first one gone.
_SECONDS_TO_TELL: Final = 10.0


def run_launched(status_file: Path, *, is_main: bool) -> None:
    """Run as a process of `launch`; the main one writes its exit status into the status file."""
    try:
        main(["train", *sys.argv[1:]])
    except SystemExit as ended:
        sys.stdout.flush()
        if is_main:
            status_file.write_text(str(ended.code))
        elif ended.code:
            give_up = time.monotonic() + _SECONDS_TO_TELL
            while not status_file.exists() and time.monotonic() < give_up:
                time.sleep(0.05)
        raise


if __name__ == "__main__":
    is_main = os.environ.get("RANK", "0") == "0"
    if STATUS_FILE in os.environ:
        run_launched(Path(os.environ[STATUS_FILE]), is_main=is_main)
    else:
        if not is_main:  # what the first process prints is said once
            sys.stdout = Path(os.devnull).open("w")  # noqa: SIM115
        main(["train", *sys.argv[1:]])
