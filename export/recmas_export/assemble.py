"""The making of a bundle's files: engines, links, parity cases, each from the cache if it is there.

Torch is imported, and models are loaded, where a part has to be made that takes them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path, PurePath
from typing import TYPE_CHECKING, Any, Final, NamedTuple, TypeVar

from msgspec import structs

from recmas_compiler.ir.graph import Graph
from recmas_compiler.links.files import LinkWeights
from recmas_compiler.lowering.named_layers import backbones_with_chosen_layers, name_layers
from recmas_compiler.lowering.plan import build_plan
from recmas_compiler.lowering.prompt_parity import (
    TokenizerAgain,
    WithTokenizer,
    other_prompts,
)
from recmas_compiler.lowering.prompt_trial import check_prompts
from recmas_compiler.spec.spec import Spec
from recmas_export.bundle.engine_files import (
    CHAT_TEMPLATE,
    CPU_DECODER,
    CPU_HEAD,
    DECODER,
    EMBED,
    HEAD,
    LINK_ENGINE,
    PROBE,
    TOKENIZER,
    WEIGHTS,
)
from recmas_export.bundle.refused import OTHER_TEXTS, refuse
from recmas_export.bundle.texts import MessagePath, Texts
from recmas_export.cache.build_parts import BuildParts, Kind
from recmas_export.cache.loaded_backbones import LoadedBackbones, Timer, used_backbones
from recmas_runtime.checking.parity import measure_backbone_parity, measure_link_parity
from recmas_runtime.checking.placement import refuse_stray_nodes
from recmas_runtime.core.errors import RecmasError
from recmas_runtime.core.files import sha256_of
from recmas_runtime.core.progress import Progress
from recmas_runtime.engines.onnx.backbone import BackboneEngine, LinkEngine
from recmas_runtime.engines.onnx.probe import measure_probe
from recmas_runtime.engines.onnx.session import Device, onnx_runtime
from recmas_runtime.formats.ids import inner_link_id
from recmas_runtime.formats.layers import RowPositions
from recmas_runtime.formats.link_kinds import LinkRole
from recmas_runtime.formats.links import read_operands
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
from recmas_runtime.formats.safetensors_file import read_tensors
from recmas_runtime.prompts.chat_template import ChatTemplate, read_template
from recmas_runtime.prompts.render import Chat
from recmas_runtime.prompts.samples import PromptDigests, prompt_digests, token_digest
from recmas_runtime.running.open_engines import choose_provider

if TYPE_CHECKING:
    from recmas_compiler.backbones.torch_model import TorchBackbone
    from recmas_compiler.links.calibration import Calibration
    from recmas_compiler.lowering.materialize import MaterializedLink

T = TypeVar("T")

# Questions and answers written for this purpose, for specs that name no text.
OWN_TEXT: Final = Path(__file__).with_name("held_out.txt")


class Parts(NamedTuple):
    """What the manifest says of what was made, by its own names."""

    backbones: dict[str, BackboneEntry]
    links: dict[str, LinkEntry]
    parity: tuple[ParityEntry, ...]
    prompt_digests: PromptDigests
    token_digests: dict[str, str]
    layer_scores: dict[str, LayerScores]
    plan: Plan


def assemble(
    program: Graph,
    folder: Path,
    *,
    spec: Spec,
    names: Sequence[str],
    parts: BuildParts,
    sources: Mapping[str, object],
    backbones: Mapping[str, TorchBackbone] | None,
    links: Mapping[str, MaterializedLink] | None,
    seconds: dict[str, float],
    progress: Progress,
) -> Parts:
    """Write everything a bundle holds but plan, spec and manifest, and check it against torch.

    Layers that links say only the number of are chosen first, so that the plan is known then. What
    is not given as backbones and links, by shared name and by id, is loaded and made. `seconds`
    gets the wall time by stage.

    Args:
        names: Backbones of live agents, by shared name.
        sources: What each backbone that agents use is loaded from, as inputs of parts.

    Raises:
        RecmasError: RM202 where rows are moved that cannot be, RM203 or RM300 where a backbone
            cannot be exported, RM301 where a tokenizer, a
            prompt or an engine disagrees with the reference or loses too much, RM304 where a step
            leaves its provider, and what loading, link making and reading the text to measure
            losses over raise.
        OSError: A file cannot be written.
    """
    timer = Timer(seconds)
    declared = used_backbones(program)
    loaded = LoadedBackbones(declared, backbones, timer=timer, progress=progress)

    def measured(kind: Kind, name: str, measure: Callable[[TorchBackbone], T], as_: type[T]) -> T:
        about = declared[name].facts.source
        return parts.value(kind, about, sources[name], lambda: measure(loaded[name]), as_)

    with timer("load"):
        texts = {name: measured("texts", name, _texts_of, Texts) for name in declared}
        _refuse_prompts(spec, program, texts)
        scores = {
            name: measured("layers", name, _score_layers, LayerScores)
            for name in backbones_with_chosen_layers(program)
        }
        program = name_layers(program, scores)
        plan = build_plan(program)
        positions = positions_of_moved_rows(
            program, lambda name: measured("positions", name, _row_positions, RowPositions)
        )
    stages = _Stages(
        program=program,
        plan=plan,
        folder=folder,
        names=tuple(names),
        parts=parts,
        sources=sources,
        texts=texts,
        loaded=loaded,
        positions=positions,
        given_links=links,
        progress=progress,
    )
    with timer("links"):
        entries = stages.links()
    with timer("export"):
        exported = stages.export()
    with timer("parity"):
        digests = stages.compare_prompts(exported)
        cases = stages.measure(exported, stages.compare(exported, entries), entries)
    return Parts(exported, entries, tuple(cases), *digests, scores, plan)


def _texts_of(backbone: TorchBackbone) -> Texts:
    from recmas_export.torch_parts import texts_of

    return texts_of(backbone)


def _score_layers(backbone: TorchBackbone) -> LayerScores:
    from recmas_compiler.lowering.choose_layers import score_layers

    return score_layers(backbone)


def _row_positions(backbone: TorchBackbone) -> RowPositions:
    return backbone.row_positions


def _refuse_prompts(spec: Spec, program: Graph, texts: Mapping[str, Texts]) -> None:
    """Refuse prompts that would fail at the first question, before anything takes long."""
    templates = {
        name: ChatTemplate(text.chat_template, text.special_tokens) for name, text in texts.items()
    }
    problems = check_prompts(spec, program.system, templates)
    if any(problem.severity == "error" for problem in problems):
        raise RecmasError(problems)


def positions_of_moved_rows(
    program: Graph, measure: Callable[[str], RowPositions]
) -> dict[str, RowPositions]:
    """Return, by backbone, how rows are moved that land elsewhere than they were computed."""
    system = program.system
    moved = {system.backbone_of(system.links[link].target).name for link in system.moved_links}
    return {name: measure(name) for name in sorted(moved)}


@dataclass(frozen=True, kw_only=True)
class _LinkStart:
    """What a link's weights are made from."""

    weights: LinkWeights
    role: LinkRole
    ends: tuple[str, str]  # shared names of the backbones

    @property
    def entry(self) -> dict[str, object]:
        """What the manifest says of it before it is made."""
        weights = self.weights
        return {
            "kind": weights.kind,
            "role": self.role,
            "init": weights.init if weights.file is None else PurePath(weights.file).name,
            "dims": [weights.in_dim, weights.out_dim],
            "file": None if weights.file is None else sha256_of(Path(weights.file)),
        }


