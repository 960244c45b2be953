"""`recmas verify`: is a bundle whole, and does it compute here what it did where it was built?"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from recmas_runtime.cache.store import Store
from recmas_runtime.checking.parity import (
    BACKBONE_CASE,
    case_links,
    case_positions,
    measure_backbone_parity,
    measure_link_parity,
)
from recmas_runtime.checking.placement import StrayNode, find_stray_nodes
from recmas_runtime.core.errors import Exit, Problem, RecmasError, fail
from recmas_runtime.core.progress import Progress, Silent
from recmas_runtime.engines.interface import Backbone, Operands
from recmas_runtime.engines.onnx.backbone import LinkEngine
from recmas_runtime.engines.onnx.probe import measure_probe
from recmas_runtime.engines.tensorrt.engine_cache import engines_text
from recmas_runtime.formats.bundle import Bundle, open_bundle, unlisted_files
from recmas_runtime.formats.codec import malformed
from recmas_runtime.formats.links import read_operands, stack_operands
from recmas_runtime.formats.manifest import PARITY_ROWS, PLAN_NAME, Manifest, ParityEntry
from recmas_runtime.formats.plan import filled_fields
from recmas_runtime.formats.precisions import TENSORRT, beyond_tolerance
from recmas_runtime.formats.safetensors_file import read_tensors
from recmas_runtime.prompts.samples import PromptDigests, prompt_digests, token_digest
from recmas_runtime.prompts.trial import render_once
from recmas_runtime.running.open_engines import LoadedBundle, load_bundle
from recmas_runtime.running.records import Record
from recmas_runtime.running.system import System


@dataclass(frozen=True, kw_only=True)
class CaseReport:
    """What one parity case gave here; the figures are those of `TOLERANCES`."""

    backbone: str
    precision: str
    figures: Mapping[str, float]
    greedy_tokens_equal: bool


@dataclass(frozen=True, kw_only=True)
class VerifyReport:
    """What was found out about a bundle; the probe's figure is its distance from the answer.

    Folders of TensorRT engines come with who built them, models behind an API with their address:
    they are not asked.
    """

    num_files: int
    device: str
    probe_absolute: float
    cases: tuple[CaseReport, ...]
    engines: Mapping[str, str]
    problems: tuple[Problem, ...]
    remotes: tuple[str, ...] = ()

    @property
    def ok(self) -> bool:
        """Whether there is no error."""
        return all(problem.severity != "error" for problem in self.problems)

    def to_json(self) -> dict[str, Any]:
        """Return the form that `--json` prints; a difference that is not finite is null."""
        return {
            "num_files": self.num_files,
            "device": self.device,
            "remotes": list(self.remotes),
            "probe_absolute": _finite(self.probe_absolute),
            "cases": [
                {
                    "backbone": case.backbone,
                    "precision": case.precision,
                    "figures": {name: _finite(value) for name, value in case.figures.items()},
                    "greedy_tokens_equal": case.greedy_tokens_equal,
                }
                for case in self.cases
            ],
            "engines": dict(self.engines),
        }


def verify_bundle(
    path: Path,
    *,
    device: str = "auto",
    threads: int | None = None,
    progress: Progress | None = None,
    store: Store | None = None,
) -> VerifyReport:
    """Hash every file, render every prompt, run the known-answer probe and every parity case.

    Args:
        device: As `load` takes it.
        threads: Threads within an operator; None takes the physical cores.
        store: Where packed weights are kept that runs would take; they are hashed too.

    Raises:
        RecmasError: If the bundle cannot be opened or run at all; figures out of tolerance are
            problems of the report instead.
    """
    watcher = progress or Silent()
    bundle = open_bundle(path, verify_hashes=True, progress=watcher)
    loaded = load_bundle(bundle, device=device, threads=threads, store=store, verify_hashes=True)
    problems = [*loaded.problems]
    problems += _prompt_problems(bundle, loaded)
    problems += _changed_tokens(bundle, loaded)
    problems += _tokens_without_rows(bundle, loaded)
    problems += [
        Problem(
            code="RM401",
            message="the manifest does not list this file",
            hint="Nothing reads it; delete it or build the bundle again.",
            severity="warning",
            file=relative,
        )
        for relative in unlisted_files(bundle)
    ]
    with watcher.stage("Running known cases", 1 + len(bundle.manifest.parity)) as advance:
        where = loaded.provider
        probe, file = math.inf, bundle.manifest.probe
        with _failures_as_findings(file, problems):
            probe = measure_probe(bundle.file(file), threads=threads, device=where)
            figures = {"probe_absolute": probe}
            problems += out_of_tolerance(file, figures, precision="float32")
        advance()
        cases = []
        operands = read_operands(bundle.file, bundle.manifest.links)
        with _failures_as_findings(bundle.manifest.link_engine, problems):
            _try_links(loaded.engines.link, bundle.manifest, operands)
        for entry in bundle.manifest.parity:
            with _failures_as_findings(entry.file, problems):
                backbone = loaded.engines.backbones[entry.backbone]
                case = _run_case(bundle, entry, backbone, loaded.engines.link, operands)
                precision = bundle.manifest.backbones[entry.backbone].precision
                problems += out_of_tolerance(entry.file, case.figures, precision=precision)
                # Quantized kernels round differently from one processor to another.
                is_exact = precision == "float32" and entry.greedy_tokens_equal
                if is_exact and not case.greedy_tokens_equal:
                    problems.append(
                        _disagrees(entry.file, "another greedy continuation than built")
                    )
                on = loaded.devices[entry.backbone]
                on = where if on == TENSORRT else on
                decoder = bundle.manifest.backbones[entry.backbone].decoder_on(on)
                stray = find_stray_nodes(bundle.file(decoder), threads=threads, device=on)
                problems += [_misplaced(decoder, node) for node in stray]
                cases.append(case)
            advance()
    return VerifyReport(
        num_files=len(bundle.manifest.files),
        device=loaded.device,
        probe_absolute=probe,
        cases=tuple(cases),
        engines=engines_text(bundle.root),
        problems=tuple(problems),
        remotes=tuple(entry.name for entry in bundle.manifest.remotes.values()),
    )


def _prompt_problems(bundle: Bundle, loaded: LoadedBundle) -> list[Problem]:
    """Render every prompt once and return what a run would find wrong with it."""
    plan, chats = bundle.plan, loaded.chats
    templates = {name: chat.template for name, chat in chats.items()}
    # That a date changes is told where a spec can fix it, at build.
    findings = render_once(
        plan.agents,
        templates,
        has_date=True,
        answer_agent=plan.answer_agent,
        tools=plan.tools,
        has_turns=plan.conversation.history == "turns",
    )
    problems = [
        _disagrees(PLAN_NAME, f"prompt `{f.place}` of agent {f.agent!r}: {f.problem.message}")
        for f in findings
        if f.problem.severity == "error"
    ]
    if problems:
        return problems
    # As tokens, too; what is of another kind than text is for records to say.
    # The shortest texts: a prompt that is too long with these fits no record.
    record = Record(id="1", fields=filled_fields(plan.fields, "1"))
    try:
        System(plan, loaded).prompts(record)
        problems += _changed_prompts(bundle.manifest, prompt_digests(plan, chats))
    except RecmasError as error:
        problems += [
            _disagrees(PLAN_NAME, problem.message)
            for problem in error.problems
            if problem.code != "RM500"
        ]
    return problems


def _changed_prompts(manifest: Manifest, here: PromptDigests) -> list[Problem]:
    """Return a problem for each prompt whose tokens are not those that were kept at build."""
    return [
        Problem(
            code="RM405",
            message=f"prompt `{variant}` of agent {agent!r} has other tokens here than where the "
            "bundle was built",
            hint="Install the versions of tokenizers and jinja2 that it was built with, or build "
            "it again; do not trust its answers here.",
            file=PLAN_NAME,
        )
        for agent, variants in manifest.prompt_digests.items()
        for variant, digest in variants.items()
        if here.get(agent, {}).get(variant) != digest
    ]


def _changed_tokens(bundle: Bundle, loaded: LoadedBundle) -> list[Problem]:
    """Return a problem for each tokenizer whose ids are not those that were kept at build."""
    kept = bundle.manifest.token_digests
    return [
        Problem(
            code="RM405",
            message=f"the tokenizer of backbone {name!r} gives texts other tokens here than where "
            "the bundle was built",
            hint="Install the version of tokenizers that it was built with, or build it again; do "
            "not trust its answers here.",
            file=entry.tokenizer,
        )
        for name, entry in bundle.manifest.backbones.items()
        if kept.get(name, found := token_digest(loaded.chats[name].tokenizer)) != found
    ]


def _tokens_without_rows(bundle: Bundle, loaded: LoadedBundle) -> list[Problem]:
    """Return a warning for each tokenizer that knows more tokens than its backbone."""
    return [
        Problem(
            code="RM404",
            message=f"the tokenizer has tokens up to {largest}, backbone {name!r} has embeddings "
            f"for {entry.vocab_size}",
            hint="Records that hold such a token fail; the others are answered.",
            severity="warning",
            file=entry.tokenizer,
        )
        for name, entry in bundle.manifest.backbones.items()
        if (largest := loaded.chats[name].tokenizer.largest_id) >= entry.vocab_size
    ]


def _try_links(engine: LinkEngine, manifest: Manifest, operands: Mapping[str, Operands]) -> None:
    """Put one vector through every outer link: a parity case need not name them all."""
    for name, link in manifest.links.items():
        if link.role == "outer":
            engine.apply(
                np.zeros((1, 1, link.in_dim), np.float32), stack_operands([operands[name]])
            )


def _run_case(
    bundle: Bundle,
    entry: ParityEntry,
    backbone: Backbone[Any],
    link: LinkEngine,
    operands: Mapping[str, Operands],
) -> CaseReport:
    tensors, inner = read_case(bundle, entry)
    parity = measure_backbone_parity(backbone, tensors, operands[inner])
    link_relative = measure_link_parity(link, tensors, operands)
    return CaseReport(
        backbone=entry.backbone,
        precision=bundle.manifest.backbones[entry.backbone].precision,
        figures={**parity.figures, "link_relative": link_relative},
        greedy_tokens_equal=parity.greedy_tokens_equal,
    )


def read_case(bundle: Bundle, entry: ParityEntry) -> tuple[Mapping[str, Any], str]:
    """Return a parity case's tensors and the id of its inner link.

    Raises:
        RecmasError: RM404 for a case that lacks what is measured.
    """
    tensors, metadata = read_tensors(bundle.file(entry.file))
    inner = metadata.get("inner", "")
    lacking = sorted(BACKBONE_CASE - tensors.keys())
    unknown = sorted({*case_links(tensors), inner} - bundle.manifest.links.keys())
    if lacking or unknown:
        raise fail(
            "RM404",
            f"the parity case lacks tensors {lacking} or names unknown links {unknown}",
            file=entry.file,
            hint="Build the bundle again with one version of recmas.",
        )
    wrong = _wrong_tensor(tensors, bundle.manifest, entry)
    if wrong:
        raise malformed(entry.file, f"the parity case's tensor {wrong}")
    return tensors, inner


def _wrong_tensor(
    case: Mapping[str, NDArray[Any]], manifest: Manifest, entry: ParityEntry
) -> str | None:
    """Return which tensor of a case is of another type or shape, or has values out of bounds.

    The lengths of what is expected are left to the comparison.
    """
    backbone = manifest.backbones[entry.backbone]
    width = backbone.width
    # By tensor: sizes of its axes, None for any.
    floats: dict[str, tuple[int | None, ...]] = {
        "inputs_embeds": (1, None, width),
        "hidden": (1, None, None),
        "feedback_embeds": (1, None, width),
        "feedback_hidden": (PARITY_ROWS, None, None),
        "thought_next": (None, None, None),
        "logits_hidden": (None, width),
        "logits": (None, None),
    }
    if backbone.masked_layers:
        floats["masked_hidden"] = (PARITY_ROWS, None, None)
    for link in case_links(case):
        floats[f"link.{link}.x"] = (None, manifest.links[link].in_dim)
        floats[f"link.{link}.y"] = (None, None)
    for name, sizes in floats.items():
        found = case.get(name)
        if found is None:
            return f"{name!r} is missing"
        if found.dtype != np.float32 or not _fits(found, sizes):
            return f"{name!r} is {found.dtype} of shape {list(found.shape)}"
    integers: dict[str, tuple[int, int, tuple[int | None, ...]]] = {
        "lengths": (1, 2**31, (None, PARITY_ROWS)),
        "feedback_lengths": (1, 2**31, (None, PARITY_ROWS)),
        "greedy_prompt": (0, backbone.vocab_size, (None,)),
        "greedy_tokens": (0, backbone.vocab_size, (None,)),
    }
    for name, (least, beyond, sizes) in integers.items():
        found = case[name]
        if found.dtype != np.int64 or not _fits(found, sizes) or not found.size:
            return f"{name!r} is {found.dtype} of shape {list(found.shape)}"
        if found.min() < least or found.max() >= beyond:
            return f"{name!r} has values from {found.min()} to {found.max()}"
    for lengths, embeds in (("lengths", "inputs_embeds"), ("feedback_lengths", "feedback_embeds")):
        positions, (whole, *others) = case[embeds].shape[1], case[lengths].sum(axis=0)
        if whole != positions or max(others) > positions:
            return f"{lengths!r} does not add up to the {positions} positions of {embeds!r}"
    if case_positions(case) > backbone.max_positions:
        return f"'inputs_embeds' has more positions than the backbone, {backbone.max_positions}"
    return None


def _fits(array: NDArray[Any], sizes: tuple[int | None, ...]) -> bool:
    """Tell whether an array has such axes, None for one of any size."""
    return len(array.shape) == len(sizes) and all(
        wanted in (None, size) for wanted, size in zip(sizes, array.shape, strict=True)
    )


def out_of_tolerance(file: str, figures: Mapping[str, float], *, precision: str) -> list[Problem]:
    """Return an error for each figure beyond the tolerance of a precision."""
    return [_disagrees(file, what) for what in beyond_tolerance(figures, precision=precision)]


@contextmanager
def _failures_as_findings(file: str, problems: list[Problem]) -> Iterator[None]:
    """Note engines that fail on a file: that is what a verification is to find out."""
    try:
        yield
    except RecmasError as error:
        if error.exit_code != Exit.RUN_FAILED:
            raise
        problems += [_disagrees(file, problem.message) for problem in error.problems]


def _disagrees(file: str, message: str) -> Problem:
    return Problem(
        code="RM405",
        message=message,
        hint="Upgrade onnxruntime or try --device cpu; do not trust this bundle's answers here.",
        file=file,
    )


def _misplaced(file: str, node: StrayNode) -> Problem:
    return Problem(
        code="RM304",
        message=f"an operator of a step does not run on the device: {node}",
        hint="Upgrade onnxruntime; answers are right, but slow.",
        severity="warning",
        file=file,
    )


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None
