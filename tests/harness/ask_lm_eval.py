"""Runs lm_eval in its own environment: `ask_lm_eval.py REQUEST`, a JSON file; prints what it finds.

A request has `folder` and `tasks`, and in `runs` by name the model arguments, perhaps with
`evaluate`, further arguments of `simple_evaluate`. What the system ran is counted.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import lm_eval
from lm_eval.tasks import TaskManager

import recmas_runtime.harness.lm_eval  # noqa: F401, registers the model
from recmas_runtime.core.errors import RecmasError
from recmas_runtime.running.executor import Execution


def main() -> None:
    request = json.loads(Path(sys.argv[1]).read_text())
    manager = TaskManager(include_path=request["folder"], include_defaults=False)
    ran = []
    run_rounds = Execution.run_rounds
    Execution.run_rounds = lambda self: (ran.append(len(self.seeds)), run_rounds(self))[1]
    told: dict[str, Any] = {}
    for name, run in request["runs"].items():
        ran.clear()
        try:
            found = lm_eval.simple_evaluate(
                model="recmas",
                model_args=run["model"],
                tasks=run.get("tasks", request["tasks"]),
                task_manager=manager,
                bootstrap_iters=0,
                **run.get("evaluate", {}),
            )
        except RecmasError as error:
            told[name] = {"error": str(error)}
            continue
        told[name] = {
            "results": found["results"],
            "model": found["config"]["recmas"],
            "ran": list(ran),
            "told": {
                task: [one["resps"] for one in sorted(samples, key=lambda one: one["doc_id"])]
                for task, samples in found["samples"].items()
            },
        }
    print(json.dumps(told, default=float))


main()
