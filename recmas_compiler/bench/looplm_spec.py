"""The answer agent of a system as a looped language model: a spec that `recmasc train` takes."""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Final

from recmas_compiler.ir.graph import Graph
from recmas_compiler.ir.ops import Think
from recmas_compiler.spec.document.places import path_of
from recmas_compiler.spec.document.yaml_source import write_yaml
from recmas_compiler.spec.spec import Spec
from recmas_runtime.core.errors import fail
from recmas_runtime.formats.ids import link_name
from recmas_runtime.formats.plan import MAX_LATENT_STEPS, PromptPart
from recmas_runtime.running.baselines import without_slots

_MARK: Final = re.compile(r"\{\{|\{%|\{#")
# Of a backbone's source: what is no path.
_NAMED: Final = ("builtin:", "hf:")
_GGUF: Final = "gguf:"
# What the outer stage keeps of the system's own settings; others name its links.
_KEPT: Final = ("steps", "lr", "batch_size")


def total_latent_steps(program: Graph) -> int:
    """Return the latent steps of all agents in all rounds."""
    agents = program.system.agents
    thinking = (op for _, op in program.in_order() if isinstance(op, Think))
    return sum(agents[name].latent_steps for op in thinking for name in op.agents)


def looplm_spec(spec: Spec, program: Graph, *, links_dir: Path) -> str:
    """Return a spec of the answer agent alone, which reads its own thoughts in a second round.

    In the first it makes as many latent steps as all agents of the system in all rounds. Paths are
    absolute, so that the spec may lie anywhere.

    Args:
        program: The system's own, after all passes.
        links_dir: Where its trained links go.

    Raises:
        RecmasError: RM508 if the system makes no latent steps, or more than an agent may.
    """
    steps = total_latent_steps(program)
    if not 1 <= steps <= MAX_LATENT_STEPS:
        message = f"looplm: the system takes {steps} latent steps, not 1 to {MAX_LATENT_STEPS}"
        raise fail("RM508", message, hint="Leave looplm out.")
    system = program.system
    name = system.answer_agent
    document: dict[str, Any] = spec.document.model_dump(exclude_none=True)
    base = spec.base_dir
    own: dict[str, Any] = document["agents"][name]
    parts = system.agents[name].then
    asked = _template(without_slots(parts))
    if not asked:
        message = f"looplm: the prompt of `{name}` is a message and nothing else"
        raise fail("RM508", message, hint="Leave looplm out, or give it a text.")
    own["prompt"] = {"first": asked, "then": f"{asked}\n\n{{{{ latent.{name} }}}}"}
    own["latent_steps"] = steps
    if "weights" in own["inner"]:
        own["inner"]["weights"] = str(path_of(own["inner"]["weights"], base))
    backbone = document["backbones"][own["backbone"]]
    backbone["source"] = _absolute_source(backbone["source"], base)
    if backbone.get("template", "none") != "none":
        backbone["template"] = str(path_of(backbone["template"], base))
    train: dict[str, Any] = document["train"]
    train["data"] = str(path_of(train["data"], base))
    if isinstance(train["held_out"], str):
        train["held_out"] = str(path_of(train["held_out"], base))
    train["links_dir"] = str(links_dir.absolute())
    train["targets"] = {name: train["targets"][name]}
    outer = {key: train["outer"][key] for key in _KEPT}
    train["outer"] = {**outer, "mode": "rollout"}
    answer = {k: v for k, v in document["answer"].items() if k not in ("stop_when", "tools")}
    build = {k: v for k, v in document["build"].items() if k != "loss_text"}
    date = {"date": document["date"]} if "date" in document else {}
    return write_yaml(
        {
            "recmas": document["recmas"],
            **date,
            "name": f"{document['name']}-looplm"[:64],
            "rounds": 2,
            "backbones": {own["backbone"]: backbone},
            "agents": {name: own},
            "links": {link_name(name, name): {"feedback": True}},
            "answer": answer,
            "build": build,
            "train": train,
        }
    )


def _absolute_source(source: str, base: Path) -> str:
    if source.startswith(_NAMED):
        return source
    if source.startswith(_GGUF):
        return f"{_GGUF}{path_of(source.removeprefix(_GGUF), base)}"
    return str(path_of(source, base))


def _template(parts: Iterable[PromptPart]) -> str:
    """Return the parts of a prompt as a spec writes them."""
    return "".join(
        f"{{{{ {part.value} }}}}" if part.kind == "field" else _text(part.value) for part in parts
    ).strip()


def _text(text: str) -> str:
    return f"{{% raw %}}{text}{{% endraw %}}" if _MARK.search(text) else text
