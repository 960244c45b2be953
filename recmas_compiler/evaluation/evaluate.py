"""An evaluation: a data set, a protocol, a bundle and what to compare it with."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from functools import cache, partial
from pathlib import Path
from typing import Final

from recmas_compiler.evaluation.checks import make_check
from recmas_compiler.evaluation.data.data_file import DataSet, load_data
from recmas_compiler.evaluation.data.protocol import Protocol, load_protocol
from recmas_compiler.evaluation.report import Report, make_report, write_report
from recmas_compiler.evaluation.runner import run_systems
from recmas_runtime.core.errors import Problem, fail
from recmas_runtime.core.progress import Progress
from recmas_runtime.formats.bundle import Bundle, open_bundle
from recmas_runtime.formats.codec import to_json
from recmas_runtime.formats.plan import Plan
from recmas_runtime.running.baselines import LATENT, apply_baseline
from recmas_runtime.running.open_engines import choose_device
from recmas_runtime.running.system import System, check_batch, load

NAME: Final = "evaluation.json"


@dataclass(frozen=True, kw_only=True)
class Identity:
    """Everything that must be equal for answers to belong together: digests and fingerprints."""

    protocol: str
    data: str
    bundle: str
    prompts: str
    untrained_bundle: str | None
    batch_size: int


_WORDS: Final = {
    "protocol": "the protocol",
    "data": "the data",
    "bundle": "the bundle",
    "prompts": "the bundle's prompts",
    "untrained_bundle": "the bundle with untrained links",
    "batch_size": "the batch size",
}


def prompt_digest(plan: Plan) -> str:
    """Return the sha256 of every prompt and system text of a plan, by agent."""
    parts = ("system", "first", "then", "chat_template")
    prompts = {
        name: {part: to_json(getattr(agent, part)) for part in parts}
        for name, agent in plan.agents.items()
    }
    return hashlib.sha256(json.dumps(prompts, sort_keys=True).encode()).hexdigest()


def claim_folder(folder: Path, identity: Identity, *, resume: bool) -> bool:
    """Make sure that the answers in a folder belong to this evaluation, and say so in it.

    Returns:
        Whether there are answers to go on from.

    Raises:
        RecmasError: RM302 if there are answers and they are not to be resumed, RM603 if they are of
            another evaluation, RM503 if the folder cannot be written.
    """
    path = folder / NAME
    if path.exists():
        if not resume:
            raise fail(
                "RM302",
                f"{folder} holds an evaluation already",
                hint="Pass --resume to go on with it, or choose another --out.",
            )
        _compare(path, identity)
        return True
    try:
        folder.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(asdict(identity), indent=2) + "\n", encoding="utf-8")
    except OSError as error:
        raise fail(
            "RM503",
            f"cannot write to {folder}: {error.strerror}",
            hint="Choose another --out.",
        ) from error
    return False


def _compare(path: Path, identity: Identity) -> None:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        before = Identity(**{field.name: found[field.name] for field in fields(Identity)})
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise fail(
            "RM603",
            f"{path} does not say which evaluation this is",
            hint="Choose another --out to start afresh.",
        ) from error
    then, now = asdict(before), asdict(identity)
    changed = [name for name in then if then[name] != now[name]]
    if changed:
        differences = "; ".join(
            f"{_WORDS[name]} was {_short(then[name])} and is {_short(now[name])}"
            for name in changed
        )
        raise fail(
            "RM603",
            f"the answers in {path.parent} are of another evaluation: {differences}",
            hint="Resume with what it began with, or choose another --out.",
        )


def _short(value: object) -> str:
    return value[:12] if isinstance(value, str) else str(value)


UNTRAINED: Final = "untrained-links"
OLD_UNTRAINED: Final = "frozen-links"  # its name in version 0.1


@dataclass(frozen=True, kw_only=True)
class EvalOptions:
    """What to evaluate, and how.

    Attributes:
        baselines: Systems to run, in this order; none means the latent system alone.
        untrained_bundle: The same system with untrained links.
        overrides: `KEY=VALUE` of the protocol.
        batch: Records per batch; None for the most that the bundle takes.
        out: Folder for answers and report; None for one named after bundle and protocol.
        device: `auto`, `cpu`, `cuda` or `tensorrt`.
        threads: None for the physical cores.
    """

    bundle: Path
    data: Path
    protocol: str
    baselines: tuple[str, ...]
    untrained_bundle: Path | None
    overrides: tuple[str, ...]
    batch: int | None
    out: Path | None
    resume: bool
    device: str
    threads: int | None


@dataclass(frozen=True, kw_only=True)
class Evaluated:
    """What an evaluation gave, and what a reader of its figures should know."""

    report: Report
    written: tuple[Path, ...]
    warnings: tuple[Problem, ...]
    interrupted: bool


def evaluate(options: EvalOptions, *, progress: Progress) -> Evaluated:
    """Run an evaluation; whatever can be refused is refused before a system is loaded.

    Raises:
        RecmasError: What concerns the whole run; single records that fail are in the report.
    """
    protocol = load_protocol(options.protocol, overrides=options.overrides)
    bundle = open_bundle(options.bundle, verify_hashes=False)
    asked = (UNTRAINED if name == OLD_UNTRAINED else name for name in options.baselines)
    names = tuple(dict.fromkeys(asked)) or (LATENT,)
    for name in names:
        if name != UNTRAINED:
            apply_baseline(bundle.plan, name, bundle.manifest)
    untrained = _untrained_bundle(options, names, bundle)
    batch_size = bundle.plan.limits.max_batch if options.batch is None else options.batch
    check_batch(batch_size, bundle.plan)
    warnings: list[Problem] = []
    device = choose_device(bundle, options.device, warnings)
    data = load_data(options.data, protocol, shown=bundle.plan.fields)
    _check_fields(bundle, data)
    folder = options.out or Path("out") / f"{bundle.plan.name}-{protocol.name}"
    identity = Identity(
        protocol=protocol.digest(),
        data=data.digest,
        bundle=bundle.manifest.fingerprint,
        prompts=prompt_digest(bundle.plan),
        untrained_bundle=untrained.manifest.fingerprint if untrained else None,
        batch_size=batch_size,
    )
    with make_check(protocol.check) as check:
        for question in data.questions:
            check("", question)  # what it cannot use is refused before anything is asked
        resumed = claim_folder(folder, identity, resume=options.resume)
        evaluation = run_systems(
            _systems(names, options),
            data.questions,
            protocol=protocol,
            check=check,
            batch_size=batch_size,
            folder=folder,
            resume=resumed,
            progress=progress,
        )
    report = make_report(
        evaluation,
        protocol=protocol,
        data=data,
        data_file=options.data,
        bundle=bundle,
        prompt_digest=identity.prompts,
        device=device,
        threads=options.threads,
    )
    return Evaluated(
        report=report,
        written=tuple(write_report(report, folder)),
        warnings=(*_warnings(protocol, identity), *warnings),
        interrupted=evaluation.interrupted,
    )


def option_overrides(limit: int | None, seeds: str | None) -> tuple[str, ...]:
    """Return `--limit` and `--seeds` as overrides of the protocol."""
    found = [f"n={limit}"] if limit is not None else []
    found += [f"seeds=[{seeds}]"] if seeds is not None else []
    return tuple(found)


def _systems(names: Sequence[str], options: EvalOptions) -> Mapping[str, Callable[[], System]]:
    """Return how to make each system; all but the untrained one share one set of engines."""
    opened = partial(load, device=options.device, threads=options.threads)
    base = cache(partial(opened, options.bundle))

    def make(name: str) -> System:
        if name != UNTRAINED:
            return base().baseline(name)
        assert options.untrained_bundle is not None
        return opened(options.untrained_bundle)

    return {name: partial(make, name) for name in names}


def _untrained_bundle(options: EvalOptions, names: Sequence[str], bundle: Bundle) -> Bundle | None:
    """Return the bundle with untrained links, if it is asked for."""
    if UNTRAINED not in names:
        if options.untrained_bundle is not None:
            hint = f"Add --baseline {UNTRAINED}."
            raise fail("RM506", f"--untrained-bundle without --baseline {UNTRAINED}", hint=hint)
        return None
    if options.untrained_bundle is None:
        raise fail(
            "RM506",
            f"--baseline {UNTRAINED} without --untrained-bundle",
            hint="Build the spec with untrained links into a folder and name it.",
        )
    untrained = open_bundle(options.untrained_bundle, verify_hashes=False)
    if (untrained.plan.agents, untrained.plan.steps) != (bundle.plan.agents, bundle.plan.steps):
        raise fail(
            "RM506",
            f"{options.untrained_bundle} has other prompts or steps than {options.bundle}",
            hint="Build both from the same spec; only the links may differ.",
        )
    return untrained


def _check_fields(bundle: Bundle, data: DataSet) -> None:
    """Refuse data that lacks what every prompt shows; single records may still fail."""
    there = {"id"}.union(*(question.record.fields for question in data.questions))
    missing = sorted(set(bundle.plan.fields) - there)
    if missing:
        raise fail(
            "RM601",
            f"the bundle's prompts show {', '.join(missing)}, which no record of this protocol has",
            hint="Evaluate with a protocol that has such a field, or build with other prompts.",
        )


def _warnings(protocol: Protocol, identity: Identity) -> tuple[Problem, ...]:
    if protocol.prompt_digest in (None, identity.prompts):
        return ()
    return (
        Problem(
            code="RM650",
            severity="warning",
            message=f"the protocol's prompts are {protocol.prompt_digest[:12]}, the bundle's "
            f"{identity.prompts[:12]}",
            hint="Do not set these figures beside ones that were made with other prompts.",
        ),
    )
