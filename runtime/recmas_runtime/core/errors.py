"""What users are told when something is wrong: stable codes, places, exit codes.

Every package raises these errors; nothing here imports more of recmas than what makes text safe to
print.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from enum import IntEnum
from typing import Final, Literal

from recmas_runtime.core.terminal import harmless


class Exit(IntEnum):
    """Exit status of the command-line programs."""

    OK = 0
    RUN_FAILED = 1
    USAGE = 2
    SPEC_INVALID = 3
    ENVIRONMENT = 4
    VERIFICATION = 5
    INTERRUPTED = 130


# code -> (exit status, what the code means). The registry of every code users can meet.
CODES: dict[str, tuple[Exit, str]] = {
    # RM1xx: the spec
    "RM100": (Exit.SPEC_INVALID, "the spec file cannot be read"),
    "RM101": (
        Exit.SPEC_INVALID,
        "not valid YAML, or YAML that specs do not use (tags, huge aliases)",
    ),
    "RM102": (Exit.SPEC_INVALID, "duplicate key"),
    "RM103": (Exit.SPEC_INVALID, "unknown key"),
    "RM104": (Exit.SPEC_INVALID, "missing key"),
    "RM105": (Exit.SPEC_INVALID, "wrong type or value out of bounds"),
    "RM106": (Exit.SPEC_INVALID, "language version that this recmas does not know"),
    "RM110": (Exit.SPEC_INVALID, "unknown backbone"),
    "RM111": (Exit.SPEC_INVALID, "unknown agent"),
    "RM112": (Exit.SPEC_INVALID, "unused agent or backbone"),
    "RM113": (Exit.SPEC_INVALID, "a slot without a link"),
    "RM114": (Exit.SPEC_INVALID, "a link without a slot"),
    "RM115": (Exit.SPEC_INVALID, "a cycle without a feedback link"),
    "RM116": (Exit.SPEC_INVALID, "a prompt needs `first`"),
    "RM117": (Exit.SPEC_INVALID, "a prompt that is not plain text, fields and slots"),
    "RM118": (Exit.SPEC_INVALID, "a pattern that cannot be expanded"),
    "RM119": (Exit.SPEC_INVALID, "malformed link name"),
    "RM120": (Exit.SPEC_INVALID, "link weights that do not fit the two backbones"),
    "RM121": (Exit.SPEC_INVALID, "a setting this version does not support"),
    "RM122": (Exit.SPEC_INVALID, "--set names a path or value that the schema refuses"),
    "RM123": (Exit.SPEC_INVALID, "a search corpus that cannot be used"),
    "RM124": (Exit.SPEC_INVALID, "training targets that leave out an agent that needs one"),
    "RM125": (Exit.SPEC_INVALID, "a training preset for links of another kind"),
    "RM126": (Exit.SPEC_INVALID, "a text to measure losses over that cannot be used"),
    "RM127": (Exit.SPEC_INVALID, "a link that cannot carry what it says"),
    "RM128": (Exit.SPEC_INVALID, "a conversation that does not fit the prompts"),
    "RM129": (Exit.SPEC_INVALID, "a model behind an API that is to do what takes weights"),
    "RM130": (Exit.SPEC_INVALID, "a secret in a spec"),
    "RM150": (Exit.OK, "warning: prompt tokens that could be reused across rounds are not"),
    "RM151": (Exit.OK, "warning: an agent whose thoughts nobody receives"),
    "RM152": (Exit.OK, "warning: links without trained weights"),
    "RM153": (Exit.OK, "warning: an early end of the rounds that can never come"),
    "RM155": (Exit.OK, "warning: a chat template that writes the date of the day"),
    "RM156": (Exit.OK, "warning: prompts that do not show what is asked"),
    # RM16x: teams of other frameworks
    "RM160": (Exit.SPEC_INVALID, "a team's file that cannot be read"),
    "RM161": (Exit.SPEC_INVALID, "a team's file of another form"),
    "RM162": (Exit.SPEC_INVALID, "a team that names what is not there, or two things alike"),
    "RM163": (Exit.SPEC_INVALID, "a team whose order is not known before it runs"),
    "RM164": (Exit.SPEC_INVALID, "a path that leaves the folder of a team"),
    "RM165": (Exit.OK, "warning: a key of a team's file that is not carried over"),
    "RM166": (Exit.OK, "warning: a prompt that is to be filled in"),
    "RM167": (Exit.OK, "warning: a part of a team that runs otherwise here"),
    # RM2xx: backbones and compilation
    "RM200": (Exit.ENVIRONMENT, "a backbone's files are not there"),
    "RM201": (Exit.ENVIRONMENT, "a Python package that this needs is not installed"),
    "RM202": (
        Exit.SPEC_INVALID,
        "a backbone recmas cannot run (quantized, gated, not causal, ...)",
    ),
    "RM203": (Exit.ENVIRONMENT, "a layer type that the target cannot run"),
    "RM204": (Exit.RUN_FAILED, "an IR rule is broken (a bug in recmas or in a pass of yours)"),
    "RM205": (Exit.RUN_FAILED, "a pass failed"),
    "RM206": (Exit.SPEC_INVALID, "a chat template that cannot render this agent"),
    "RM207": (Exit.ENVIRONMENT, "a part of a released system is not there"),
    "RM208": (Exit.RUN_FAILED, "a file of a released system that cannot be used"),
    "RM209": (Exit.USAGE, "a system that has no released form"),
    # RM3xx: export
    "RM300": (Exit.RUN_FAILED, "the backbone could not be exported"),
    "RM301": (Exit.VERIFICATION, "an engine, a prompt or a tokenizer disagrees with the reference"),
    "RM302": (Exit.USAGE, "the output folder already exists"),
    "RM303": (Exit.RUN_FAILED, "the disk is full or not writable"),
    "RM304": (Exit.VERIFICATION, "an operator of a step runs on an unexpected provider"),
    "RM305": (Exit.USAGE, "a cache of builds that cannot be one, or a size that is none"),
    "RM350": (
        Exit.OK,
        "warning: parts of a build, or packed weights, that could not be kept for later",
    ),
    # RM4xx: bundles
    "RM400": (Exit.VERIFICATION, "not a bundle, or an incomplete one"),
    "RM401": (Exit.VERIFICATION, "a bundle file is missing or altered"),
    "RM402": (Exit.VERIFICATION, "a path that leaves the bundle"),
    "RM403": (Exit.ENVIRONMENT, "a bundle of another format version than this runtime reads"),
    "RM404": (Exit.VERIFICATION, "a malformed manifest or plan"),
    "RM405": (Exit.VERIFICATION, "a bundle does not compute what it should here"),
    # RM5xx: running
    "RM500": (Exit.RUN_FAILED, "an input record cannot be used"),
    "RM501": (Exit.RUN_FAILED, "a prompt over the bundle's limit"),
    "RM502": (Exit.RUN_FAILED, "the input cannot be read"),
    "RM503": (Exit.RUN_FAILED, "the output cannot be written"),
    "RM504": (Exit.ENVIRONMENT, "the device or its provider is not available"),
    "RM505": (Exit.USAGE, "a sampling setting out of bounds"),
    "RM506": (Exit.USAGE, "unusable command-line arguments"),
    "RM507": (Exit.RUN_FAILED, "the engine failed"),
    "RM508": (Exit.USAGE, "a baseline that does not exist, or that fits no system like this one"),
    "RM509": (Exit.ENVIRONMENT, "a TensorRT that is too old"),
    "RM510": (Exit.RUN_FAILED, "TensorRT refuses a graph or an engine"),
    "RM511": (Exit.ENVIRONMENT, "no TensorRT engine that this machine can use"),
    "RM512": (Exit.USAGE, "a stream that is read twice"),
    "RM513": (Exit.USAGE, "a system that one of its own tools asks"),
    "RM520": (Exit.USAGE, "an output that holds something already"),
    "RM521": (Exit.USAGE, "--resume with the answers of another run"),
    "RM522": (Exit.USAGE, "a system that was closed"),
    "RM540": (Exit.USAGE, "a model that is not loaded"),
    "RM541": (Exit.RUN_FAILED, "a service that has no room for another request"),
    "RM542": (Exit.RUN_FAILED, "a service that starts, ends, or was restarted"),
    "RM543": (Exit.USAGE, "a request that asks for what the service does not do"),
    "RM544": (Exit.USAGE, "a request without the key, or under a host name that is not served"),
    "RM545": (Exit.USAGE, "an address or option that a service refuses"),
    "RM546": (Exit.USAGE, "a request that cannot be read"),
    "RM547": (Exit.RUN_FAILED, "an answer that takes longer than the service allows"),
    "RM550": (Exit.OK, "warning: TensorRT engines of a bundle that are not used"),
    "RM551": (Exit.OK, "warning: a service with memory for fewer requests than were planned for"),
    "RM552": (Exit.OK, "warning: a report whose trace and answers are not those of one run"),
    "RM553": (Exit.OK, "warning: a precision of GPUs that a CPU computes"),
    "RM560": (Exit.ENVIRONMENT, "the key of a remote model is not there"),
    "RM561": (Exit.RUN_FAILED, "a remote model that cannot be reached"),
    "RM562": (Exit.RUN_FAILED, "a remote model that refuses the key"),
    "RM563": (Exit.RUN_FAILED, "a remote model that has too many requests"),
    "RM564": (Exit.RUN_FAILED, "a remote model that fails"),
    "RM565": (Exit.RUN_FAILED, "a reply of a remote model that cannot be used"),
    "RM566": (Exit.RUN_FAILED, "a remote model that does not answer in time"),
    "RM567": (Exit.RUN_FAILED, "a prompt that is too long for a remote model"),
    "RM568": (Exit.RUN_FAILED, "a remote model that refuses a request"),
    "RM569": (Exit.USAGE, "a remote model that is to do what takes weights"),
    # RM6xx: evaluation
    "RM600": (Exit.USAGE, "a protocol that is not there or malformed"),
    "RM601": (Exit.RUN_FAILED, "data that does not fit the protocol"),
    "RM602": (Exit.ENVIRONMENT, "no sandbox for the code that a protocol runs, or no package"),
    "RM603": (Exit.USAGE, "--resume with the answers of another evaluation"),
    "RM650": (Exit.OK, "warning: other prompts than those the protocol names"),
    "RM651": (Exit.OK, "warning: records left out that no answer could be judged by"),
    "RM652": (Exit.OK, "warning: records left out that are no questions of the protocol"),
    # RM7xx: training
    "RM700": (Exit.RUN_FAILED, "training data that cannot be used"),
    "RM701": (Exit.RUN_FAILED, "the loss is no number any more, or it diverges"),
    "RM702": (Exit.RUN_FAILED, "training, or loading a backbone, needs more memory than there is"),
    "RM703": (Exit.USAGE, "--resume with the checkpoints of another run"),
    "RM704": (Exit.USAGE, "a number of processes that this run cannot have"),
    "RM705": (Exit.USAGE, "a training stage that has nothing to learn"),
    "RM750": (Exit.OK, "warning: training records that are left out"),
    "RM751": (Exit.OK, "warning: trained links that do not fit the spec any more"),
    "RM752": (Exit.OK, "warning: held-out records that training has seen in part"),
    "RM753": (
        Exit.OK,
        "warning: a part of a training that cannot be read, and what is used instead",
    ),
    "RM754": (Exit.OK, "warning: a training that goes on where sums are rounded otherwise"),
    "RM755": (Exit.OK, "warning: training targets that a chat template would shorten"),
    "RM756": (Exit.OK, "warning: trained links that learned with other prompts or settings"),
    "RM757": (Exit.OK, "warning: trained links without a receipt that can be read"),
    "RM758": (Exit.OK, "warning: batches with more records than there are"),
    "RM759": (Exit.OK, "warning: a tracker that failed and receives nothing more"),
}


@dataclass(frozen=True, kw_only=True)
class Problem:
    """One finding about something the user gave: what, where, what to do.

    Attributes:
        hint: What to do about it; a full sentence, or empty.
        severity: Only errors stop anything.
    """

    code: str
    severity: Literal["error", "warning"] = "error"
    message: str
    hint: str = ""
    file: str | None = None
    line: int | None = None
    column: int | None = None

    def __post_init__(self) -> None:
        assert self.code in CODES, f"unregistered code {self.code}"

    def __str__(self) -> str:
        """Return the line that is printed; names and values in it are foreign, so made harmless."""
        place = ":".join(str(p) for p in (self.file, self.line, self.column) if p is not None)
        head = f"{place}: " if place else ""
        body = self.message
        if self.hint:
            stop = "" if body.endswith((".", "?", "!")) else "."
            body = f"{body}{stop} {self.hint}"
        return harmless(f"{head}{self.severity}[{self.code}]: {body}")

    def to_json(self) -> dict[str, str | int | None]:
        """Return the form that `--json` prints."""
        return asdict(self)


class RecmasError(Exception):
    """Something the user can correct: one or more problems, of which at least one is an error."""

    def __init__(self, problems: Problem | Iterable[Problem]) -> None:
        found = (problems,) if isinstance(problems, Problem) else tuple(problems)
        assert any(p.severity == "error" for p in found), "an error without an error"
        self.problems: tuple[Problem, ...] = found
        super().__init__("\n".join(str(p) for p in found))

    def __reduce__(self) -> tuple[type[RecmasError], tuple[tuple[Problem, ...]]]:
        """Let it cross processes, as what it says."""
        return RecmasError, (self.problems,)

    @property
    def exit_code(self) -> Exit:
        """The exit status of the first error."""
        first = next(p for p in self.problems if p.severity == "error")
        return CODES[first.code][0]


class RecordError(RecmasError):
    """An error of one record, at this place of its batch, that shows only while the batch runs.

    Attributes:
        names_record: Whether its messages say which record it is.
    """

    def __init__(self, record: int, error: RecmasError, *, names_record: bool = True) -> None:
        super().__init__(error.problems)
        self.record = record
        self.names_record = names_record


def fail(
    code: str,
    message: str,
    *,
    hint: str = "",
    file: str | None = None,
    line: int | None = None,
    column: int | None = None,
) -> RecmasError:
    """Make an error with a single problem, for `raise`."""
    return RecmasError(
        Problem(code=code, message=message, hint=hint, file=file, line=line, column=column)
    )


def missing_package(error: ModuleNotFoundError, *, extra: str = "compile") -> RecmasError:
    """Return RM201 for a package that comes with an extra; a module of our own is raised again."""
    package = (error.name or "").partition(".")[0]
    if not package or package.startswith("recmas_"):
        raise error
    return fail(
        "RM201",
        f"the Python package `{package}` is not installed",
        hint=how_to_install(extra),
    )


def how_to_install(extra: str) -> str:
    """Return the hint for what comes with an extra; there is no release on a package index."""
    return (
        f"Install recmas with its extra `{extra}`, from its wheel or in a clone of it: "
        f'pip install "WHEEL[{extra}]" or pip install ".[{extra}]".'
    )


# What allocators say, in the words of ONNX Runtime, the C++ library, CUDA, the system, torch,
# oneDNN and numpy.
_OUT_OF_MEMORY: Final = re.compile(
    r"bad[_ ]alloc|failed to allocate|cannot allocate|out of memory|allocate memory|"
    r"allocation failed|alloc failed|not enough memory|DefaultCPUAllocator|unable to mmap|"
    r"unable to allocate|could not create a (?:primitive|memory)|failed to map segment",
    re.IGNORECASE,
)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error of numpy or of an engine says that there is no memory left."""
    return isinstance(error, MemoryError) or bool(_OUT_OF_MEMORY.search(str(error)))
