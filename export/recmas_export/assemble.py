"""The making of a bundle's files: engines, links, parity cases. Imports torch; `build` does not."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path, PurePath
from typing import Any, Final, NamedTuple

from msgspec import structs
from torch import Tensor, nn

from recmas_compiler.backbones.own_tokenizer import other_ids, own_tokenizer_file
from recmas_compiler.backbones.torch_model import TorchBackbone
from recmas_compiler.ir.graph import Graph
from recmas_compiler.lowering.choose_layers import choose_layers
from recmas_compiler.lowering.materialize import MaterializedLink, materialize_links
from recmas_compiler.lowering.plan import build_plan
from recmas_compiler.lowering.prompt_parity import other_prompts
from recmas_compiler.lowering.prompt_trial import check_prompts
from recmas_compiler.lowering.reference import load_backbones
from recmas_compiler.spec.spec import Spec
from recmas_export.backbone_graph import (
    CHAT_TEMPLATE,
    CPU_DECODER,
    DECODER,
    EMBED,
    HEAD,
    TOKENIZER,
    WEIGHTS,
    export_backbone,
    prompt_decoder,
)
from recmas_export.parity import (
    OWN_TEXT,
    link_cases,
    make_case,
    make_message,
    measure_loss,
    passages_of,
    refuse,
)
from recmas_export.rounding import rounded_layers
from recmas_export.written_graphs import write_link_graph, write_probe
from recmas_runtime.checking.parity import (
    measure_backbone_parity,
    measure_link_parity,
)
from recmas_runtime.checking.placement import refuse_stray_nodes
from recmas_runtime.core.errors import RecmasError
from recmas_runtime.core.files import sha256_of
from recmas_runtime.core.progress import Progress
from recmas_runtime.engines.onnx.backbone import BackboneEngine, LinkEngine
from recmas_runtime.engines.onnx.probe import measure_probe
from recmas_runtime.engines.onnx.session import Device
from recmas_runtime.formats.ids import link_file_name
from recmas_runtime.formats.layers import RowPositions
from recmas_runtime.formats.links import load_operands, read_operands
from recmas_runtime.formats.manifest import (
    BackboneEntry,
    LayerScores,
    LinkEntry,
    LossEntry,
    ParityEntry,
)
from recmas_runtime.formats.plan import Plan, SendStep
from recmas_runtime.formats.precisions import (
    PRECISIONS,
    TARGETS,
    beyond_loss_limits,
    beyond_tolerance,
)
from recmas_runtime.formats.safetensors_file import read_tensors, write_tensors
from recmas_runtime.prompts.chat_template import ChatTemplate, read_template
from recmas_runtime.prompts.render import Chat
from recmas_runtime.prompts.samples import PromptDigests, prompt_digests, token_digest
from recmas_runtime.running.open_engines import choose_provider

LINK_ENGINE = "links/link.onnx"
PROBE = "parity/probe.onnx"


_OTHER_TEXTS: Final = (
    "No bundle was written. Try other versions of transformers, tokenizers and jinja2, and report "
    "the model."
)


class Parts(NamedTuple):
    """What the manifest says of what was made, by its own names."""

    backbones: dict[str, BackboneEntry]
    links: dict[str, LinkEntry]
    parity: tuple[ParityEntry, ...]
    prompt_digests: PromptDigests
    token_digests: dict[str, str]
    layer_scores: dict[str, LayerScores]
    plan: Plan


@contextmanager
def _timed(seconds: dict[str, float], stage: str) -> Iterator[None]:
    started = time.perf_counter()
    yield
    seconds[stage] = time.perf_counter() - started


def assemble(
    program: Graph,
    folder: Path,
    *,
    spec: Spec,
    names: Sequence[str],
    backbones: Mapping[str, TorchBackbone] | None,
    links: Mapping[str, MaterializedLink] | None,
    seconds: dict[str, float],
    progress: Progress,
) -> Parts:
    """Write everything a bundle holds but plan, spec and manifest, and check it against torch.

    Layers that links say only the number of are chosen first, so that the plan is known then. What
    is not given as backbones and links, by shared name and by id, is loaded and made. `seconds`
    gets the wall time by stage.

    Raises:
        RecmasError: RM202 where rows are moved that cannot be, RM203 or RM300 where a backbone
            cannot be exported, RM301 where a tokenizer, a
            prompt or an engine disagrees with the reference or loses too much, RM304 where a step
            leaves its provider, and what loading, link making and reading the text to measure
            losses over raise.
        OSError: A file cannot be written.
    """
    with _timed(seconds, "load"):
        loaded = backbones or load_backbones(program, progress=progress)
        _refuse_prompts(spec, program, loaded)
        program, scores = choose_layers(program, loaded)
        plan = build_plan(program)
        positions = positions_of_moved_rows(program, loaded)
    with _timed(seconds, "links"):
        made = links or materialize_links(program, loaded, progress=progress)
        used = [agent.inner for agent in plan.agents.values()]
        used += [link for link, entry in plan.links.items() if entry.has_vectors]
        entries = _write_links(folder, {link: made[link] for link in dict.fromkeys(used)})
    stages = _Stages(
        program=program,
        plan=plan,
        folder=folder,
        loaded={name: loaded[name] for name in names},
        positions=positions,
        modules={link: made[link].module for link in entries},
        links=entries,
        progress=progress,
    )
    with _timed(seconds, "export"):
        exported = stages.export()
    with _timed(seconds, "parity"):
        digests = stages.compare_prompts(exported)
        cases = stages.measure(exported, stages.compare(exported))
    return Parts(exported, entries, tuple(cases), *digests, scores, plan)


def _refuse_prompts(spec: Spec, program: Graph, loaded: Mapping[str, TorchBackbone]) -> None:
    """Refuse prompts that would fail at the first question, before anything takes long."""
    templates = {
        name: ChatTemplate(backbone.chat_template, backbone.special_tokens)
        for name, backbone in loaded.items()
    }
    problems = check_prompts(spec, program.system, templates)
    if any(problem.severity == "error" for problem in problems):
        raise RecmasError(problems)


def positions_of_moved_rows(
    program: Graph, loaded: Mapping[str, TorchBackbone]
) -> dict[str, RowPositions]:
    """Return, by backbone, how rows are moved that land elsewhere than they were computed."""
    system = program.system
    moved = {system.backbone_of(system.links[link].target).name for link in system.moved_links}
    return {name: loaded[name].row_positions for name in sorted(moved)}


@dataclass(frozen=True, kw_only=True)
class _Stages:
    """The stages of a build, export | compare | measure, and what they read."""

    program: Graph
    plan: Plan
    folder: Path
    loaded: Mapping[str, TorchBackbone]
    positions: Mapping[str, RowPositions]
    modules: Mapping[str, nn.Module]
    links: Mapping[str, LinkEntry]
    progress: Progress

    def export(self) -> dict[str, BackboneEntry]:
        """Write the engines of each backbone, and the graph of all links."""
        exported, system = {}, self.program.system
        decoders = TARGETS[system.build.target].decoders
        with self.progress.stage("Exporting engines", len(self.loaded)) as advance:
            for name, backbone in self.loaded.items():
                precision, path = system.backbones[name].precision, self.folder / "backbones" / name
                masked = self.plan.masked_layers(name, backbone.facts.num_layers)
                wanted: dict[str, Any] = {
                    "precision": precision,
                    "decoders": decoders,
                    "masked_layers": masked,
                }
                prompts = prompt_decoder(backbone, **wanted)
                with rounded_layers(backbone, precision=precision, progress=self.progress):
                    export_backbone(backbone, path, prompts=prompts, **wanted)
                entry = _entry(backbone, self.folder, f"backbones/{name}", precision)
                exported[name] = structs.replace(
                    entry, masked_layers=masked, row_positions=self.positions.get(name)
                )
                advance()
            write_link_graph(self.folder / LINK_ENGINE)
        return exported

    def compare_prompts(
        self, exported: Mapping[str, BackboneEntry]
    ) -> tuple[PromptDigests, dict[str, str]]:
        """Refuse files that make other tokens than transformers; return digests of what they make.

        They are read as a run reads them.
        """
        chats = {
            name: Chat.load(
                self.folder / entry.tokenizer,
                read_template(self.folder / entry.chat_template, file=entry.chat_template),
                entry.special_tokens,
            )
            for name, entry in exported.items()
        }
        for name, entry in exported.items():
            backbone = self.loaded[name]
            found = other_ids(
                self.folder / entry.tokenizer,
                backbone.tokenizer,
                own_file=own_tokenizer_file(backbone.facts),
            )
            refuse([(f"backbone {name!r}", found)] if found else [], hint=_OTHER_TEXTS)
        prompts = other_prompts(self.plan, chats, self.loaded)
        refuse((("the bundle", found) for found in prompts), hint=_OTHER_TEXTS)
        tokens = {name: token_digest(chat.tokenizer) for name, chat in chats.items()}
        return prompt_digests(self.plan, chats), tokens

    def compare(self, exported: Mapping[str, BackboneEntry]) -> list[ParityEntry]:
        """Run the probe and each backbone's case on the engines; refuse other numbers."""
        cases, probe = [], self.folder / PROBE
        with self.progress.stage("Comparing with the reference", len(exported)) as advance:
            probe.parent.mkdir()
            write_probe(probe)
            figures = {"probe_absolute": measure_probe(probe)}
            refuse(("probe", what) for what in beyond_tolerance(figures, precision="float32"))
            devices: dict[Device, None] = {"cpu": None, choose_provider("auto", probe)[0]: None}
            for name, entry in exported.items():
                for device in devices:
                    refuse_stray_nodes(self.folder / entry.decoder_on(device), device=device)
                cases.append(self._compare(name, entry))
                advance()
        refuse(
            (f"backbone {case.backbone!r}", what)
            for case in cases
            for what in beyond_tolerance(case.figures, precision=exported[case.backbone].precision)
        )
        return cases

    def _compare(self, name: str, entry: BackboneEntry) -> ParityEntry:
        """Write a backbone's case, and run it through the runtime's own code."""
        agents = [agent for agent, found in self.plan.agents.items() if found.backbone == name]
        inner_ids = {agent: self.plan.agents[agent].inner for agent in agents}
        inner = {link: self.modules[link] for link in inner_ids.values()}
        outer = {
            link: (inner_ids[step.source], self.modules[link])
            for step in self.plan.steps
            if isinstance(step, SendStep) and step.source in agents
            for link in step.links
            if link in self.modules  # text and rows go through none
        }
        first_inner = next(iter(inner))
        case = make_case(
            self.loaded[name],
            inner=inner[first_inner],
            message_Md=self._message_to(name),
            capacity=max(c.capacity for c in self.plan.caches.values() if c.backbone == name),
            masked_layers=entry.masked_layers,
        )
        case |= link_cases(case["hidden"][0, -4:], inner=inner, outer=outer)
        file = f"parity/{name}.safetensors"
        write_tensors(self.folder / file, case, {"inner": first_inner})

        tensors, _ = read_tensors(self.folder / file)
        operands = read_operands(self.folder.joinpath, self.links)
        # Other devices and engines go by the portable decoder, so it is held to the same.
        forms = [entry, structs.replace(entry, cpu_decoder=None)] if entry.cpu_decoder else [entry]
        found = [
            measure_backbone_parity(
                BackboneEngine(form, self.folder), tensors, operands[first_inner]
            )
            for form in forms
        ]
        figures = {name: max(p.figures[name] for p in found) for name in found[0].figures}
        link = measure_link_parity(LinkEngine(self.folder / LINK_ENGINE), tensors, operands)
        return ParityEntry(
            file=file,
            backbone=name,
            figures={**figures, "link_relative": link},
            greedy_tokens_equal=all(p.greedy_tokens_equal for p in found),
        )

    def _message_to(self, backbone: str) -> Tensor | None:
        """Return what the first outer link onto a backbone sends it, if there is one."""
        agents = self.plan.agents
        for step in self.plan.steps:
            for link in step.links if isinstance(step, SendStep) else ():
                ends = self.plan.links[link]
                source, target = agents[ends.source], agents[ends.target]
                if target.backbone == backbone and ends.has_vectors:
                    return make_message(
                        self.loaded[source.backbone],
                        inner=self.modules[source.inner],
                        outer=self.modules[link],
                    )
        return None

    def measure(
        self, exported: Mapping[str, BackboneEntry], cases: Sequence[ParityEntry]
    ) -> list[ParityEntry]:
        """Return the cases, those of quantized backbones with what it costs; refuse too much."""
        quantized = [c for c in cases if PRECISIONS[exported[c.backbone].precision].is_quantized]
        if not quantized:
            return list(cases)
        losses: dict[str, LossEntry] = {}
        with self.progress.stage("Measuring losses", len(quantized)) as advance:
            for case in quantized:
                losses[case.backbone] = self._loss(case, exported[case.backbone])
                advance()
        refuse(
            (f"backbone {name!r}", what)
            for name, loss in losses.items()
            for what in beyond_loss_limits(loss, precision=exported[name].precision)
        )
        return [structs.replace(case, loss=losses.get(case.backbone)) for case in cases]

    def _loss(self, case: ParityEntry, entry: BackboneEntry) -> LossEntry:
        """Measure what a backbone's precision costs over a text, its own or the spec's."""
        backbone, text = self.loaded[case.backbone], self.program.system.loss_text
        passages = passages_of(backbone, OWN_TEXT if text is None else Path(text))
        name = "recmas's text" if text is None else PurePath(text).name
        _, metadata = read_tensors(self.folder / case.file)
        link = self.links[metadata["inner"]]
        inner = load_operands(self.folder / link.file, link)
        engine = BackboneEngine(entry, self.folder)
        # Where prompts are computed otherwise, what steps lose is what counts.
        by_position = PRECISIONS[entry.precision].cpu_products == "rows in prompts"
        return measure_loss(backbone, engine, inner, passages, text=name, by_position=by_position)


