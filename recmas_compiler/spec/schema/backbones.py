"""What agents run on: backbones whose weights are here, and models behind an API."""

from __future__ import annotations

from typing import Annotated, Final, get_args

from pydantic import BeforeValidator, Field, StringConstraints
from pydantic_core import PydanticCustomError

from recmas_compiler.spec.schema.sections import FilePath, Given, Section
from recmas_runtime.formats.manifest import (
    MAX_RETRIES,
    MAX_TIMEOUT_S,
    OPENAI,
    OPENAI_KEY,
    OPENAI_URL,
    RETRIES,
    TIMEOUT_S,
    URL_PATTERN,
    VARIABLE_PATTERN,
    LeftOut,
    Prices,
    RemoteEntry,
)
from recmas_runtime.formats.precisions import DEVICE_PATTERN, Dtype, PrecisionName

# Keys that somebody would write a secret under.
SECRET_KEYS: Final = frozenset(
    {
        "api-key",
        "api_key",
        "apikey",
        "authorization",
        "bearer",
        "key",
        "password",
        "secret",
        "token",
    }
)
# Further keys of a request: no more than any service has.
_MOST_KEYS: Final = 64


class PricesSection(Section):
    """What tokens of a remote model cost."""

    prompt: float = Field(default=0.0, ge=0.0, le=1e9)
    """Price of a million prompt tokens, in the currency that you count in."""

    completion: float = Field(default=0.0, ge=0.0, le=1e9)
    """Price of a million tokens that it writes."""


def _body_value(value: object) -> object:
    if not isinstance(value, bool | int | float | str):
        raise PydanticCustomError("body_value", "should be true, false, a number or text")
    return value


BodyKey = Annotated[str, StringConstraints(pattern="^[A-Za-z_][A-Za-z0-9_.-]*$", max_length=128)]
BodyValue = Annotated[bool | int | float | str, BeforeValidator(_body_value)]


class BackboneSection(Section):
    """A frozen causal language model that agents run on."""

    source: FilePath
    """Where its weights are: `builtin:NAME`, `hf:ORG/NAME@REVISION`, `gguf:PATH` of a file of
    llama.cpp's, or a folder with `config.json`; paths are relative to the spec. Or `openai:MODEL`:
    a model behind an API of OpenAI's form, for agents that take and give text."""

    dtype: Dtype = "float32"
    """Element type that its weights are rounded to and stored in. Engines compute in float32
    whatever it is; `bfloat16` and `float16` halve the bundle."""

    precision: Given[PrecisionName] = None
    """Precision of this backbone's engines instead of `build.precision`."""

    device: Given[Annotated[str, StringConstraints(pattern=DEVICE_PATTERN)]] = None
    """Device that this backbone's engines are made for and run on: `cpu`, `cuda`, `cuda:1` for the
    second GPU, or `tensorrt`; without it, or with `auto`, the best that is there. Messages between
    devices cross through memory of the host."""

    template: Given[FilePath] = None
    """Chat template instead of the backbone's own: a Jinja file, relative to the spec, or `none`
    for plain text, as models without one were trained on."""

    base_url: Given[Annotated[str, StringConstraints(pattern=URL_PATTERN, max_length=2048)]] = None
    """Of `openai:`: the endpoint, up to and with its version, such as `http://127.0.0.1:8000/v1`.
    Without it OpenAI's own."""

    api_key_env: Given[Annotated[str, StringConstraints(pattern=VARIABLE_PATTERN)]] = None
    """Of `openai:`: the environment variable that holds the key where a bundle runs, never the key
    itself. Without it no key is sent, or for OpenAI's own endpoint the one in `OPENAI_API_KEY`."""

    timeout_s: Given[Annotated[float, Field(gt=0.0, le=MAX_TIMEOUT_S)]] = None
    """Of `openai:`: most seconds without a byte of the answer (default 120)."""

    max_retries: Given[Annotated[int, Field(ge=0, le=MAX_RETRIES)]] = None
    """Of `openai:`: further attempts where a call fails for a reason that may pass (default 2)."""

    prices: Given[PricesSection] = None
    """Of `openai:`: what a million tokens cost; without it no cost is told."""

    leave_out: tuple[LeftOut, ...] = Field(
        default=(), strict=False, max_length=len(get_args(LeftOut))
    )
    """Of `openai:`: settings that its requests do not have, for models that refuse them."""

    body: dict[BodyKey, BodyValue] = Field(default_factory=dict, max_length=_MOST_KEYS)
    """Of `openai:`: further keys of its requests, such as `reasoning_effort: low`."""

    @property
    def is_remote(self) -> bool:
        """Whether it is a model behind an API."""
        return self.source.startswith(OPENAI)

    @property
    def remote(self) -> RemoteEntry:
        """The model behind an API, with every default in place."""
        key = self.api_key_env or (OPENAI_KEY if self.base_url is None else None)
        return RemoteEntry(
            model=self.source.removeprefix(OPENAI),
            base_url=(self.base_url or OPENAI_URL).rstrip("/"),
            api_key_env=key,
            timeout_s=TIMEOUT_S if self.timeout_s is None else self.timeout_s,
            max_retries=RETRIES if self.max_retries is None else self.max_retries,
            prices=None if self.prices is None else Prices(**self.prices.model_dump()),
            leave_out=self.leave_out,
            body=self.body,
        )


# Of `BackboneSection`: what is of weights that are here, and what is of a model behind an API.
LOCAL_KEYS: Final = ("device", "dtype", "precision", "template")
REMOTE_KEYS: Final = tuple(
    name for name in BackboneSection.model_fields if name not in ("source", *LOCAL_KEYS)
)
