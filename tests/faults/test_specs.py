"""Mutated specs: every command that reads one refuses it by a code, or takes it whole."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from random import Random

import pytest

from faults.cases import Case, parts, try_cases
from faults.mutators import other_yaml
from faults.outcome import Outcome, forked, judge
from kit.specs import CHAIN, HETEROGENEOUS, INTERLOCKED, LOOP, MIXTURE, PAIR, SEQUENTIAL, TWINS
from kit.training import SPEC as TRAINED
from recmas_cli.main import main

PRESETS = """\
recmas: 1
name: presets
rounds: 2
latent_steps: 4
pattern: {deliberation: {reflector: thinker, caller: speaker}, task: search}
backbones:
  tiny: {source: llama, dtype: float32, precision: int8}
answer: {stop: ["</s>", "\\n\\n"], temperature: 0.7, top_p: 0.9, top_k: 4, seed: 3}
build: {target: onnx, max_prompt_tokens: 384, max_batch: 2}
"""
SPECS = (
    PAIR,
    CHAIN,
    SEQUENTIAL,
    MIXTURE,
    LOOP,
    HETEROGENEOUS,
    INTERLOCKED,
    TWINS,
    TRAINED,
    PRESETS,
)
OTHER_COMMANDS = ("explain", "plan", "graph", "ir")
ODD_SETTINGS = (
    "rounds=0", "rounds", "=", "", "a=b", "agents.planner.prompt=x", "name=\x1b[31m", "rounds=[",
    "rounds=999999999999999999999", "answer={", "answer.stop=[\ud800]", "links=~", "a.b.c.d.e=1",
    "answer.temperature=nan", "backbones.tiny.source=/dev/zero", "build.max_batch=1e9",
)  # fmt: skip


@pytest.fixture(scope="session")
def place(backbones: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the backbones that the specs name, and odd things that specs may name."""
    root = tmp_path_factory.mktemp("specs")
    for family in ("llama", "qwen2", "qwen3", "gemma3"):
        (root / family).symlink_to(backbones / family)
    (root / "small").symlink_to(backbones / "llama")
    (root / "models").mkdir()
    (root / "models/small").symlink_to(backbones / "llama")
    (root / "models/other").symlink_to(backbones / "gemma3")
    odd = root / "odd"
    odd.mkdir()
    (odd / "empty").touch()
    (odd / "folder").mkdir()
    os.mkfifo(odd / "pipe")
    (odd / "circle").symlink_to(odd / "circle")
    (odd / "zero").symlink_to("/dev/zero")
    (odd / "binary").write_bytes(bytes(range(256)) * 20)
    (odd / "[red]").mkdir()
    (odd / "line\nbreak").write_text("x")
    (odd / "half.safetensors").write_bytes((b"\x40" + bytes(7)) + b'{"a":')
    (odd / os.fsdecode(b"latin\xe9")).write_text("x")
    return root


ODD_PATHS = (
    "odd/empty", "odd/folder", "odd/pipe", "odd/circle", "odd/zero", "odd/binary", "odd/[red]",
    "odd/half.safetensors", "odd/line\\nbreak", "odd/nothing", "odd/empty/below", "/dev/stdin",
    "/dev/full", "/proc/self/mem", "/proc/self/environ", "~nobody/x", "~", ".", "..", "/", "",
    "hf:nobody/nothing", "hf:", "hf:a/b/c@d", "http://127.0.0.1:1/x", "file:///etc/passwd",
    "odd/" + "n" * 300, "odd/" + "p/" * 3000, "$HOME", "odd/\\e[31m", "odd/\\udce9", "odd/\\0",
    "spec.yaml", "llama/model.safetensors", "llama/tokenizer.json", "\\u202e",
)  # fmt: skip


def with_odd_path(random: Random, text: str) -> str:
    """Let something in a spec lie at an odd place."""
    path = random.choice(ODD_PATHS)
    match random.randrange(5):
        case 0:
            head, key, rest = text.partition("source: ")
            end = min((i for i in map(rest.find, ",}\n") if i >= 0), default=0)
            return f'{head}{key}"{path}"{rest[end:]}'
        case 1:
            return text.replace("{init: random}", f'{{weights: "{path}"}}', 1)
        case 2:
            return text.replace("data: train.jsonl", f'data: "{path}"')
        case 3:
            return text.replace("build: {", f'build: {{measure_over: "{path}", ', 1)
        case _:
            return text.replace("answer: {", f'answer: {{tools: {{search: {{corpus: "{path}"}}}}, ')


def attempt(case: Case, place: Path) -> Iterator[str]:
    random = case.random
    text = random.choice(SPECS)
    if random.random() < 0.12:
        raw = with_odd_path(random, text).encode("utf-8", errors="surrogatepass")
    else:
        raw = other_yaml(random, text.encode())
    name = random.choice(["spec.yaml"] * 6 + ["s p.yaml", "[b].yaml", "\x1b[31m.yaml", "-x.yaml"])
    path = place / f"{case.number}-{name}"
    path.write_bytes(raw)
    settings = []
    if random.random() < 0.1:
        settings = ["--set", random.choice(ODD_SETTINGS)]
    json = ["--json"] if random.random() < 0.2 else []

    def run(command: str) -> Outcome:
        arguments = [command, str(path), *settings, *json]
        return forked(lambda: main(arguments), on_terminal=case.number % 5 == 0)

    try:
        checked = run("check")
        yield from shown(checked, judge(checked, data_on_stdout=bool(json)), raw)
        if checked.status == 0:
            command = random.choice(OTHER_COMMANDS)
            other = run(command)
            faults = judge(other, data_on_stdout=bool(json))
            if other.status != 0:
                faults.append(f"`{command}` refuses what `check` takes")
            yield from shown(other, faults, raw)
    finally:
        path.unlink()


def shown(outcome: Outcome, faults: list[str], raw: bytes) -> Iterator[str]:
    """Yield faults with what was given and printed."""
    if faults:
        yield "; ".join(faults)
        yield f"given: {raw[-1500:]!r}"
        yield f"printed: {outcome.text[-1500:]!r}"


@parts
def test_mutated_specs(part: int, place: Path) -> None:
    try_cases("specs", 2000, part, lambda case: attempt(case, place))