def _write_links(folder: Path, links: Mapping[str, MaterializedLink]) -> dict[str, LinkEntry]:
    (folder / "links").mkdir()
    entries = {}
    for link_id, link in links.items():
        start = link.weights.file
        entry = LinkEntry(
            file=f"links/{link_file_name(link_id)}",
            kind=link.weights.kind,
            role=link.role,
            in_dim=link.weights.in_dim,
            out_dim=link.weights.out_dim,
            init=link.init if start is None else PurePath(start).name,
            cosine=link.cosine,
        )
        weights = link.module.state_dict()
        write_tensors(
            folder / entry.file,
            {name: weight.detach().float().numpy() for name, weight in weights.items()},
            {"kind": entry.kind, "in_dim": str(entry.in_dim), "out_dim": str(entry.out_dim)},
        )
        entries[link_id] = entry
    return entries


def _entry(backbone: TorchBackbone, root: Path, folder: str, precision: str) -> BackboneEntry:
    """Return what the manifest says of the backbone that was exported to a folder of the bundle."""
    facts = backbone.facts
    for_cpu = f"{folder}/{CPU_DECODER}"
    return BackboneEntry(
        source=facts.source,
        digest=sha256_of(root / folder / WEIGHTS),
        model_type=facts.model_type,
        width=facts.width,
        layers=facts.layers,
        vocab_size=facts.vocab_size,
        max_positions=facts.max_positions,
        dtype="float32",
        bos_token=backbone.bos_token,
        eos_token_ids=backbone.eos_token_ids,
        decoder=f"{folder}/{DECODER}",
        cpu_decoder=for_cpu if (root / for_cpu).exists() else None,
        embed=f"{folder}/{EMBED}",
        head=f"{folder}/{HEAD}",
        weights=f"{folder}/{WEIGHTS}",
        tokenizer=f"{folder}/{TOKENIZER}",
        chat_template=f"{folder}/{CHAT_TEMPLATE}",
        special_tokens=backbone.special_tokens,
        precision=precision,
    )
