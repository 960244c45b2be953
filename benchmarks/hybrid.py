"""Steps and prompts of a random model of the shape of Qwen3.5-0.8B, in float32 and int4.

    python benchmarks/hybrid.py OUT [--layers 24] [--vocabulary 248320] [--used 256] [--repeats 5]
        [--engine onnx]

Makes the model in OUT, three layers of gated DeltaNet to one of attention, with SmolLM2's
tokenizer, and a bundle of one agent in both precisions, unless they are there; then runs `recmasc
bench engines` on both. With `--layers 4 --vocabulary 49152 --engine onnx,naive` that is one such
block beside transformers' own form of it: `naive` reads a prompt, without the head, through it.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from experts import PRECISIONS, call
from snapshots import write_model

SPEC = """
recmas: 1
name: hybrid
rounds: 1
latent_steps: 8
backbones: {deltas: {source: "MODEL"}}
agents:
  thinker: {backbone: deltas, prompt: "{{ question }}", inner: {init: random}}
  writer: {backbone: deltas, prompt: "{{ question }} {{ latent.thinker }}", inner: {init: random}}
links:
  thinker -> writer: {init: random}
build: {max_prompt_tokens: 512}
answer: {agent: writer, max_new_tokens: 32}
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("out", type=Path)
    for name, usual in (("layers", 24), ("vocabulary", 248320), ("used", 256), ("repeats", 5)):
        parser.add_argument(f"--{name}", type=int, default=usual)
    parser.add_argument("--engine", default="onnx")
    arguments = parser.parse_args()
    out: Path = arguments.out
    form = f"{arguments.layers}-{arguments.vocabulary}"
    model, spec = out / f"model-{form}", out / f"spec-{form}.yaml"
    bundles = [out / f"{precision}-{form}" for precision in PRECISIONS]
    if not model.exists():
        out.mkdir(parents=True, exist_ok=True)
        write_model(model, arguments.layers, arguments.vocabulary)
    spec.write_text(SPEC.replace("MODEL", str(model.resolve())), encoding="utf-8")
    for bundle, precision in zip(bundles, PRECISIONS, strict=True):
        if not bundle.exists():
            call("build", str(spec), "-o", str(bundle), "--precision", precision)
    shape = ("--used", str(arguments.used), "--repeats", str(arguments.repeats))
    engines = [word for name in arguments.engine.split(",") for word in ("--engine", name)]
    call(
        *("bench", "engines", str(bundles[0]), "--bundle", str(bundles[1])),
        *(*shape, *engines, "--out", str(out / f"engines-{form}")),
    )


if __name__ == "__main__":
    main()
