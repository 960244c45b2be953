"""A training step beside another checkout's: seconds, memory, and whether losses are the same.

    python benchmarks/training_step.py OUT --data RECORDS.jsonl [--spec SPEC] [--beside CHECKOUT]
        [--dtype float32,bfloat16] [--steps 4] [--set train.compile=true]

Each form runs in a process of its own and takes its turn step by step, on the same records, from
the same links, which the first process makes in closed form and OUT keeps. RECORDS.jsonl has what
the spec's prompts show (`context`, `question`, `answer`: docs/data.md says how SQuAD is read); the
longest records are left out (--max-characters). CHECKOUT is a folder with another version of
recmas; its code runs under this interpreter. The first step of each form warms up and is shown
apart: packing and compiling are in it.

With --profile nothing is compared: where one step's time goes, and the positions that it runs.

Writes OUT/training_step.json and prints a table.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from collections import Counter
from dataclasses import replace
from pathlib import Path
from statistics import median
from typing import Any

SPEC = Path(__file__).parent / "specs" / "split_rounds.yaml"
ROOT = Path(__file__).parents[1]
NUM_RECORDS = 64
LINKS = "links.safetensors"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("out", type=Path)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--spec", type=Path, default=SPEC)
    parser.add_argument("--beside", type=Path, help="another checkout, the old form")
    parser.add_argument("--dtype", default="float32,bfloat16")
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--max-characters", type=int, default=700)
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--set", action="append", default=[], dest="overrides", metavar="K=V")
    parser.add_argument("--profile", action="store_true")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.worker:
        work(json.loads(arguments.worker))
        return
    out: Path = arguments.out.resolve()
    out.mkdir(parents=True, exist_ok=True)
    lines = arguments.data.read_text().splitlines()
    short = [line for line in lines if len(line) <= arguments.max_characters][:NUM_RECORDS]
    (out / "train.jsonl").write_text("".join(f"{line}\n" for line in short))
    (out / "spec.yaml").write_text(arguments.spec.read_text())
    asked = {"out": str(out), "threads": arguments.threads}
    if arguments.profile:
        dtype = arguments.dtype.split(",")[0]
        worker = Worker(ROOT, {**asked, "dtype": dtype, "overrides": arguments.overrides})
        print(worker.ask("profile"))
        worker.close()
        return
    if not (out / LINKS).exists():  # in a process of its own, whose memory is not measured
        Worker(ROOT, {**asked, "dtype": "float32", "overrides": []}).close()
    found = {}
    for dtype in arguments.dtype.split(","):
        forms = {"new": Worker(ROOT, {**asked, "dtype": dtype, "overrides": arguments.overrides})}
        if arguments.beside:
            forms["old"] = Worker(arguments.beside, {**asked, "dtype": dtype, "overrides": []})
        steps: dict[str, list[dict[str, float]]] = {name: [] for name in forms}
        for number in range(arguments.steps + 1):
            for name, worker in forms.items():
                steps[name].append(worker.ask(str(number)))
                print(dtype, number, name, steps[name][-1], file=sys.stderr, flush=True)
        found[dtype] = steps
        for worker in forms.values():
            worker.close()
    (out / "training_step.json").write_text(json.dumps(found, indent=1) + "\n")
    print(report(found, threads=arguments.threads))


class Worker:
    """A checkout's code in a process of its own, which does a step when it is asked to."""

    def __init__(self, checkout: Path, request: dict[str, Any]) -> None:
        root = checkout.resolve()
        paths = [root, root / "runtime", root / "export"]
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(map(str, paths))}
        command = [sys.executable, __file__, ".", "--data", ".", "--worker", json.dumps(request)]
        self._process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=environment, text=True
        )
        self.ask("ready")

    def ask(self, what: str) -> Any:
        """Return the answer to one line."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(what + "\n")
        self._process.stdin.flush()
        answer = self._process.stdout.readline()
        if not answer:
            sys.exit(f"the worker ended with status {self._process.wait()}")
        return json.loads(answer)

    def close(self) -> None:
        """End the process."""
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait()


def work(request: dict[str, Any]) -> None:
    """Answer lines on stdin: a number does that step."""
    import torch
    from safetensors.torch import load_file, save_file

    import recmas_compiler as rc
    from recmas_compiler.training.loop.distributed import joined_world
    from recmas_compiler.training.loop.loop import batch_of
    from recmas_compiler.training.session import open_session
    from recmas_compiler.training.settings import train_settings
    from recmas_runtime.checking.machine import peak_resident_bytes
    from recmas_runtime.core.progress import Silent

    torch.set_num_threads(request["threads"])
    torch.manual_seed(0)
    out = Path(request["out"])
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # whatever else is printed is no answer
    spec = rc.load_spec(out / "spec.yaml", overrides=request["overrides"])
    settings = train_settings(spec)
    section = settings.section.model_copy(update={"backbone_dtype": request["dtype"]})
    settings = replace(settings, section=section)
    with joined_world() as world:
        program = rc.compile(spec).graph
        session = open_session(spec, program, settings, world=world, progress=Silent())
        graph, train = session.graph, session.examples.train
        kept = out / LINKS
        if not kept.exists():
            session.start(as_built=True)
            save_file({k: w.contiguous() for k, w in graph.links.state_dict().items()}, kept)
        graph.links.load_state_dict(load_file(kept))
        stage = section.outer
        weights = list(graph.links.parameters())
        optimizer = torch.optim.AdamW(weights, lr=stage.lr, betas=section.betas, weight_decay=0.0)

        def step(number: int) -> dict[str, float]:
            size = stage.batch_size
            places = batch_of(number, num_examples=len(train), batch_size=size, seed=section.seed)
            batch = graph.prepare([train[place] for place in places])
            began, busy = time.perf_counter(), time.process_time()
            loss = graph(batch, watch=True)
            forward = time.perf_counter() - began
            loss.mean.backward()
            graph.round_gradients()
            norm = torch.nn.utils.clip_grad_norm_(weights, section.clip)
            behind = time.perf_counter() - began - forward
            optimizer.step()
            optimizer.zero_grad()
            return {
                "seconds": time.perf_counter() - began,
                "cpu_seconds": time.process_time() - busy,
                "forward_seconds": forward,
                "backward_seconds": behind,
                "loss": loss.mean.item(),
                "grad_norm": float(norm),
                "peak_mb": peak_resident_bytes() / 2**20,
            }

        for line in sys.stdin:
            what: Any = {"ready": True}
            if line.strip().isdigit():
                what = step(int(line))
            elif line.strip() == "profile":
                what = profile(session, step)
            answers.write(json.dumps(what) + "\n")
            answers.flush()


def profile(session: Any, step: Any) -> str:
    """Return where a warm step's time goes, by kind of operator, and the positions it runs."""
    from torch.profiler import ProfilerActivity
    from torch.profiler import profile as profiled

    step(0)
    positions: Counter[str] = Counter()

    def note(_module: object, _args: object, kwargs: dict[str, Any]) -> None:
        rows, columns, _ = kwargs["inputs_embeds"].shape
        kind = "latent steps" if columns == 1 else "prompts"
        kind += ", with gradients" if kwargs["inputs_embeds"].requires_grad else ", constant"
        positions[kind] += rows * columns
        positions[f"calls for {kind}"] += 1

    (backbone,) = session.backbones.values()
    handle = backbone.body.register_forward_pre_hook(note, with_kwargs=True)
    with profiled(activities=[ProfilerActivity.CPU]) as found:
        taken = step(1)
    handle.remove()
    table = found.key_averages().table(
        sort_by="self_cpu_time_total", row_limit=25, max_name_column_width=48
    )
    counts = "\n".join(f"{kind}: {number}" for kind, number in sorted(positions.items()))
    return f"{counts}\n{taken}\n{table}"


