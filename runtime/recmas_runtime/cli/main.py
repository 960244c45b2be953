"""`recmas`: run, verify and inspect bundles where no compiler is installed.

Nothing heavy is imported before a command needs it, so that help is there at once.
"""

from __future__ import annotations

import argparse
import io
import sys
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, Final, NoReturn

from recmas_runtime.cli.cache import add_cache_options, run_cache
from recmas_runtime.cli.device_option import add_device_option
from recmas_runtime.core.errors import (
    CODES,
    Exit,
    Problem,
    RecmasError,
    fail,
    how_to_install,
    is_out_of_memory,
    missing_package,
)
from recmas_runtime.core.files import reason_of
from recmas_runtime.core.printing import discard, envelope, note, write_out
from recmas_runtime.core.progress import LineProgress, Progress, Silent
from recmas_runtime.core.terminal import (
    end_signals_interrupt,
    harmless,
    lasting_interrupts,
    open_standard_streams,
)


@dataclass(kw_only=True)
class Outcome:
    """What a command found out."""

    data: dict[str, Any] = field(default_factory=dict)
    text: str = ""
    problems: list[Problem] = field(default_factory=list)
    interrupted: bool = False
    is_bug: bool = False
    interruption: str = "interrupted"  # what is said then

    @property
    def exit_code(self) -> Exit:
        """What the first error says, unless the user stopped the command."""
        if self.interrupted:
            return Exit.INTERRUPTED
        if self.is_bug:
            return Exit.RUN_FAILED
        errors = (problem for problem in self.problems if problem.severity == "error")
        return next((CODES[problem.code][0] for problem in errors), Exit.OK)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run `recmas` and return its exit status."""
    open_standard_streams()
    given = list(sys.argv[1:] if arguments is None else arguments)
    as_json, debug = "--json" in given, "--debug" in given
    outcome = Outcome()
    if isinstance(sys.stdout, io.TextIOWrapper):
        # Data is UTF-8 whatever the terminal; half a surrogate pair becomes a JSON escape.
        sys.stdout.reconfigure(encoding="utf-8", errors="backslashreplace")
    try:
        options = _parse(given)
        with end_signals_interrupt(), lasting_interrupts():
            options.command(options, outcome)
    except SystemExit:  # help and version
        try:
            write_out("")
        except BrokenPipeError:
            pass
        except RecmasError as error:
            note(str(error))
            return error.exit_code
        raise
    except RecmasError as error:
        _note_traceback(debug)
        outcome.problems += error.problems
    except KeyboardInterrupt:
        outcome.interrupted = True
    except BrokenPipeError:
        discard(sys.stdout)
        return Exit.OK
    except OSError as error:
        _note_traceback(debug)
        outcome.problems.append(
            Problem(
                code="RM503",
                message=f"the system refuses: {reason_of(error)}",
                hint="Make sure that recmas may read and write where it is told to.",
                file=None if error.filename is None else str(error.filename),
            )
        )
    # No memory, in whatever words, or a bug of ours: reported without a traceback.
    except Exception as error:
        _note_traceback(debug)
        if is_out_of_memory(error):
            message = "memory runs out"
            outcome.problems.append(Problem(code="RM507", message=message, hint=_FREE_MEMORY))
        else:
            note(
                f"internal error: {type(error).__name__}: {harmless(str(error))}\n"
                "This is a bug in recmas. Run again with --debug and report what it prints."
            )
            outcome.is_bug = True
    try:
        _report(outcome, as_json=as_json)
    except BrokenPipeError:
        pass
    except RecmasError as error:
        note(str(error))
        return outcome.exit_code or error.exit_code
    return outcome.exit_code


_FREE_MEMORY: Final = "Free memory, lower --batch, or take a bundle of a smaller precision."


def check_run(arguments: Sequence[str]) -> None:
    """Raise what `main(["run", *arguments])` refuses before it looks at the bundle.

    For a command that builds the bundle first, which may take minutes.
    """
    from recmas_runtime.cli.run import check_options

    check_options(_parse(["run", *arguments]))


def _note_traceback(debug: bool) -> None:
    if debug:
        note(harmless(traceback.format_exc()))


def _report(outcome: Outcome, *, as_json: bool) -> None:
    """Print data on stdout and everything else on stderr."""
    if not as_json:
        for problem in outcome.problems:
            note(str(problem))
    try:
        if as_json:
            is_ok, data = outcome.exit_code == Exit.OK, outcome.data or None
            write_out(envelope(ok=is_ok, data=data, problems=outcome.problems) + "\n")
        elif outcome.text:
            write_out(f"{outcome.text}\n")
    finally:
        if outcome.interrupted:
            note(outcome.interruption)


class _Parser(argparse.ArgumentParser):
    """Reports wrong usage like any other problem."""

    def error(self, message: str) -> NoReturn:
        raise fail("RM506", message, hint=f"See `{self.prog} --help`.")


class _ShowVersion(argparse.Action):
    """Looks the version up only when asked: that takes longer than all of the parsing."""

    def __call__(self, parser: argparse.ArgumentParser, *_: object) -> NoReturn:
        from importlib.metadata import PackageNotFoundError, version

        try:
            write_out(f"recmas {version('recmas')}\n")
        except PackageNotFoundError:
            write_out("recmas, run from a checkout\n")
        parser.exit()


def _parse(given: list[str]) -> argparse.Namespace:
    parser = command_parser(serves="serve" in given)
    options, left = parser.parse_known_args(given)
    # argparse before Python 3.13 settles an optional positional at the first chance it has, so in
    # `run BUNDLE --seed 1 QUESTION` the question is left over.
    if left and getattr(options, "question", "") is None and not left[0].startswith("-"):
        options.question = left.pop(0)
    if left:
        parser.error(f"unrecognized arguments: {' '.join(left)}")
    return options


def command_parser(*, serves: bool) -> argparse.ArgumentParser:
    """Return what reads a command line; the many options of `serve` only where it `serves`."""
    parser = _Parser(prog="recmas", description="Run latent multi-agent systems from bundles.")
    parser.add_argument("--version", action=_ShowVersion, nargs=0, help="show the version")
    commands = parser.add_subparsers(metavar="COMMAND", required=True)

    run = _command(commands, "run", "Answer questions with a bundle.", _run)
    run.add_argument("question", nargs="?", metavar="QUESTION", help="one question")
    run.add_argument(
        "--field",
        dest="fields",
        action="append",
        metavar="NAME=VALUE",
        help="a field that the prompts use; may be repeated, a name too, for a list, whose entries "
        "may also be given as NAME[0]=VALUE",
    )
    files = run.add_argument_group("many questions")
    files.add_argument(
        "--input",
        metavar="FILE",
        help="records to answer: JSON lines, a JSON list, CSV, TSV or Parquet, also gzipped; "
        "- is stdin",
    )
    files.add_argument("--output", metavar="FILE", help="JSON lines to write; - is stdout")
    files.add_argument(
        "--batch", type=int, metavar="N", help="most records per batch; default: the bundle's limit"
    )
    files.add_argument(
        "--resume", action="store_true", help="go on with an output file; tries failures again"
    )
    files.add_argument("--force", action="store_true", help="write over an output or trace")
    files.add_argument(
        "--ray",
        nargs="?",
        const="",
        metavar="HOST:PORT",
        help="share the records among the machines of a Ray cluster: of this address, or else the "
        "one that runs here",
    )
    run.add_argument("--trace", type=Path, metavar="DIR", help="write messages and steps here")
    run.add_argument(
        "--thoughts",
        type=_positive,
        metavar="N",
        help="and the N tokens nearest to each thought, for `recmas thoughts DIR`",
    )
    run.add_argument(
        "--baseline",
        default="latent",
        metavar="NAME",
        help="run an alternative on the same engines: single, all-context, text, text@N, moa, "
        "moa@N, latentmas, looplm, null, shuffled, mean",
    )
    run.add_argument(
        "--date",
        metavar="YYYY-MM-DD",
        help="for chat templates that write the date; default: the bundle's, or else today",
    )
    sampling = run.add_argument_group("sampling, over the bundle's own settings")
    sampling.add_argument(
        "--max-new-tokens", type=int, metavar="N", help="most tokens of an answer"
    )
    sampling.add_argument(
        "--temperature", type=float, metavar="T", help="from 0, which is greedy, to 10"
    )
    sampling.add_argument(
        "--top-p",
        type=float,
        metavar="P",
        help="the likeliest tokens that together have this probability",
    )
    sampling.add_argument(
        "--top-k", type=int, metavar="K", help="the K likeliest tokens; 0 keeps all"
    )
    sampling.add_argument(
        "--min-p",
        type=float,
        metavar="P",
        help="no tokens below this share of the likeliest one's probability",
    )
    sampling.add_argument(
        "--repetition-penalty",
        type=float,
        metavar="R",
        help="above 1, tokens that were written become less likely",
    )
    sampling.add_argument(
        "--seed", type=int, metavar="N", help="of the first record; record i draws from seed + i"
    )
    sampling.add_argument(
        "--stop", action="append", metavar="TEXT", help="ends the answer; may be repeated"
    )
    _add_machine(run)

    about = "Serve bundles behind OpenAI's HTTP forms."
    server = _command(commands, "serve", about, _serve, of_bundle=False)
    if serves:
        from recmas_runtime.cli.serve_options import add_serve_options

        add_serve_options(server)
    _add_device(server)

    bench = _command(commands, "bench", "Measure a bundle beside its baselines.", _bench)
    questions = bench.add_argument_group("questions; a few of recmas's own without these")
    questions.add_argument("--data", metavar="FILE", help="records, as of `recmas run --input`")
    several: dict[str, Any] = {"action": "append", "default": []}
    questions.add_argument(
        "--question", dest="questions", metavar="TEXT", help="may be repeated", **several
    )
    questions.add_argument("--limit", type=int, metavar="N", help="the first N only")
    bench.add_argument(
        "--baseline",
        dest="baselines",
        metavar="NAME",
        help="what to compare with, as of `recmas run` [default: text]; may be repeated",
        **several,
    )
    bench.add_argument(
        "--untrained-bundle",
        "--frozen-bundle",  # the name of version 0.1
        type=Path,
        metavar="DIR",
        help="the same system with untrained links",
    )
    bench.add_argument("--batch", type=int, default=1, metavar="N", help="records per batch")
    bench.add_argument("--max-new-tokens", type=int, metavar="N", help="of every text")
    bench.add_argument(
        "--warmup", type=int, default=1, metavar="N", help="repeats before it counts"
    )
    bench.add_argument("--repeats", type=int, default=5, metavar="N", help="repeats that count")
    bench.add_argument("--out", type=Path, metavar="DIR", help="write bench.json and bench.md here")
    _add_machine(bench)

    mcp = _command(commands, "mcp", "Serve a bundle as a tool of the Model Context Protocol.", _mcp)
    mcp.add_argument(
        "--http",
        metavar="[HOST:]PORT",
        help="serve over streamable HTTP at this address of this machine; default: over standard "
        "input and output",
    )
    mcp.add_argument(
        "--description", metavar="TEXT", help="what the system is good for; default: what it is"
    )
    mcp.add_argument(
        "--max-queue", type=_positive, default=64, metavar="N", help="calls that may wait"
    )
    _add_machine(mcp)

    package = _command(
        commands, "package", "Write a container of a bundle, with its metrics.", _package
    )
    package.add_argument(
        "-o", "--output", type=Path, required=True, metavar="DIR", help="folder to write"
    )
    package.add_argument("--force", action="store_true", help="write over an earlier package")
    package.add_argument(
        "--image", metavar="NAME:TAG", help="of the image; default: recmas/ and the system's name"
    )
    package.add_argument(
        "--base", metavar="IMAGE", help="that has Python; default: a slim one of a fixed version"
    )
    package.add_argument(
        "--cpus", type=_positive, default=4, metavar="N", help="of a container [default: 4]"
    )
    package.add_argument(
        "--max-batch",
        type=_positive,
        metavar="N",
        help="requests at a time; default: the bundle's limit",
    )
    package.add_argument(
        "--replicas", type=_positive, default=2, metavar="N", help="on Kubernetes [default: 2]"
    )

    verify = _command(
        commands, "verify", "Check hashes, the known-answer probe and the parity cases.", _verify
    )
    _add_machine(verify)

    engines = _command(
        commands, "engines", "Build TensorRT engines for this machine into a bundle.", _engines
    )
    engines.add_argument("--force", action="store_true", help="build even if they are there")
    engines.add_argument("--quiet", action="store_true", help="no progress")

    thoughts = _command(
        commands,
        "thoughts",
        "Print the tokens nearest to each thought of a run with --trace and --thoughts.",
        _thoughts,
        of_bundle=False,
    )
    thoughts.add_argument("trace", type=Path, metavar="TRACE", help="folder of the trace")
    thoughts.add_argument("--record", metavar="ID", help="only the record with this id")

    report = _command(
        commands,
        "report",
        "Write the trace of a run as one HTML file, to be read in a browser.",
        _write_report,
        of_bundle=False,
    )
    report.add_argument("trace", type=Path, metavar="TRACE", help="folder of the trace")
    report.add_argument(
        "-o",
        "--output",
        type=Path,
        metavar="FILE",
        required=True,
        help="the file to write; - is stdout",
    )
    report.add_argument(
        "--answers",
        type=Path,
        metavar="FILE",
        help="the run's --output, to show questions and answers beside the trace",
    )
    report.add_argument("--record", metavar="ID", help="only the record with this id")
    report.add_argument("--force", action="store_true", help="write over the file")

    cache = _command(
        commands,
        "cache",
        "Show or shrink what is kept on this machine for later.",
        _cache,
        of_bundle=False,
    )
    add_cache_options(cache)

    _command(commands, "inspect", "Tell what is in a bundle.", _inspect)
    _command(commands, "doctor", "Tell what this machine has.", _doctor, of_bundle=False)
    return parser


Command = Callable[[argparse.Namespace, Outcome], None]


def _command(
    commands: Any, name: str, about: str, run: Command, *, of_bundle: bool = True
) -> argparse.ArgumentParser:
    parser: argparse.ArgumentParser = commands.add_parser(name, help=about, description=about)
    parser.set_defaults(command=run)
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.add_argument("--debug", action="store_true", help="show tracebacks")
    if of_bundle:
        parser.add_argument("bundle", type=Path, metavar="BUNDLE", help="folder of the bundle")
    return parser


def _add_machine(parser: argparse.ArgumentParser) -> None:
    _add_device(parser)
    parser.add_argument("--quiet", action="store_true", help="no progress, no summary")


def _add_device(parser: argparse.ArgumentParser) -> None:
    add_device_option(parser)
    parser.add_argument("--threads", type=_positive, metavar="N", help="default: physical cores")
    parser.add_argument(
        "--no-cache",
        dest="cache",
        action="store_false",
        help="neither take packed weights from the user's cache nor keep them there",
    )


def _progress(options: argparse.Namespace) -> Progress:
    return Silent() if options.quiet else LineProgress()


def _positive(text: str) -> int:
    if not text.isdecimal() or not 1 <= int(text) <= 4096:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number from 1 to 4096")
    return int(text)


def _run(options: argparse.Namespace, outcome: Outcome) -> None:
    from recmas_runtime.cli.run import STANDARD_STREAM, run

    if options.output not in (None, STANDARD_STREAM):
        outcome.interruption += (
            f"; finished answers are kept in {options.output}: "
            "the same command with --resume goes on"
        )
    run(options, outcome.data, outcome.problems)


def _serve(options: argparse.Namespace, outcome: Outcome) -> None:
    from recmas_runtime.cli.serve import serve

    if not serve(options, outcome.data, outcome.problems, as_json=options.json):
        outcome.interrupted = True
        outcome.interruption = "stopped at once; requests that ran got no answer"


def _bench(options: argparse.Namespace, outcome: Outcome) -> None:
    from recmas_runtime.bench.command import BenchOptions, bench

    asked = BenchOptions(**{f.name: getattr(options, f.name) for f in fields(BenchOptions)})
    report = bench(asked, outcome.problems, progress=_progress(options))
    outcome.data |= report.to_json()
    outcome.text = report.to_markdown()
    outcome.interrupted = report.interrupted


def _mcp(options: argparse.Namespace, outcome: Outcome) -> None:
    try:
        from recmas_runtime.cli.mcp import run_mcp
    except ModuleNotFoundError as error:
        raise missing_package(error, extra="mcp") from error
    run_mcp(options)


def _package(options: argparse.Namespace, outcome: Outcome) -> None:
    from recmas_runtime.cli.package import package

    written = package(options)
    outcome.data |= written.to_json()
    outcome.text = written.text


def _verify(options: argparse.Namespace, outcome: Outcome) -> None:
    from recmas_runtime.cache.settings import user_store
    from recmas_runtime.checking.verify import verify_bundle
    from recmas_runtime.cli.inspect import verify_text

    report = verify_bundle(
        options.bundle,
        device=options.device,
        threads=options.threads,
        progress=_progress(options),
        store=user_store() if options.cache else None,
    )
    outcome.data |= report.to_json()
    outcome.text = verify_text(report)
    outcome.problems += report.problems


def _engines(options: argparse.Namespace, outcome: Outcome) -> None:
    from recmas_runtime.checking.build_tensorrt import build_engines

    built = build_engines(options.bundle, progress=_progress(options), reuse=not options.force)
    outcome.data |= built.to_json()
    outcome.text = built.text


def _cache(options: argparse.Namespace, outcome: Outcome) -> None:
    outcome.text = run_cache(options, outcome.data)


def _inspect(options: argparse.Namespace, outcome: Outcome) -> None:
    from recmas_runtime.cli.inspect import bundle_facts, bundle_text
    from recmas_runtime.formats.bundle import open_bundle

    bundle = open_bundle(options.bundle)
    outcome.data |= bundle_facts(bundle)
    outcome.text = bundle_text(bundle)


def _thoughts(options: argparse.Namespace, outcome: Outcome) -> None:
    from recmas_runtime.cli.thoughts import print_thoughts

    print_thoughts(options.trace, options.record, outcome.data, as_json=options.json)


def _write_report(options: argparse.Namespace, outcome: Outcome) -> None:
    from recmas_runtime.cli.report import write_report

    written = write_report(
        options.trace,
        options.output,
        answers=options.answers,
        record=options.record,
        force=options.force,
        problems=outcome.problems,
        as_json=options.json,
    )
    outcome.data |= written.to_json()
    if written.file == "-":
        note(written.text)
    else:
        outcome.text = written.text


def _doctor(options: argparse.Namespace, outcome: Outcome) -> None:
    from recmas_runtime.checking.machine import describe_machine, machine_text

    facts = describe_machine()
    outcome.data |= facts
    outcome.text = machine_text(facts)
    if not facts["providers"]:
        raise fail(
            "RM201",
            "onnxruntime is not installed",
            hint=f"{how_to_install('cpu')} For CUDA take `gpu` in its place.",
        )


if __name__ == "__main__":
    sys.exit(main())
