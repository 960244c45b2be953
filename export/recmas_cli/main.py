"""`recmasc`: the compiler's command line. Before `main` runs, nothing slow is imported."""

from __future__ import annotations

import sys

TYPE_CHECKING = False  # that of `typing`, whose import Ctrl-C would hit before `main`
if TYPE_CHECKING:
    from typing import NoReturn

# Of the extra `compile`. Some come with other packages too, so one alone says nothing.
NEEDED = ("click", "networkx", "pydantic", "yaml")


def main(arguments: list[str] | None = None) -> NoReturn:
    """Run `recmasc`; exits with the codes of `recmas_runtime.core.errors.Exit`.

    Args:
        arguments: None for the program itself; once it ends, it takes no more Ctrl-C.
    """
    given = sys.argv[1:] if arguments is None else arguments
    is_program = arguments is None
    # The imports, most of a second, are what Ctrl-C may stop too.
    try:
        try:
            status = _run(given)
        except KeyboardInterrupt:
            if is_program:
                _ignore_interrupts()
            status = _interrupted()
    except KeyboardInterrupt:  # pressed twice
        status = _interrupted()
    if is_program:
        _ignore_interrupts()
    sys.exit(status)


def _run(given: list[str]) -> int:
    """Return the exit status; where recmas is installed without its compiler, RM201 is all."""
    from importlib.util import find_spec

    from recmas_runtime.core.errors import RecmasError, fail, missing_package
    from recmas_runtime.core.terminal import open_standard_streams

    open_standard_streams()
    try:
        for package in NEEDED:
            if find_spec(package) is None:
                raise ModuleNotFoundError(name=package)
        try:
            from recmas_cli.commands import run
        except OSError as error:
            # As a rule there are too few descriptors; then nothing else can be imported either.
            reason = error.strerror or str(error)
            hint = "Allow more open files (`ulimit -n 256`)."
            told = fail("RM303", f"recmasc cannot be loaded: {reason}", hint=hint)
            print(told, file=sys.stderr)
            return told.exit_code
        return run(given)
    except ModuleNotFoundError as error:
        from recmas_cli.printing import report

        missing: RecmasError = missing_package(error)
        report(missing.problems, as_json="--json" in given)
        return missing.exit_code


def _ignore_interrupts() -> None:
    import signal

    signal.signal(signal.SIGINT, signal.SIG_IGN)


def _interrupted() -> int:
    from recmas_cli.printing import note
    from recmas_runtime.core.errors import Exit

    note("interrupted")
    return Exit.INTERRUPTED


if __name__ == "__main__":
    main()
