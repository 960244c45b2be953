"""From the spec to the topology IR: the declared graph, with the dimensions of its backbones."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from functools import partial
from pathlib import Path

from recmas_compiler.backbones.chat_files import template_text
from recmas_compiler.backbones.config.rotary import ROWS_STAY_HINT, why_rows_stay
from recmas_compiler.backbones.facts import BackboneFacts
from recmas_compiler.backbones.fetching.hub import Fetch
from recmas_compiler.backbones.sources import describe_backbone
from recmas_compiler.ir.graph import Edge, Graph
from recmas_compiler.ir.ops import (
    SEARCH_CORPUS,
    Agent,
    Backbone,
    BuildOptions,
    Level,
    Link,
    Remote,
    System,
)
from recmas_compiler.links.files import (
    LinkFileError,
    LinkWeights,
    end_of,
    fitting_kind,
    read_link_header,
)
from recmas_compiler.spec.checks.speculation import writers
from recmas_compiler.spec.document.places import Loc, is_file, is_folder, path_of
from recmas_compiler.spec.document.problems import in_reading_order, problem_at
from recmas_compiler.spec.schema.sections import (
    LinkSection,
    ServeSection,
    SpeculationSection,
    ToolsSection,
    WeightsSection,
)
from recmas_compiler.spec.spec import Spec
from recmas_runtime.core.errors import Problem, RecmasError
from recmas_runtime.formats.ids import link_name
from recmas_runtime.formats.link_kinds import LinkRole
from recmas_runtime.formats.messages import MessageForm, moved_links
from recmas_runtime.formats.plan import (
    PythonPlan,
    SamplingPlan,
    SearchPlan,
    ServePlan,
    SpeculationPlan,
    StopPlan,
    ToolsPlan,
    prompt_fields,
    usual_question,
)
from recmas_runtime.formats.precisions import AUTO, TARGETS


def build_topology(
    spec: Spec, *, fetch: Fetch | None = None, known: Mapping[str, BackboneFacts] | None = None
) -> Graph:
    """Return the declared graph. No weights are read; of link files only the headers.

    Args:
        fetch: How to get what is missing of `hf:` backbones; None to look at what is there.
        known: Facts by backbone where they are known without looking at its files.

    Raises:
        RecmasError: All that only the backbones' files tell: missing or unsuitable backbones
            (RM2xx), link files that do not fit (RM120), limits beyond a backbone (RM105), a search
            corpus that is not there (RM123), a text to measure losses over that is not (RM126).
    """
    problems: list[Problem] = []
    facts = known or _describe_backbones(spec, problems, fetch=fetch)
    agents = {name: _agent(spec, name, facts, problems) for name in spec.document.agents}
    links = [_link(spec, *ends, facts, problems) for ends in spec.declared.links]
    for name, fact in facts.items():
        problems += _beyond_backbone(spec, name, fact)
    # What is made for a bundle's own engines has no files, and renders nothing.
    templates = _templates(spec, problems) if known is None else {}
    problems += _missing_files(spec)
    if problems:
        raise RecmasError(in_reading_order(problems))
    known_agents = {name: agent for name, agent in agents.items() if agent is not None}
    known_links = {link.id: link for link in links if link is not None}
    return Graph(
        level=Level.TOPOLOGY,
        system=_system(spec, facts, templates, known_agents, known_links),
        nodes=known_agents,
        edges=tuple(Edge(link.source, link.target, link) for link in known_links.values()),
    )


def missing_parts(spec: Spec) -> tuple[Problem, ...]:
    """Return what is wrong with the files that a spec names, whatever else is wrong with it."""
    problems: list[Problem] = []
    _describe_backbones(spec, problems, fetch=None)
    problems += _missing_files(spec)
    return in_reading_order(problems)


def _describe_backbones(
    spec: Spec, problems: list[Problem], *, fetch: Fetch | None
) -> dict[str, BackboneFacts]:
    facts = {}
    for name, section in spec.document.backbones.items():
        if section.is_remote:
            continue  # nothing of it is here, and nobody asks it before a run
        try:
            facts[name] = describe_backbone(
                section.source,
                base_dir=spec.base_dir,
                position=spec.position("backbones", name, "source"),
                fetch=fetch,
            )
        except RecmasError as error:
            problems += error.problems
    return facts


def _templates(spec: Spec, problems: list[Problem]) -> dict[str, str]:
    """Return the texts of the chat templates that the spec gives, by backbone."""
    texts = {}
    for name, section in spec.document.backbones.items():
        if section.template is None:
            continue
        try:
            texts[name] = template_text(section.template, spec.base_dir)
        except RecmasError as error:
            (problem,) = error.problems
            place = spec.position("backbones", name, "template")
            message = f"the chat template `{section.template}` cannot be used: {problem.message}."
            hint = "Give a Jinja file, relative to the spec, or `none` for plain text."
            problems.append(problem_at(place, "RM206", message, hint=hint))
    return texts


def _foreign_layers(facts: BackboneFacts, target: str) -> list[int]:
    """Return the layers that a target cannot run; one may keep a state beside keys and values."""
    able = TARGETS[target].layers
    return [
        i
        for i, (kind, layer) in enumerate(zip(facts.attention, facts.layers, strict=True))
        if kind not in able or (layer.states and "linear" not in able)
    ]


def _beyond_backbone(spec: Spec, name: str, facts: BackboneFacts) -> list[Problem]:
    """Return what a backbone cannot do for this spec."""
    document = spec.document
    problems = []
    target = document.build.target
    foreign = _foreign_layers(facts, target)
    if foreign:
        message = (
            f"{len(foreign)} of {facts.num_layers} layers of `{name}` ({facts.model_type}) keep a "
            f"state beside keys and values or instead of them, the first is layer {foreign[0]}: "
            f"target `{target}` cannot run them."
        )
        others = [other for other in TARGETS if not _foreign_layers(facts, other)]
        hint = "Choose a backbone with full or sliding-window attention only"
        hint += f", or target `{others[0]}`." if others else "."
        place = spec.position("backbones", name, "source")
        problems.append(problem_at(place, "RM203", message, hint=hint))
    drafts = document.answer.speculation is not None
    with_state = [i for i, layer in enumerate(facts.layers) if layer.states]
    if (
        drafts
        and with_state
        and any(document.agents[a].backbone == name for a in writers(spec.declared))
    ):
        message = (
            f"{len(with_state)} of {facts.num_layers} layers of `{name}` ({facts.model_type}) keep "
            f"a state, the first is layer {with_state[0]}: it does not go back behind a draft that "
            "was wrong."
        )
        hint = "Remove `speculation`, or use another backbone."
        place = spec.position("answer", "speculation")
        problems.append(problem_at(place, "RM121", message, hint=hint))
    prompt = document.build.max_prompt_tokens
    for agent, section in document.agents.items():
        if section.backbone != name:
            continue
        is_answer = agent == document.answer.agent
        answer = document.answer.max_new_tokens if is_answer else 0
        more = max(spec.declared.latent_steps(agent), answer)
        if prompt + more > facts.max_positions:
            what = "new tokens" if answer == more else "latent steps"
            message = (
                f"`{agent}` may need {prompt} prompt tokens and {more} {what}, but its backbone "
                f"`{name}` was made for {facts.max_positions} positions."
            )
            hint = "Lower `build.max_prompt_tokens`, or the number of tokens or steps."
            setting = ("build", "max_prompt_tokens")
            is_written = setting in spec.places.values
            place = spec.position(*(setting if is_written else ("agents", agent)))
            problems.append(problem_at(place, "RM105", message, hint=hint))
    return problems


def _agent(
    spec: Spec, name: str, facts: Mapping[str, BackboneFacts], problems: list[Problem]
) -> Agent | None:
    section, prompts = spec.document.agents[name], spec.declared.prompts[name]
    weights = None
    if not spec.declared.is_remote(name):
        backbone = facts.get(section.backbone)
        if backbone is None:
            return None
        loc: Loc = ("agents", name, "inner")
        weights = _weights(spec, loc, section.inner, "inner", backbone, backbone, problems)
        if weights is None:
            return None
    return Agent(
        name=name,
        backbone=section.backbone,
        latent_steps=spec.declared.latent_steps(name),
        system=prompts.system.parts,
        first=None if prompts.first is None else prompts.first.parts,
        then=prompts.then.parts,
        inner=weights,
        chat_template=dict(section.chat_template),
        where=spec.position("agents", name),
    )


def _link(
    spec: Spec,
    source: str,
    target: str,
    facts: Mapping[str, BackboneFacts],
    problems: list[Problem],
) -> Link | None:
    section = spec.declared.links[source, target]
    agents = spec.document.agents
    read_from, write_to = facts.get(agents[source].backbone), facts.get(agents[target].backbone)
    loc: Loc = ("links", link_name(source, target))
    form, weights = section.form, None
    if form.carries != "text" and (read_from is None or write_to is None):
        return None
    if form.has_vectors:
        assert read_from is not None and write_to is not None, "returned above"  # noqa: PT018
        weights = _weights(spec, loc, section, "outer", read_from, write_to, problems)
        if weights is None:
            return None
    if form.carries == "cache":
        assert read_from is not None, "returned above"
        is_moved = (source, target) in _moved(spec)
        backbone = agents[source].backbone
        problems += _refused_rows(spec, loc, form, backbone, read_from, is_moved=is_moved)
        problems += _refused_layers(spec, loc, section, backbone, read_from)
    return Link(
        source=source,
        target=target,
        feedback=section.feedback,
        weights=weights,
        form=form,
        layer_share=section.layer_share,
        where=spec.position(*loc),
    )


def _moved(spec: Spec) -> set[tuple[str, str]]:
    """Return the ends of links whose rows may land at other positions."""
    links = spec.declared.links.items()
    return set(moved_links((source, target, link.form) for (source, target), link in links))


def _refused_rows(
    spec: Spec,
    loc: Loc,
    form: MessageForm,
    backbone: str,
    facts: BackboneFacts,
    *,
    is_moved: bool,
) -> Iterator[Problem]:
    """Yield why rows of a backbone's cache cannot be handed over."""
    with_state = [i for i, layer in enumerate(facts.layers) if layer.states]
    if with_state:
        message = (
            f"{len(with_state)} of {facts.num_layers} layers of `{backbone}` ({facts.model_type}) "
            f"keep a state, the first is layer {with_state[0]}: what an agent has read cannot be "
            "taken out of it and put before another one's prompt."
        )
        hint = "Let the link carry `context`, `written` or `text`, or use another backbone."
        yield problem_at(spec.position(*loc, "carries"), "RM127", message, hint=hint)
    why = why_rows_stay(facts.model_type) if is_moved and not with_state else None
    if why is not None:
        message = (
            f"the rows that `{loc[1]}` brings land at other positions than they were computed at, "
            f"and those of `{backbone}` cannot be moved: `{facts.model_type}` {why}."
        )
        yield problem_at(spec.position(*loc, "carries"), "RM127", message, hint=ROWS_STAY_HINT)


