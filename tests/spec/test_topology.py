"""From specs to topologies: accepted graphs, link files, and what only the backbones tell."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import get_args

import numpy as np
import pytest
from safetensors.numpy import save_file

from kit.specs import CHAIN, PAIR, write_config
from recmas_compiler.ir.build_topology import build_topology
from recmas_compiler.ir.graph import Graph
from recmas_compiler.ir.ops import Agent, Level, Link
from recmas_compiler.ir.printer import print_graph
from recmas_compiler.ir.verify import verify
from recmas_compiler.spec.spec import parse_spec
from recmas_runtime.core.errors import Exit, RecmasError
from recmas_runtime.formats.link_kinds import FORMS, LinkKind, LinkRole
from recmas_runtime.formats.plan import PromptPart, SamplingPlan


def topology(text: str, folder: Path) -> Graph:
    """Build with the backbones `small` (width 32) and `big` (width 48) at hand."""
    write_config(folder / "small")
    write_config(folder / "big", hidden_size=48)
    graph = build_topology(parse_spec(text, base_dir=folder, file="spec.yaml"))
    verify(graph, at="in a test")
    return graph


def graph_spec(agents: dict[str, tuple[str, ...]], links: str, *, answer: str) -> str:
    """Write a spec: slots by agent (`~` for those fed by feedback), links as `a>b c~>d`."""
    lines = ["recmas: 1", "name: graph", "rounds: 3", "backbones:", "  small: {source: small}"]
    lines += ["agents:"]
    for name, slots in agents.items():
        now = " ".join(f"{{{{ latent.{slot} }}}}" for slot in slots if not slot.startswith("~"))
        later = " ".join(f"{{{{ latent.{slot.lstrip('~')} }}}}" for slot in slots)
        lines += [f"  {name}:", "    backbone: small", "    prompt:"]
        if any(slot.startswith("~") for slot in slots):
            lines += [f'      first: "{{{{ question }}}} {now}"']
        lines += [f'      then: "{{{{ question }}}} {later}"']
    lines += ["links:"]
    for link in links.split():
        source, target = link.replace("~", "").split(">")
        lines += [f"  {source} -> {target}: {{feedback: {'true' if '~' in link else 'false'}}}"]
    return "\n".join([*lines, f"answer: {{agent: {answer}}}", ""])


GRAPHS = {
    "diamond": graph_spec(
        {"top": (), "left": ("top",), "right": ("top",), "end": ("left", "right")},
        "top>left top>right left>end right>end",
        answer="end",
    ),
    "self_loop": graph_spec({"a": ("~a",)}, "a~>a", answer="a"),
    "interlocked_cycles": graph_spec(
        {"a": ("~c",), "b": ("a", "~d"), "c": ("b",), "d": ("c",)},
        "a>b b>c c>d c~>a d~>b",
        answer="d",
    ),
    "answer_in_the_middle": graph_spec(
        {"a": ("~c",), "b": ("a",), "c": ("b",)}, "a>b b>c c~>a", answer="b"
    ),
    "alone": graph_spec({"a": ()}, "", answer="a").replace("links:\n", ""),
    "two_ways_between_two": graph_spec({"a": ("~b",), "b": ("a",)}, "a>b b~>a", answer="b"),
    "feedback_forward": graph_spec({"a": (), "b": ("~a",)}, "a~>b", answer="b"),
}


@pytest.mark.parametrize("name", GRAPHS)
def test_accepted_graphs(name: str, tmp_path: Path, golden: Callable[..., None]) -> None:
    graph = topology(GRAPHS[name], tmp_path)
    assert graph.level == Level.TOPOLOGY
    golden(f"{print_graph(graph)}\n".replace(str(tmp_path), "TMP"))


def test_payloads(tmp_path: Path) -> None:
    text = PAIR.replace("answer: {agent: solver}", "answer: {agent: solver, seed: 3, stop: [x]}")
    text = text.replace(
        "  solver:\n", "  solver:\n    latent_steps: 4\n    system: Be {{ kind }}.\n"
    )
    text = text.replace(
        "prompt: Solve", "chat_template: {enable_thinking: true}\n    prompt: Solve"
    )
    graph = topology(text, tmp_path)
    solver = graph.op("solver")
    assert isinstance(solver, Agent)
    assert solver.latent_steps == 4
    assert solver.chat_template == {"enable_thinking": True}
    assert solver.system == (
        PromptPart(kind="text", value="Be "),
        PromptPart(kind="field", value="kind"),
        PromptPart(kind="text", value="."),
    )
    assert solver.first is None
    assert solver.slots("then") == ("planner",)
    assert str(solver.where) == "spec.yaml:12:3"
    link = graph.edge("solver", "planner")
    assert isinstance(link, Link)
    assert link.feedback
    assert (link.weights.kind, link.weights.init, link.weights.file) == (
        "projected",
        "aligned",
        None,
    )
    assert graph.system.sampling == SamplingPlan(seed=3, stop=("x",))
    assert graph.system.backbones["small"].facts.width == 32


def test_widths_follow_the_backbones(tmp_path: Path) -> None:
    text = PAIR.replace(
        "  small: {source: ./small}", "  small: {source: small}\n  big: {source: big}"
    )
    text = text.replace("  solver:\n    backbone: small", "  solver:\n    backbone: big")
    links = topology(text, tmp_path).system.links
    forward, back = links["planner->solver"].weights, links["solver->planner"].weights
    assert (forward.in_dim, forward.out_dim) == (32, 48)
    assert (back.in_dim, back.out_dim) == (48, 32)


def write_link(
    path: Path,
    kind: LinkKind,
    role: LinkRole,
    *,
    in_dim: int = 32,
    out_dim: int = 32,
    without: str = "",
    dtype: type = np.float32,
    says: dict[str, str] | None = None,
) -> None:
    shapes = FORMS[kind, role].shapes(in_dim, out_dim)
    tensors = {n: np.zeros(shape, dtype) for n, shape in shapes.items() if n != without}
    path.parent.mkdir(exist_ok=True)
    save_file(tensors, path, metadata=says)


WITH_FILE = PAIR.replace(
    "planner -> solver: {}", "planner -> solver: {weights: links/a.safetensors}"
)


@pytest.mark.parametrize("kind", get_args(LinkKind))
@pytest.mark.parametrize("said", [True, False])
def test_link_files(kind: LinkKind, said: bool, tmp_path: Path) -> None:
    says = {"kind": kind, "in_dim": "32", "out_dim": "32"} if said else None
    write_link(tmp_path / "links/a.safetensors", kind, "outer", says=says)
    weights = topology(WITH_FILE, tmp_path).system.links["planner->solver"].weights
    assert (weights.kind, weights.file) == (kind, str(tmp_path / "links/a.safetensors"))
    write_link(tmp_path / "links/i.safetensors", kind, "inner", says=says)
    inner = PAIR.replace("  solver:\n", "  solver:\n    inner: {weights: links/i.safetensors}\n")
    assert topology(inner, tmp_path).system.agents["solver"].inner.kind == kind


def test_a_residual_link_file_may_have_biases(tmp_path: Path) -> None:
    write_link(tmp_path / "links/i.safetensors", "biased_residual", "inner")
    inner = "    inner: {kind: residual, weights: links/i.safetensors}\n"
    system = topology(PAIR.replace("  solver:\n", f"  solver:\n{inner}"), tmp_path).system
    assert system.agents["solver"].inner.kind == "biased_residual"


def test_link_file_for_these_backbones(tmp_path: Path) -> None:
    identity = str((tmp_path / "small").resolve())
    path = tmp_path / "links/a.safetensors"
    write_link(path, "projected", "outer", says={"source": identity, "target": identity})
    assert topology(WITH_FILE, tmp_path).system.links["planner->solver"].weights.file == str(path)


def says(**metadata: str) -> Callable[[Path], None]:
    return lambda path: write_link(path, "projected", "outer", says=metadata)


def holds(content: bytes) -> Callable[[Path], None]:
    def write(path: Path) -> None:
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(content)

    return write


def header(content: object) -> bytes:
    body = json.dumps(content).encode()
    return len(body).to_bytes(8, "little") + body


def cut(path: Path) -> None:
    write_link(path, "projected", "outer")
    path.write_bytes(path.read_bytes()[:-100])


MISFITS: dict[str, Callable[[Path], None]] = {
    "missing": lambda path: None,
    "folder": lambda path: path.mkdir(parents=True),
    "narrow": lambda path: write_link(path, "projected", "outer", in_dim=16),
    "says_another_width": says(out_dim="48"),
    "inner_as_outer": lambda path: write_link(path, "projected", "inner"),
    "tensor_missing": lambda path: write_link(path, "projected", "outer", without="proj2.bias"),
    "unknown_kind": says(kind="linear"),
    "another_kind": says(kind="residual"),
    "integers": lambda path: write_link(path, "projected", "outer", dtype=np.int8),
    "another_source": says(source="hf:a/b@c"),
    "another_target": says(target="hf:a/b@c"),
    "not_safetensors": holds(b"PK\x03\x04 a zip file, say"),
    "empty": holds(b""),
    "huge_header": holds(b"\xff" * 64),
    "no_json": holds((5).to_bytes(8, "little") + b"[1, 2"),
    "list": holds((2).to_bytes(8, "little") + b"[]"),
    "deep_json": holds((99_999).to_bytes(8, "little") + b"[" * 99_999),
    "odd_shape": holds(header({"proj1.weight": {"dtype": "F32", "shape": "x"}})),
    "no_entries": holds(header({"proj1.weight": 3})),
    "cut_off": cut,
}


def test_link_files_that_do_not_fit(tmp_path: Path, golden: Callable[..., None]) -> None:
    said = []
    for name, prepare in MISFITS.items():
        folder = tmp_path / name
        folder.mkdir()
        prepare(folder / "links/a.safetensors")
        with pytest.raises(RecmasError) as refused:
            topology(WITH_FILE, folder)
        assert refused.value.exit_code == Exit.SPEC_INVALID
        said.append(f"{name}:\n{refused.value}\n".replace(str(folder), "TMP"))
    golden("".join(said))


def test_odd_link_paths(tmp_path: Path) -> None:
    for name in ("x" * 300, "~nobody-of-this-name/x", "/", "."):
        with pytest.raises(RecmasError, match="RM120"):
            topology(WITH_FILE.replace("links/a.safetensors", f'"{name}"'), tmp_path)


def test_kind_of_file_and_spec_differ(tmp_path: Path) -> None:
    write_link(tmp_path / "links/a.safetensors", "residual", "outer")
    text = WITH_FILE.replace("{weights", "{kind: projected, weights")
    with pytest.raises(RecmasError, match=r":16:49: error\[RM120\].*of kind `residual`, not"):
        topology(text, tmp_path)


def test_everything_about_backbones_at_once(tmp_path: Path, golden: Callable[..., None]) -> None:
    write_config(
        tmp_path / "hybrid",
        model_type="qwen3_5_text",
        architectures=["Qwen3_5ForCausalLM"],
        num_hidden_layers=4,
    )
    write_config(tmp_path / "short", max_position_embeddings=600)
    text = PAIR.replace(
        "  small: {source: ./small}",
        "  small: {source: ./hybrid}\n  short: {source: short}\n  gone: {source: org/model}",
    )
    text = text.replace("  solver:\n    backbone: small", "  solver:\n    backbone: short")
    text = text.replace(
        "links:\n",
        '  third: {backbone: gone, prompt: "{{ question }}"}\nlinks:\n  third -> solver: {}\n',
    ).replace("with {{", "{{ latent.third }} with {{")
    text += "build: {target: tensorrt}\n"
    with pytest.raises(RecmasError) as refused:
        topology(text, tmp_path)
    golden(f"{refused.value}\n".replace(str(tmp_path), "TMP"))


def test_a_pattern_builds(tmp_path: Path) -> None:
    graph = topology(CHAIN, tmp_path)
    assert graph.without_feedback().order() == ["planner", "critic", "solver"]


def test_messages_of_all_rounds_are_bounded() -> None:
    """Every agent hears every other: links times rounds is what compiling takes time for."""
    agents = [f"a{number}" for number in range(17)]
    lines = ["recmas: 1", "name: all", "rounds: 61", "backbones: {small: {source: ./small}}"]
    lines += ["agents:"]
    for agent in agents:
        slots = " ".join(f"{{{{ latent.{other} }}}}" for other in agents if other != agent)
        prompt = f'{{first: "{{{{ question }}}}", then: "{slots}"}}'
        lines.append(f"  {agent}: {{backbone: small, prompt: {prompt}}}")
    lines += ["links:"]
    pairs = [(one, other) for one in agents for other in agents if one != other]
    lines += [f"  {one} -> {other}: {{feedback: true}}" for one, other in pairs]
    lines += ["answer: {agent: a0}"]
    text = "\n".join(lines)
    with pytest.raises(RecmasError) as refused:
        parse_spec(text, file="spec.yaml")
    (problem,) = refused.value.problems
    assert str(problem) == (
        "spec.yaml:3:9: error[RM105]: 272 links in 61 rounds are 16592 messages, more than 16384. "
        "Lower `rounds`, or remove links."
    )
    assert parse_spec(text.replace("rounds: 61", "rounds: 60")).document.rounds == 60


TWO_READERS = """\
recmas: 1
name: readers
backbones:
  small: {source: small}
