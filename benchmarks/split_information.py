"""What makes messages carry content where a soft prompt would also lower the loss.

    python benchmarks/split_information.py OUT --data TRAIN.jsonl
        [--studies question,numbers,frozen,warm,find] [--steps 200] [--eval-every 25] [--look]

Word problems whose information is split between agents: only the reader's prompt has what the
solver needs. TRAIN.jsonl has records with `question` and `solution` (GSM8K's train file). The
solver learns the worked solution by rollout; only links learn.

Studies:
    question: the solver sees nothing but the message; the reader repeats the whole question.
    numbers: the solver sees the question with gaps for its numbers; the reader knows those.
    frozen: the same, the reader's links stay at their start, and a third agent that knows nothing
        of the record (`coach`) has the link that learns: the soft prompt gets a place of its own.
    warm: frozen, then all links learn, at a tenth of the rate.
    find: as numbers, but the reader has to find them in the question itself.

Every study prints its held-out loss in nats per token with the record's own messages (latent), with
none (null), another record's (shuffled) and the others' mean (mean). Only what `latent` gains over
`shuffled` and `mean` is communication.

A study that was stopped goes on. Writes OUT/split.json and split.md.

With --look nothing learns: it prints how much of the reader's message is right before training: in
how many records the nearest input embedding is that of the target's token, by position.
"""

from __future__ import annotations

import argparse
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch
from relay_specs import SMOL
from torch.nn.functional import normalize

import recmas_compiler as rc
from recmas_compiler.training.loop.distributed import joined_world
from recmas_compiler.training.loop.metrics import METRICS_NAME
from recmas_compiler.training.session import open_session
from recmas_compiler.training.settings import train_settings
from recmas_compiler.training.tasks.outer import CONTROLS
from recmas_runtime.core.jsonl import read_json_lines
from recmas_runtime.core.progress import Silent

STUDIES = ("question", "numbers", "frozen", "warm", "find")
# Short problems, so that an evening on two cores is enough.
MOST_CHARACTERS = {"question": 190, "numbers": 12, "solution": 160}
FEWEST_NUMBER_CHARACTERS = 3
HELD_OUT = 64
# Whose links `warm` goes on from, and where it looks for them.
WARM_START = (("frozen", "outer"), ("warm", "inner"))
# Its learning rate, relative to theirs.
WARM = 0.1

READER_OF_NUMBERS = "{{ numbers }} are the numbers. Repeat it."
STORY = "{{ latent.reader }} are the numbers.\n{{ story }}\nSolve the problem step by step."


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("out", type=Path)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--studies", type=lambda text: text.split(","), default=list(STUDIES))
    parser.add_argument("--source", default=SMOL, help="backbone of all agents")
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--batch-size", type=int, default=4)
    parser.add_argument("--lr", type=float, default=5e-4)
    parser.add_argument("--eval-every", type=int, default=25)
    parser.add_argument("--eval-records", type=int, default=32)
    parser.add_argument("--look", action="store_true")
    parser.add_argument("--backbone-dtype", default="float32", choices=("float32", "bfloat16"))
    arguments = parser.parse_args()
    if not set(arguments.studies) <= set(STUDIES):
        parser.error(f"studies are {', '.join(STUDIES)}")

    out: Path = arguments.out.resolve()
    out.mkdir(parents=True, exist_ok=True)
    records = problems(arguments.data)
    if len(records) < 2 * HELD_OUT:
        parser.error(f"{arguments.data} has {len(records)} short problems, {2 * HELD_OUT} needed")
    write_records(out / "train.jsonl", records[:-HELD_OUT])
    write_records(out / "held_out.jsonl", records[-HELD_OUT:])
    found: dict[str, list[dict[str, Any]]] = {}
    for study in arguments.studies:
        spec = out / f"{study}.yaml"
        spec.write_text(json.dumps(study_spec(study, arguments), indent=1) + "\n")
        if arguments.look:
            shares = " ".join(f"{share:.2f}" for share in right_by_position(spec))
            print(f"{study}: right by position {shares}")
            continue
        train(study, spec, out)
        found = {name: evaluations(out / name) for name in STUDIES if (out / name).is_dir()}
        (out / "split.json").write_text(json.dumps(found, indent=1) + "\n")
        (out / "split.md").write_text(table(found) + "\n")
    if not arguments.look:
        print(table(found))


def problems(data: Path) -> list[dict[str, str]]:
    """Return short problems: question, solution, the numbers of the question, and what is left."""
    found = []
    # Not splitlines: texts hold other line breaks than JSONL's.
    for number, line in enumerate(data.read_text().strip().split("\n")):
        record = json.loads(line)
        question, solution = record["question"], record["solution"]
        problem = {
            "id": str(record.get("id", number)),
            "question": question,
            "story": re.sub(r"\d+", "_", question),
            "numbers": " ".join(re.findall(r"\d+", question)),
            "solution": solution,
        }
        is_short = all(len(problem[key]) <= most for key, most in MOST_CHARACTERS.items())
        if is_short and len(problem["numbers"]) >= FEWEST_NUMBER_CHARACTERS:
            found.append(problem)
    return found


