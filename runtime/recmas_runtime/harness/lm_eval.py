"""Registers `recmas` as a model of lm-evaluation-harness, and is its command with that model.

lm_eval looks nowhere for models of other packages: `import recmas_runtime.harness.lm_eval` makes it
known to a program, and on the command line

    python -m recmas_runtime.harness.lm_eval run --model recmas --model_args bundle=DIR --tasks ...

takes the place of `lm_eval run ...`.
"""

from __future__ import annotations

import sys

from recmas_runtime.core.errors import RecmasError
from recmas_runtime.core.printing import note
from recmas_runtime.harness.lm_eval_model import RecmasLM

# Behind what says how to install it.
from lm_eval.api.registry import model_registry  # isort: skip

model_registry.register("recmas", target=RecmasLM)


def main() -> int:
    """Run lm_eval's command; returns the exit status."""
    from lm_eval.__main__ import cli_evaluate

    try:
        cli_evaluate()
    except RecmasError as error:
        note(str(error))
        return int(error.exit_code)
    return 0


if __name__ == "__main__":
    sys.exit(main())
