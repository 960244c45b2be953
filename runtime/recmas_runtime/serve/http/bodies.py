"""Bodies of requests: strict JSON, and what is said of those that do not fit."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, ClassVar, Final

from fastapi import Request
from fastapi.exceptions import RequestValidationError
from fastapi.routing import APIRoute
from pydantic import BaseModel, BeforeValidator, ConfigDict

from recmas_runtime.core.errors import RecmasError
from recmas_runtime.formats.codec import parse_json
from recmas_runtime.serve.http.errors import ApiError, sentence

# Deeper than any form, and than records are.
_MAX_NESTING: Final = 32


def _as_whole(value: object) -> object:
    """Return a whole number as such: to JSON, 1 and 1.0 are the same."""
    return int(value) if isinstance(value, float) and value.is_integer() else value


# On integers, after their bounds, which schemas leave out otherwise.
WHOLE: Final = BeforeValidator(_as_whole)


class Strict(BaseModel):
    """Base of what requests hold: no unknown keys, and no value of another type.

    Attributes:
        unsupported: Keys of OpenAI's forms that are known and not honoured, with what may be done
            instead; their types allow those values alone that ask for nothing.
    """

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)
    unsupported: ClassVar[Mapping[str, str]] = {}


class JsonRequest(Request):
    """A request whose JSON is read as strictly as files are."""

    async def json(self) -> Any:
        """Return the body.

        Raises:
            ApiError: 400 if it is no JSON, nested too deeply, or holds what is no text or number.
        """
        try:
            data = parse_json(await self.body(), file="body")
        except RecmasError as error:
            message = sentence(error.problems[0].message, "Send one JSON object as UTF-8.")
            raise ApiError(400, "RM546", message) from None
        _check_values(data)
        return data


class JsonRoute(APIRoute):
    """Hands `JsonRequest` to its function."""

    def get_route_handler(self) -> Any:
        """Return what answers a request."""
        handle = super().get_route_handler()
        form = None if self.body_field is None else self.body_field.field_info.annotation

        async def handle_json(request: Request) -> Any:
            try:
                return await handle(JsonRequest(request.scope, request.receive))
            except RequestValidationError as error:
                assert isinstance(form, type), "only bodies can be wrong: paths are texts"
                assert issubclass(form, Strict), "forms are strict"
                raise _refusal(error, form) from None

        return handle_json


def _check_values(data: object) -> None:
    """Refuse what JSON can spell and nothing behind it can take."""
    level: list[object] = [data]
    for _ in range(_MAX_NESTING):
        inner: list[object] = []
        for value in level:
            if isinstance(value, dict):
                inner += value
                inner += value.values()
            elif isinstance(value, list):
                inner += value
            elif (why := _unusable(value)) is not None:
                place = next(_places_of(value, data), ())
                raise ApiError(400, "RM546", why, param=_param(place) or None)
        if not inner:
            return
        level = inner
    message = f"the body is nested more than {_MAX_NESTING} deep"
    raise ApiError(400, "RM546", sentence(message, "No form needs that: send less deep lists."))


def _unusable(value: object) -> str | None:
    """Return what is wrong with a text or number, if anything, and what to do."""
    if isinstance(value, float) and not math.isfinite(value):
        return "the body has a number beyond all bounds. Send one below 1e308."
    if isinstance(value, str):
        try:
            value.encode()
        except UnicodeEncodeError as error:
            message = f"a text of the body holds {value[error.start]!r}, half of a surrogate pair"
            return sentence(message, "Cut texts between characters, and send both halves or none.")
    return None


def _places_of(
    wanted: object, data: object, place: tuple[str | int, ...] = ()
) -> Iterator[tuple[str | int, ...]]:
    """Yield where a value stands; of a key, where the object stands that has it."""
    if len(place) > _MAX_NESTING or not isinstance(data, dict | list):
        return
    for key, value in data.items() if isinstance(data, dict) else enumerate(data):
        if key is wanted:
            yield place
        elif value is wanted:
            yield (*place, key)
        yield from _places_of(wanted, value, (*place, key))


def _refusal(error: RequestValidationError, form: type[Strict]) -> ApiError:
    """Return the error of a body that does not fit its form; it names the first key at fault."""
    data = error.body
    if not isinstance(data, dict):
        return ApiError(400, "RM546", "the body is no JSON object. Send one: {...}.")
    placed = [(_place(each, data), each) for each in error.errors()]
    first, _ = placed[0]
    # Of a value that may be of several types, what is wrong within it says most.
    place = first
    for each, _ in placed:
        if len(each) > len(place) and each[: len(place)] == place:
            place = each
    same = [each for where, each in placed if where == place]
    param, kind = _param(place), same[0]["type"]
    name = str(place[0])
    if name in form.unsupported:
        message = sentence(f"`{param}` is not supported", form.unsupported[name])
        return ApiError(400, "RM543", message, param=name)
    if kind == "extra_forbidden":
        honoured = [key for key in form.model_fields if key not in form.unsupported]
        hint = f"Honoured are: {', '.join(honoured)}." if len(place) == 1 else "Leave it out."
        return ApiError(400, "RM543", sentence(f"unknown key `{param}`", hint), param=param)
    if kind in _MISSING:
        return ApiError(400, "RM546", f"`{param}` is missing. Add it.", param=param)
    # Where one type fits and its bounds do not, the other types are beside the point.
    bounds = [each for each in same if each["type"] not in _TYPES] or same
    wanted = " or ".join(dict.fromkeys(map(_wanted, bounds)))
    message = f"`{param}`: expected {wanted}, found {_found(place, data)}"
    hint = "Leave it out." if wanted in ("null", "at most 0 items") else _HINTS.get(name, "")
    message = sentence(message, hint)
    # A message or part of a kind that is known elsewhere and not read here.
    is_kind = place[-1] in ("type", "role") and len(place) > 1
    return ApiError(400, "RM543" if is_kind else "RM546", message, param=param)


# Of keys that clients fill with what stands for nothing.
_HINTS: Final = {"seed": "Leave it out for one that is drawn."}
_TYPES: Final = {
    "bool_type": "true or false",
    "dict_type": "an object",
    "float_type": "a number",
    "int_from_float": "an integer",
    "int_type": "an integer",
    "list_type": "a list",
    "model_attributes_type": "an object",
    "model_type": "an object",
    "none_required": "null",
    "string_type": "a string",
}
_BOUNDS: Final = {
    "greater_than": "more than {gt}",
    "greater_than_equal": "at least {ge}",
    "less_than": "less than {lt}",
    "less_than_equal": "at most {le}",
}
_LENGTH: Final = re.compile(r"\w+ should have (?P<bound>.*?)(?: after validation, not \d+)?")
_MISSING: Final = ("missing", "union_tag_not_found")


def _place(error: Mapping[str, Any], data: Any) -> tuple[str | int, ...]:
    """Return the keys of a place, without the types that pydantic tried on the way."""
    loc: tuple[str | int, ...] = error["loc"][1:]  # after `body`
    place: list[str | int] = []
    for key in loc:
        is_key = isinstance(data, dict) and isinstance(key, str) and key in data
        is_index = isinstance(data, list) and isinstance(key, int) and key < len(data)
        if is_key or is_index:
            data = data[key]
            place.append(key)
    if error["type"] == "missing":
        place.append(loc[-1])
    elif error["type"].startswith("union_tag"):
        place.append(error["ctx"]["discriminator"].strip("'"))
    return tuple(place)


def _param(place: Sequence[str | int]) -> str:
    text = "".join(f"[{key}]" if isinstance(key, int) else f".{key}" for key in place)
    return text.removeprefix(".")[:200]


def _wanted(error: Mapping[str, Any]) -> str:
    context = error.get("ctx", {})
    if error["type"] == "union_tag_invalid":
        return str(context["expected_tags"])
    if (kind := _TYPES.get(error["type"])) is not None:
        return kind
    if (bound := _BOUNDS.get(error["type"])) is not None:
        return bound.format(**context)
    told = _LENGTH.fullmatch(str(error["msg"]))
    return told["bound"] if told else str(error["msg"]).removeprefix("Input should be ")


def _found(place: Sequence[str | int], data: Any) -> str:
    for key in place:
        data = data[key]
    if isinstance(data, dict):
        return "an object"
    if isinstance(data, list):
        return f"a list of {len(data)}"
    text = json.dumps(data)
    return text if len(text) <= 60 else f"{text[:57]}..."