def _refused_layers(
    spec: Spec, loc: Loc, section: LinkSection, backbone: str, facts: BackboneFacts
) -> Iterator[Problem]:
    """Yield why rows cannot be handed over to these layers of a backbone alone."""
    place, layers = spec.places.value((*loc, "layers")), section.form.layers or ()
    if section.layers in (None, "all"):
        return
    target = spec.document.build.target
    if TARGETS[target].machine_engines is not None:
        message = f"engines of target `{target}` show rows to every layer, not to some."
        hint = "Hand them to all layers (`layers: all`), or use target `onnx`."
        yield problem_at(place, "RM121", message, hint=hint)
    beyond = [layer for layer in layers if layer >= facts.num_layers]
    if beyond:
        message = f"`{backbone}` has layers 0 to {facts.num_layers - 1}, not {beyond[0]}."
        hint = "Name layers that are there, or `all`."
        yield problem_at(place, "RM127", message, hint=hint)
        return
    without = [layer for layer in layers if facts.layers[layer].rows is None]
    if without:
        message = f"layer {without[0]} of `{backbone}` ({facts.model_type}) has no rows of its own."
        hint = "Name layers that have, or `all`."
        yield problem_at(place, "RM127", message, hint=hint)


def _weights(
    spec: Spec,
    loc: Loc,
    section: WeightsSection,
    role: LinkRole,
    source: BackboneFacts,
    target: BackboneFacts,
    problems: list[Problem],
) -> LinkWeights | None:
    """Return where a link's weights come from, or None after saying why its file does not fit."""
    weights = partial(LinkWeights, in_dim=source.width, out_dim=target.width)
    if section.weights is None:
        assert section.kind is not None, "the schema fills in the kind"
        assert section.init is not None, "the schema fills in the start"
        return weights(kind=section.kind, init=section.init, file=None)
    file = path_of(section.weights, spec.base_dir)
    try:
        kind = fitting_kind(
            read_link_header(file),
            role,
            kind=section.kind,
            source=end_of(source),
            target=end_of(target),
        )
    except LinkFileError as error:
        message = f"the link file `{section.weights}` cannot be used here: {error}."
        relative = "Correct the path, which is relative to the spec."
        hint = error.hint if is_file(file) else relative
        place = spec.position(*loc, "weights")
        problems.append(problem_at(place, "RM120", message, hint=hint))
        return None
    return weights(kind=kind, init=section.init or "random", file=str(file))