def report(found: dict[str, Any], *, threads: int) -> str:
    """Return the table."""
    lines = [
        f"{threads} threads; medians of the steps behind the first, least and most in brackets",
        "",
        "| backbone | form | s/step | CPU s/step | first step, s | peak MB |",
        "|---|---|---|---|---|---|",
    ]
    ratios = []
    for dtype, forms in found.items():
        for name, steps in forms.items():
            warm = steps[1:]
            shown = []
            for key in ("seconds", "cpu_seconds"):
                values = [step[key] for step in warm]
                shown.append(f"{median(values):.2f} ({min(values):.2f} to {max(values):.2f})")
            first, peak = steps[0]["seconds"], steps[-1]["peak_mb"]
            lines.append(f"| {dtype} | {name} | {' | '.join(shown)} | {first:.1f} | {peak:.0f} |")
        if "old" in forms:
            ratios.append(compared(dtype, forms))
    return "\n".join([*lines, "", *ratios])


def compared(dtype: str, forms: dict[str, Any]) -> str:
    """Return a paragraph of ratios."""
    pairs = list(zip(forms["old"], forms["new"], strict=True))
    times = {
        key: median(old[key] / new[key] for old, new in pairs[1:])
        for key in ("seconds", "cpu_seconds")
    }
    memory = pairs[-1][1]["peak_mb"] / pairs[-1][0]["peak_mb"]
    apart = max(abs(old["loss"] - new["loss"]) / abs(old["loss"]) for old, new in pairs)
    curves = "; ".join(f"{name} {losses(steps)}" for name, steps in forms.items())
    return (
        f"{dtype}: {times['seconds']:.2f} times as fast ({times['cpu_seconds']:.2f} by CPU time), "
        f"peak memory {memory:.2f} of the old form's; losses at most {apart:.1e} apart, relative "
        f"({curves})"
    )


def losses(steps: list[dict[str, float]]) -> str:
    return " ".join(f"{step['loss']:.5f}" for step in steps)


if __name__ == "__main__":
    main()
