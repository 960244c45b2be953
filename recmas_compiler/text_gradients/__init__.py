"""Prompts of a text system, optimised by textual gradients with the package `textgrad`.

`optimise` takes `OptimiseOptions` and returns `TextGradients`: prompts, what they cost, what became
of every proposal, and the spec file with them. Nothing here imports `textgrad` before it is called.
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