def _search_corpus(spec: Spec) -> Path | None:
    """Return the absolute path of the passages to search, if there are any."""
    tools = spec.document.answer.tools
    if tools is None or tools.search is None or tools.search.corpus is None:
        return None
    return path_of(tools.search.corpus, spec.base_dir)


def _loss_text(spec: Spec) -> Path | None:
    """Return the absolute path of the text to measure losses over, if there is one."""
    name = spec.document.build.loss_text
    return None if name is None else path_of(name, spec.base_dir)


def _missing_files(spec: Spec) -> Iterator[Problem]:
    corpus, text = _search_corpus(spec), _loss_text(spec)
    if corpus is not None and not is_file(corpus) and not is_folder(corpus):
        place = spec.position("answer", "tools", "search", "corpus")
        message = f"the search corpus `{corpus}` is not there."
        hint = "Give a file of JSON lines or a folder, relative to the spec."
        yield problem_at(place, "RM123", message, hint=hint)
    if text is not None and not is_file(text):
        message = f"the text `{text}` is not there."
        hint = "Give a text file, relative to the spec, or leave `loss_text` out."
        yield problem_at(spec.position("build", "loss_text"), "RM126", message, hint=hint)


def _tools(section: ToolsSection | None) -> ToolsPlan | None:
    if section is None:
        return None
    search = None
    if section.search is not None:
        is_local = section.search.backend is None
        search = SearchPlan(
            backend=section.search.backend or "local",
            corpus=SEARCH_CORPUS if is_local else None,
            top_k=section.search.top_k,
        )
    return ToolsPlan(
        search=search,
        python=None if section.python is None else PythonPlan(**section.python.model_dump()),
        **section.model_dump(exclude={"search", "python"}),
    )