agents:
  left: {backbone: small, prompt: "Read {{ question }}"}
  right: {backbone: small, prompt: "Read {{ question }} aloud"}
  solver: {backbone: small, prompt: "{{ latent.left }}{{ latent.right }}Answer"}
links:
  left -> solver: {carries: cache}
  right -> solver: {carries: cache}
answer: {agent: solver}
"""


@pytest.mark.parametrize(
    ("model_type", "why"),
    [
        ("gpt2", "`gpt2` adds positions to its input vectors"),
        ("hunyuan_v1_dense", "`hunyuan_v1_dense` norms its keys after turning them"),
    ],
)
def test_rows_that_cannot_be_moved_are_refused(model_type: str, why: str, tmp_path: Path) -> None:
    write_config(tmp_path / "small", model_type=model_type)
    with pytest.raises(RecmasError) as caught:
        build_topology(parse_spec(TWO_READERS, base_dir=tmp_path, file="spec.yaml"))
    problems = caught.value.problems
    assert [(problem.code, problem.line) for problem in problems] == [("RM127", 10), ("RM127", 11)]
    assert problems[1].message.startswith("the rows that `right -> solver` brings land at other")
    assert why in problems[1].message


def test_rows_that_stay_where_they_are_need_not_be_moved(tmp_path: Path) -> None:
    write_config(tmp_path / "small", model_type="gpt2")
    text = TWO_READERS.replace("right -> solver: {carries: cache}", "right -> solver: {}")
    graph = build_topology(parse_spec(text, base_dir=tmp_path))
    assert graph.system.moved_links == ()


def test_rows_of_two_senders_are_moved(tmp_path: Path) -> None:
    graph = topology(TWO_READERS, tmp_path)
    assert graph.system.moved_links == ("left->solver", "right->solver")


TO_SOME_LAYERS = """\
recmas: 1
name: some
rounds: 1
backbones: {b: {source: small}}
agents:
  reader: {backbone: b, prompt: "{{ question }}"}
  solver: {backbone: b, prompt: "{{ latent.reader }} {{ question }}"}
