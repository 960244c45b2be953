"""What every section of the language is made of: its base class, names, texts and paths."""

from __future__ import annotations

from typing import Annotated, Final, TypeVar

from pydantic import BaseModel, BeforeValidator, ConfigDict, StringConstraints
from pydantic_core import PydanticCustomError

from recmas_runtime.formats.ids import SLUG_PATTERN

MAX_AGENTS: Final = 64

PATH_PATTERN: Final = r"^[^\x00-\x1f]+$"

Slug = Annotated[str, StringConstraints(pattern=f"^{SLUG_PATTERN}$", max_length=64)]
FilePath = Annotated[str, StringConstraints(pattern=PATH_PATTERN, max_length=4096)]

_T = TypeVar("_T")


def _refuse_blank(value: object) -> object:
    """Refuse `key:` with nothing after it, which is a slip and not a wish for the default."""
    if value is None:
        raise PydanticCustomError("blank", "is empty")
    return value


Given = Annotated[_T | None, BeforeValidator(_refuse_blank)]
"""An optional value which, where its key is written, must be given."""


class Section(BaseModel):
    """A mapping of the language."""

    model_config = ConfigDict(
        extra="forbid", frozen=True, strict=True, allow_inf_nan=False, use_attribute_docstrings=True
    )
