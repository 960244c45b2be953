from collections.abc import Iterable
from typing import Any

from textgrad.autograd.function import BackwardContext

class EngineLM:
    system_prompt: str
    model_string: str
    def generate(self, prompt: str, system_prompt: str | None = None, **kwargs: Any) -> str: ...
    def __call__(self, prompt: str, **kwargs: Any) -> str: ...

class Variable:
    value: str
    gradients: Any
    gradients_context: dict[Variable, Any]
    predecessors: Any
    requires_grad: bool
    _reduce_meta: list[Any]
    def __init__(
        self,
        value: str = "",
        image_path: str = "",
        predecessors: list[Variable] | None = None,
        requires_grad: bool = True,
        *,
        role_description: str,
    ) -> None: ...
    def set_grad_fn(self, grad_fn: BackwardContext) -> None: ...
    def get_gradient_text(self) -> str: ...
    def backward(self, engine: EngineLM | None = None) -> None: ...

class TextLoss:
    def __init__(
        self, eval_system_prompt: Variable | str, engine: EngineLM | None = None
    ) -> None: ...
    def __call__(self, instance: Variable) -> Variable: ...

class TextualGradientDescent:
    def __init__(
        self,
        parameters: list[Variable],
        verbose: int = 0,
        engine: EngineLM | None = None,
        constraints: list[str] | None = None,
        new_variable_tags: Iterable[str] | None = None,
    ) -> None: ...
    def step(self) -> None: ...