links:
  reader -> solver: {carries: cache, layers: LAYERS}
answer: {agent: solver}
build: {target: TARGET}
"""


def to_layers(layers: str, folder: Path, *, target: str = "onnx") -> Link:
    text = TO_SOME_LAYERS.replace("LAYERS", layers).replace("TARGET", target)
    return topology(text, folder).system.links["reader->solver"]


def test_layers_get_rows_by_name_or_as_a_share(tmp_path: Path) -> None:
    for layers, named, share in (("all", None, None), ("[1]", (1,), None), ("0.5", None, 0.5)):
        link = to_layers(layers, tmp_path)
        assert (link.form.layers, link.layer_share) == (named, share)


@pytest.mark.parametrize(
    ("layers", "target", "code", "message"),
    [
        ("[0, 9]", "onnx", "RM127", "`b` has layers 0 to 1, not 9."),
        ("[0]", "tensorrt", "RM121", "engines of target `tensorrt` show rows to every layer"),
        ("0.5", "tensorrt", "RM121", "engines of target `tensorrt` show rows to every layer"),
        ("1.0", "onnx", "RM105", "`links.reader -> solver.layers` should be less than 1"),
        ("0", "onnx", "RM105", "`links.reader -> solver.layers` should be more than 0"),
        ("true", "onnx", "RM105", "`links.reader -> solver.layers` should be a list"),
        ("most", "onnx", "RM105", "`links.reader -> solver.layers` should be 'all'"),
        ("[2, 2]", "onnx", "RM127", "`layers` names a layer twice."),
    ],
)
def test_layers_that_cannot_have_rows_are_refused(
    layers: str, target: str, code: str, message: str, tmp_path: Path
) -> None:
    with pytest.raises(RecmasError) as caught:
        to_layers(layers, tmp_path, target=target)
    (problem,) = caught.value.problems
    assert (problem.code, problem.line, problem.column) == (code, 9, 46)
    assert problem.message.startswith(message)
