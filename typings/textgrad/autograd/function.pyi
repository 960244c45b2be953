from collections.abc import Callable
from typing import Any

class BackwardContext:
    def __init__(self, backward_fn: Callable[..., Any], *args: Any, **kwargs: Any) -> None: ...