def write_records(path: Path, records: list[dict[str, str]]) -> None:
    path.write_text("".join(json.dumps(record) + "\n" for record in records))


def study_spec(study: str, arguments: argparse.Namespace) -> dict[str, Any]:
    """Return the spec of a study (JSON, which is YAML)."""
    prompts = {"reader": READER_OF_NUMBERS, "solver": STORY}
    if study == "question":
        prompts = {
            "reader": "{{ question }}\nRepeat the problem.",
            "solver": "{{ latent.reader }}\nSolve the problem step by step.",
        }
    if study == "find":
        prompts["reader"] = "{{ question }}\nList the numbers of this problem, nothing else."
    has_coach = study in ("frozen", "warm")
    if has_coach:
        prompts = {
            "reader": prompts["reader"],
            "coach": "How are problems solved?",
            "solver": "{{ latent.coach }}\n" + prompts["solver"],
        }
    agents: dict[str, Any] = {
        name: {"backbone": "b", "prompt": prompt} for name, prompt in prompts.items()
    }
    if has_coach:
        agents["coach"]["latent_steps"] = 8
    outer: dict[str, Any] = {
        "mode": "rollout",
        "steps": arguments.steps,
        "batch_size": arguments.batch_size,
        "lr": arguments.lr * (WARM if study == "warm" else 1.0),
    }
    if study == "frozen":
        outer["freeze"] = ["reader", "reader -> solver"]
    return {
        "recmas": 1,
        "name": f"split-{study}",
        "latent_steps": 24 if study == "question" else 12,
        "backbones": {"b": {"source": arguments.source}},
        "agents": agents,
        "links": {f"{name} -> solver": {} for name in prompts if name != "solver"},
        "answer": {"agent": "solver", "max_new_tokens": 128},
        "train": {
            "data": "train.jsonl",
            "held_out": "held_out.jsonl",
            "links_dir": f"links/{study}",
            "targets": {
                "reader": "question" if study == "question" else "numbers",
                "solver": "solution",
            },
            "outer": outer,
            "max_length": 512,
            "eval_every": arguments.eval_every,
            "eval_records": arguments.eval_records,
            "checkpoint_every": arguments.eval_every,
            "backbone_dtype": arguments.backbone_dtype,
        },
    }


@torch.no_grad()
def right_by_position(path: Path) -> list[float]:
    """Return the share of right tokens in the reader's messages, by position, before training."""
    spec = rc.load_spec(path)
    settings = train_settings(spec)
    with joined_world() as world:
        program = rc.compile(spec).graph
        session = open_session(spec, program, settings, world=world, progress=Silent())
        session.start()
        some = session.examples.held_out[: settings.section.eval_records]
        latents = session.graph.latents(session.graph.prepare(some), mode="rollout")
        backbone = session.backbone("solver")
        table_VD = normalize(backbone.embed(torch.arange(backbone.facts.vocab_size)).float())
        hits: list[list[bool]] = []
        for example, message_MD in zip(some, latents.message("reader->solver", 1), strict=True):
            nearest = (normalize(message_MD.float()) @ table_VD.T).argmax(-1).tolist()
            text = example.targets["reader"]
            meant = backbone.tokenizer(text, add_special_tokens=False).input_ids
            hits.append([a == b for a, b in zip(nearest, meant, strict=False)])
    longest = max(map(len, hits))
    columns = [[row[i] for row in hits if len(row) > i] for i in range(longest)]
    return [sum(column) / len(column) for column in columns]


def train(study: str, spec: Path, out: Path) -> None:
    if study == "warm":
        # The outer stage starts from the links of an inner stage in its own folder.
        frozen, start = (out / name / stage / "links" for name, stage in WARM_START)
        if not frozen.is_dir():
            sys.exit("the study `warm` goes on from `frozen`: run that first")
        shutil.copytree(frozen, start, dirs_exist_ok=True)
    command = [sys.executable, "-m", "recmas_cli.main", "train", str(spec)]
    command += ["--stage", "outer", "--out", str(out / study), "--resume"]
    subprocess.run(command, check=True, stdout=sys.stderr)


def evaluations(folder: Path) -> list[dict[str, Any]]:
    path = folder / "outer" / METRICS_NAME
    return [row for row in read_json_lines(path) if row["kind"] == "eval"] if path.exists() else []


def table(found: dict[str, list[dict[str, Any]]]) -> str:
    lines = [f"| study | steps | {' | '.join(CONTROLS)} | shuffled - latent |"]
    lines.append("|---" * (len(CONTROLS) + 3) + "|")
    for study, rows in found.items():
        for row in rows:
            values = " | ".join(f"{row[name]:.3f}" for name in CONTROLS)
            gain = row["shuffled"] - row["latent"]
            lines.append(f"| {study} | {row['step']} | {values} | {gain:+.3f} |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
