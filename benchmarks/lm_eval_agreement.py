"""Log-likelihoods of choices: a bundle's answer agent beside lm_eval's own Hugging Face model.

    python benchmarks/lm_eval_agreement.py BUNDLE DATA OUT [--limit 100]

Both get the same weights in float32 and the same prompts: BUNDLE is asked as its baseline `single`,
whose prompt must be the question alone (`template: none`). DATA has lines of `question`, `choices`
and a letter as `answer`; its task is that of lm_eval's `arc_easy`. OUT gets the backbone as a
folder that transformers opens, the task, and both models' results.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

TASK = "choices_of_ours"
TASK_YAML = f"""\
task: {TASK}
dataset_path: json
dataset_kwargs: {{data_files: {{test: DATA}}}}
test_split: test
output_type: multiple_choice
doc_to_text: "Question: {{{{question}}}}\\nAnswer:"
doc_to_choice: "{{{{choices}}}}"
doc_to_target: "{{{{'ABCDEFGH'.index(answer)}}}}"
metric_list:
  - {{metric: acc, aggregation: mean, higher_is_better: true}}
  - {{metric: acc_norm, aggregation: mean, higher_is_better: true}}
"""


def write_backbone(bundle: Path, folder: Path) -> None:
    """Write the answer agent's backbone in the form of transformers, float32."""
    import yaml

    from recmas_compiler.backbones.sources import describe_backbone
    from recmas_compiler.backbones.torch_model import load_backbone
    from recmas_runtime.core.progress import Silent

    spec = yaml.safe_load((bundle / "spec.yaml").read_text(encoding="utf-8"))
    name = spec["agents"][spec["answer"]["agent"]]["backbone"]
    facts = describe_backbone(spec["backbones"][name]["source"], base_dir=bundle)
    backbone = load_backbone(facts, progress=Silent())
    backbone.model.save_pretrained(folder)
    backbone.tokenizer.save_pretrained(folder)


def evaluated(model: str, arguments: dict[str, Any], tasks: Path, limit: int) -> dict[str, Any]:
    """Return what lm_eval finds for a model: figures, and by question the choices' likelihoods."""
    import lm_eval
    from lm_eval.tasks import TaskManager

    found = lm_eval.simple_evaluate(
        model=model,
        model_args=arguments,
        tasks=[TASK],
        task_manager=TaskManager(include_path=str(tasks), include_defaults=False),
        limit=limit,
        bootstrap_iters=0,
    )
    samples = sorted(found["samples"][TASK], key=lambda sample: sample["doc_id"])
    return {
        "acc": found["results"][TASK]["acc,none"],
        "acc_norm": found["results"][TASK]["acc_norm,none"],
        "told": [[list(each[0]) for each in sample["resps"]] for sample in samples],
    }


def main() -> None:
    parser = argparse.ArgumentParser(prog="lm_eval_agreement", description=__doc__.split("\n")[0])
    parser.add_argument("bundle", type=Path)
    parser.add_argument("data", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--limit", type=int, default=100)
    parser.add_argument("--more", nargs="*", default=[], help="baselines to ask as well")
    options = parser.parse_args()

    import recmas_runtime.harness.lm_eval  # noqa: F401, registers the model

    tasks, backbone = options.out / "tasks", options.out / "backbone"
    tasks.mkdir(parents=True, exist_ok=True)
    text = TASK_YAML.replace("DATA", json.dumps(str(options.data.resolve())))
    (tasks / f"{TASK}.yaml").write_text(text, encoding="utf-8")
    if not backbone.is_dir():
        write_backbone(options.bundle, backbone)
    plain = {"pretrained": str(backbone), "dtype": "float32", "device": "cpu", "batch_size": 1}
    found = {"hf": evaluated("hf", plain, tasks, options.limit)}
    for name in ("single", *options.more):
        asked = {"bundle": str(options.bundle), "baseline": name}
        found[name] = evaluated("recmas", asked, tasks, options.limit)
    (options.out / "results.json").write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")

    pairs = [
        (a, b)
        for ours, theirs in zip(found["single"]["told"], found["hf"]["told"], strict=True)
        for a, b in zip(ours, theirs, strict=True)
    ]
    worst = max(abs(a[0] - b[0]) for a, b in pairs)
    greedy = sum(a[1] == b[1] for a, b in pairs)
    print(f"{len(pairs)} choices: log-likelihoods differ by at most {worst:.2e} nats,")
    print(f"greedy or not: {greedy} agree")
    for name, figures in found.items():
        print(f"{name:12} acc {figures['acc']:.3f}  acc_norm {figures['acc_norm']:.3f}")


if __name__ == "__main__":
    main()