@dataclass(frozen=True, kw_only=True)
class _Stages:
    """The stages of a build, links | export | compare | measure, and what they read."""

    program: Graph
    plan: Plan
    folder: Path
    names: tuple[str, ...]
    parts: BuildParts
    sources: Mapping[str, object]
    texts: Mapping[str, Texts]
    loaded: LoadedBackbones
    positions: Mapping[str, RowPositions]
    given_links: Mapping[str, MaterializedLink] | None
    progress: Progress
    calibrations: dict[str, Calibration] = field(default_factory=dict)

    def links(self) -> dict[str, LinkEntry]:
        """Write the links that engines and plan use."""
        used = [agent.inner for agent in self.plan.agents.values() if agent.inner]
        used += [link for link, entry in self.plan.links.items() if entry.has_vectors]
        starts, applied = self._link_starts(), self.program.system.link_weights
        (self.folder / "links").mkdir()
        entries = {}
        for link_id in dict.fromkeys(used):
            start = starts[link_id]
            inputs = {
                "id": link_id,
                "is_applied": link_id in applied,
                **start.entry,
                "ends": [self.sources[name] for name in start.ends],
            }
            entries[link_id] = self.parts.files(
                "link",
                link_id,
                inputs,
                self._making_link(link_id),
                LinkEntry,
                self.folder / "links",
            )
        return entries

    def _link_starts(self) -> dict[str, _LinkStart]:
        system = self.program.system
        on = {name: system.backbone_of(name).name for name in system.local_agents}
        starts = {
            inner_link_id(name): _LinkStart(
                weights=agent.inner, role="inner", ends=(on[name], on[name])
            )
            for name, agent in system.agents.items()
            if agent.inner is not None
        }
        return starts | {
            link.id: _LinkStart(
                weights=link.weights, role="outer", ends=(on[link.source], on[link.target])
            )
            for link in system.links.values()
            if link.weights is not None
        }

    def _making_link(self, link_id: str) -> Callable[[Path], LinkEntry]:
        def make(folder: Path) -> LinkEntry:
            from recmas_compiler.lowering.materialize import materialize_links
            from recmas_export.torch_parts import write_link

            made = self.given_links or materialize_links(
                self.program,
                self.loaded,
                progress=self.progress,
                only=(link_id,),
                calibrations=self.calibrations,
            )
            return write_link(link_id, made[link_id], folder)

        return make

    def export(self) -> dict[str, BackboneEntry]:
        """Write the engines of each backbone, and the graph of all links."""
        exported = {}
        with self.progress.stage("Exporting engines", len(self.names)) as advance:
            for name in self.names:
                exported[name] = self._export(name)
                advance()
            self.parts.files("graphs", "of all systems", {}, _common_graphs, bool, self.folder)
        return exported

    def _export(self, name: str) -> BackboneEntry:
        system = self.program.system
        backbone = system.backbones[name]
        masked = self.plan.masked_layers(name, backbone.facts.num_layers)
        settings: dict[str, Any] = {
            "precision": backbone.precision,
            "device": backbone.device_kind,
            "decoders": TARGETS[system.build.target].decoders,
            "masked_layers": masked,
        }

        def make(folder: Path) -> bool:
            from recmas_export.torch_parts import write_engines

            write_engines(self.loaded[name], folder, progress=self.progress, name=name, **settings)
            return True

        path = f"backbones/{name}"
        about = f"{backbone.facts.source} in {backbone.precision}"
        inputs = {"source": self.sources[name], **settings}
        self.parts.files("engines", about, inputs, make, bool, self.folder / path)
        return self._entry(name, path, masked)

    def _entry(self, name: str, path: str, masked: tuple[tuple[int, ...], ...]) -> BackboneEntry:
        """Return what the manifest says of the backbone whose engines are at a path."""
        backbone, texts = self.program.system.backbones[name], self.texts[name]
        facts = backbone.facts
        cpu_decoder, cpu_head = (
            file if (self.folder / file).exists() else None
            for file in (f"{path}/{CPU_DECODER}", f"{path}/{CPU_HEAD}")
        )
        return BackboneEntry(
            source=facts.source,
            digest=self.parts.digest(self.folder / path / WEIGHTS),
            model_type=facts.model_type,
            width=facts.width,
            layers=facts.layers,
            vocab_size=facts.vocab_size,
            max_positions=facts.max_positions,
            dtype=backbone.types.borders,
            bos_token=texts.bos_token,
            eos_token_ids=texts.eos_token_ids,
            decoder=f"{path}/{DECODER}",
            cpu_decoder=cpu_decoder,
            cpu_head=cpu_head,
            cache_dtype=backbone.types.caches,
            device=backbone.device,
            embed=f"{path}/{EMBED}",
            head=f"{path}/{HEAD}",
            weights=f"{path}/{WEIGHTS}",
            tokenizer=f"{path}/{TOKENIZER}",
            chat_template=f"{path}/{CHAT_TEMPLATE}",
            special_tokens=texts.special_tokens,
            precision=backbone.precision,
            masked_layers=masked,
            row_positions=self.positions.get(name),
        )

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
        tokenizers = {name: self._with_tokenizer(name, entry) for name, entry in exported.items()}
        prompts = other_prompts(self.plan, chats, tokenizers)
        refuse((("the bundle", found) for found in prompts), hint=OTHER_TEXTS)
        tokens = {name: token_digest(chat.tokenizer) for name, chat in chats.items()}
        return prompt_digests(self.plan, chats), tokens

    def _with_tokenizer(self, name: str, entry: BackboneEntry) -> WithTokenizer:
        """Return the tokenizer of transformers, without loading a model if that can be."""
        texts = self.texts[name]
        if self.loaded.is_loaded(name) or texts.tokenizer_tokens is None:
            return self.loaded[name]
        return TokenizerAgain.read(
            self.folder / entry.tokenizer,
            texts.tokenizer_tokens,
            chat_template=texts.chat_template,
            special_tokens=texts.special_tokens,
        )

    def compare(
        self, exported: Mapping[str, BackboneEntry], links: Mapping[str, LinkEntry]
    ) -> list[ParityEntry]:
        """Run the probe and each backbone's case on the engines; refuse other numbers."""
        cases, probe = [], self.folder / PROBE
        with self.progress.stage("Comparing with the reference", len(exported)) as advance:
            figures = {"probe_absolute": measure_probe(probe)}
            refuse(("probe", what) for what in beyond_tolerance(figures, precision="float32"))
            devices = tuple(dict.fromkeys(("cpu", choose_provider("auto", probe)[0])))
            for name, entry in exported.items():
                cases.append(self._compared(name, entry, links, devices))
                advance()
        refuse(
            (f"backbone {case.backbone!r}", what)
            for case in cases
            for what in beyond_tolerance(case.figures, precision=exported[case.backbone].precision)
        )
        return cases

    def _compared(
        self,
        name: str,
        entry: BackboneEntry,
        links: Mapping[str, LinkEntry],
        devices: Sequence[Device],
    ) -> ParityEntry:
        """Write a backbone's case, and run it through the runtime's own code."""
        file = self._write_case(name, entry, links)

        def run() -> ParityEntry:
            for device in devices:
                refuse_stray_nodes(self.folder / entry.decoder_on(device), device=device)
            return self._run_case(name, file, entry, links)

        inputs = self._engine_inputs(file, entry, links) | {"devices": devices}
        return self.parts.value("parity", entry.source, inputs, run, ParityEntry)

    def _write_case(self, name: str, entry: BackboneEntry, links: Mapping[str, LinkEntry]) -> str:
        """Write what the reference computes for a backbone; returns the file's path."""
        agents = [agent for agent, found in self.plan.agents.items() if found.backbone == name]
        inner_ids = {agent: self.plan.agents[agent].inner for agent in agents}
        outer = {
            link: inner_ids[step.source]
            for step in self.plan.steps
            if isinstance(step, SendStep) and step.source in agents
            for link in step.links
            if link in links  # text and rows go through none
        }
        inner = list(dict.fromkeys(inner_ids.values()))
        message = self._message_to(name)
        used = {*inner, *outer, *(() if message is None else (message.inner, message.outer))}
        capacity = max(c.capacity for c in self.plan.caches.values() if c.backbone == name)
        window = self.program.system.backbones[name].facts.sliding_window or 0
        file = f"{name}.safetensors"

        def make(folder: Path) -> bool:
            from recmas_export.torch_parts import write_case

            write_case(
                self.loaded,
                name,
                folder / file,
                links={link: (self.folder / links[link].file, links[link]) for link in used},
                inner=inner,
                outer=outer,
                message=message,
                capacity=capacity,
                masked_layers=entry.masked_layers,
            )
            return True

        inputs = {
            "name": name,
            "source": self.sources[name],
            "inner": inner,
            "outer": list(outer.items()),
            "message": message and [self.sources[message.backbone], *message[1:]],
            "links": {link: self._digest(links[link].file) for link in sorted(used)},
            "window": window if window < capacity else 0,  # what is kept reaches past it
            "masked_layers": entry.masked_layers,
        }
        self.parts.files("case", entry.source, inputs, make, bool, self.folder / "parity")
        return f"parity/{file}"

    def _engine_inputs(
        self, case: str, entry: BackboneEntry, links: Mapping[str, LinkEntry]
    ) -> dict[str, Any]:
        """Return what figures of engines depend on: every byte that they read, and ONNX Runtime.

        The conditions of a build say the rest: the processor, its flags and cores, and this code.
        """
        files = (
            *(entry.decoder, entry.cpu_decoder, entry.embed),
            *(entry.head, entry.cpu_head, entry.weights),
        )
        ort = onnx_runtime()
        return {
            "case": self._digest(case),
            "files": [file and self._digest(file) for file in files],
            "link_engine": self._digest(LINK_ENGINE),
            "links": {name: self._digest(link.file) for name, link in sorted(links.items())},
            "entry": structs.replace(entry, source=""),
            "onnxruntime": [ort.__version__, ort.get_build_info(), ort.get_available_providers()],
        }

    def _digest(self, file: str) -> str:
        return self.parts.digest(self.folder / file)

    def _run_case(
        self, name: str, file: str, entry: BackboneEntry, links: Mapping[str, LinkEntry]
    ) -> ParityEntry:
        tensors, metadata = read_tensors(self.folder / file)
        operands = read_operands(self.folder.joinpath, links)
        # Other devices and engines go by the portable decoder, so it is held to the same. Where it
        # computes in 16 bits a CPU cannot, and its form for the CPU rounds where it does.
        forms = [entry]
        if entry.cpu_decoder and not entry.is_narrow:
            forms.append(structs.replace(entry, cpu_decoder=None))
        found = [
            measure_backbone_parity(
                BackboneEngine(form, self.folder), tensors, operands[metadata["inner"]]
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

    def _message_to(self, backbone: str) -> MessagePath | None:
        """Return the way of what is sent first onto a backbone, if vectors are."""
        agents = self.plan.agents
        for step in self.plan.steps:
            for link in step.links if isinstance(step, SendStep) else ():
                ends = self.plan.links[link]
                if agents[ends.target].backbone == backbone and ends.has_vectors:
                    source = agents[ends.source]
                    return MessagePath(source.backbone, source.inner, link)
        return None

    def measure(
        self,
        exported: Mapping[str, BackboneEntry],
        cases: Sequence[ParityEntry],
        links: Mapping[str, LinkEntry],
    ) -> list[ParityEntry]:
        """Return the cases, where a precision loses something with how much; refuse too much."""
        lossy = [c for c in cases if PRECISIONS[exported[c.backbone].precision].has_losses]
        if not lossy:
            return list(cases)
        losses: dict[str, LossEntry] = {}
        with self.progress.stage("Measuring losses", len(lossy)) as advance:
            for case in lossy:
                losses[case.backbone] = self._loss(case, exported[case.backbone], links)
                advance()
        refuse(
            (f"backbone {name!r}", what)
            for name, loss in losses.items()
            for what in beyond_loss_limits(loss, precision=exported[name].precision)
        )
        return [structs.replace(case, loss=losses.get(case.backbone)) for case in cases]

    def _loss(
        self, case: ParityEntry, entry: BackboneEntry, links: Mapping[str, LinkEntry]
    ) -> LossEntry:
        """Measure what a backbone's precision costs over a text, its own or the spec's."""
        given = self.program.system.loss_text
        text = OWN_TEXT if given is None else Path(given)
        name = "recmas's text" if given is None else text.name

        def run() -> LossEntry:
            from recmas_export.torch_parts import loss_of

            _, metadata = read_tensors(self.folder / case.file)
            link = links[metadata["inner"]]
            return loss_of(
                self.loaded[case.backbone], entry, self.folder, link=link, text=text, name=name
            )

        inputs = self._engine_inputs(case.file, entry, links) | {
            "source": self.sources[case.backbone],
            "text": [name, sha256_of(text)],
        }
        return self.parts.value("loss", entry.source, inputs, run, LossEntry)


def _common_graphs(folder: Path) -> bool:
    from recmas_export.torch_parts import write_common_graphs

    write_common_graphs(folder)
    return True