def _serve(section: ServeSection | None, agents: Iterable[Agent]) -> ServePlan | None:
    if section is None:
        return None
    fields = section.taken
    if "last_user" not in fields.values():
        fields = {usual_question(prompt_fields(agents)): "last_user", **fields}
    return ServePlan(fields=fields, history=section.history)


def _speculation(section: SpeculationSection | None) -> SpeculationPlan | None:
    return None if section is None else SpeculationPlan(**section.model_dump())


def _system(
    spec: Spec,
    facts: Mapping[str, BackboneFacts],
    templates: Mapping[str, str],
    agents: dict[str, Agent],
    links: dict[str, Link],
) -> System:
    document = spec.document
    answer, build = document.answer, document.build
    corpus, loss_text = _search_corpus(spec), _loss_text(spec)
    return System(
        name=document.name,
        rounds=document.rounds,
        answer_agent=answer.agent,
        sampling=SamplingPlan(
            **answer.model_dump(exclude={"agent", "speculation", "stop_when", "tools"})
        ),
        build=BuildOptions(**build.model_dump(exclude={"loss_text"})),
        backbones={
            name: Backbone(
                name=name,
                facts=facts[name],
                dtype=section.dtype,
                precision=section.precision or build.precision,
                device=section.device or AUTO,
                shared_as=name,
                template=templates.get(name),
                where=spec.position("backbones", name),
            )
            for name, section in document.backbones.items()
            if name in facts
        },
        remotes={
            name: Remote(
                name=name, entry=section.remote, where=spec.position("backbones", name, "source")
            )
            for name, section in document.backbones.items()
            if section.is_remote
        },
        agents=agents,
        links=links,
        stop_when=None if answer.stop_when is None else StopPlan(cosine=answer.stop_when.cosine),
        speculation=_speculation(answer.speculation),
        tools=_tools(answer.tools),
        serve=_serve(document.serve, agents.values()),
        date=document.date,
        search_corpus=None if corpus is None else str(corpus),
        loss_text=None if loss_text is None else str(loss_text),
    )
