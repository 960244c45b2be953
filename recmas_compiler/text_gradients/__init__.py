"""Prompts of a text system, optimised by textual gradients with the package `textgrad`.

    settings = read_settings(["data=train.jsonl", "steps=12"])
    options = OptimiseOptions(bundle=..., protocol="gsm8k", settings=settings, folder=...)
    found = optimise(options, progress=Silent())

`found` is a `TextGradients`: the texts, `spec_file`, `system(base)` for the text system with them,
what became of every proposal (`fates`), and what it took (`spent`, `steps`, `step_seconds`; no
parameter is trained). It wants the extra `textgrad`; nothing here imports that package before
`optimise` is called.
"""

from recmas_compiler.text_gradients.optimise import OptimiseOptions, optimise
from recmas_compiler.text_gradients.result import Spent, TextGradients
from recmas_compiler.text_gradients.settings import TextGradSettings, read_settings

__all__ = [
    "OptimiseOptions",
    "Spent",
    "TextGradSettings",
    "TextGradients",
    "optimise",
    "read_settings",
]
