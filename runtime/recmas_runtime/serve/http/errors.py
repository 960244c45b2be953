"""Errors as OpenAI's clients read them, with the codes that recmas has everywhere."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, Final

from pydantic import BaseModel
from starlette.exceptions import HTTPException
from starlette.responses import JSONResponse

from recmas_runtime.core.errors import Problem
from recmas_runtime.core.terminal import harmless
from recmas_runtime.serve.protocol import ProblemInfo, Reason

# What nginx says of a client that left; nobody reads it but logs.
CLIENT_LEFT: Final = 499
_MAX_MESSAGE_CHARS: Final = 2000

_KINDS: Final[dict[int, str]] = {
    401: "authentication_error",
    404: "not_found_error",
    429: "rate_limit_error",
    500: "server_error",
    502: "server_error",
    503: "service_unavailable_error",
    504: "timeout_error",
}

# Status of what the service says about a request.
_STATUS: Final[dict[Reason, int]] = {
    "input": 400,
    "full": 429,
    "stopped": 503,
    "failed": 500,
    "timeout": 504,
}
_NO_MODEL: Final = "RM540"
# What went wrong behind a service that is well itself: a gateway says so.
_STATUS_OF_CODE: Final[dict[str, int]] = {
    _NO_MODEL: 404,
    **dict.fromkeys(("RM561", "RM562", "RM564", "RM565", "RM568"), 502),
    "RM563": 503,
    "RM566": 504,
}
_NO_ROOM: Final = "RM541"
# Where a scope holds the error that a request was answered with.
ERROR_KEY: Final = "recmas.error"


class ErrorInfo(BaseModel):
    """What is wrong, in OpenAI's keys; `code` is an error code of recmas."""

    message: str
    type: str
    param: str | None
    code: str


class ErrorBody(BaseModel):
    """The body of every answer that is none."""

    error: ErrorInfo


class ApiError(HTTPException):
    """A request that gets an error instead of an answer.

    Args:
        param: The key of the request that is at fault.
        retry_after_s: After which the same request may succeed.

    Attributes:
        is_counted: Whether observers of the service have seen it already.
    """

    is_counted = False

    def __init__(
        self,
        status: int,
        code: str,
        message: str,
        *,
        param: str | None = None,
        retry_after_s: float | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        wait = {} if retry_after_s is None else {"Retry-After": retry_after(retry_after_s)}
        super().__init__(status, detail=message, headers={**(headers or {}), **wait})
        self.code = code
        self.param = param

    @property
    def reason(self) -> Reason:
        """Whose matter it is, as `protocol.Failed` tells it."""
        if self.code == _NO_ROOM:
            return "full"
        reasons = {502: "failed", **{status: reason for reason, status in _STATUS.items()}}
        return reasons.get(self.status_code, "input")

    def to_json(self) -> dict[str, Any]:
        """Return the body, which is also what a stream sends that fails."""
        info = {
            "message": _shown(self.detail),
            "type": _KINDS.get(self.status_code, "invalid_request_error"),
            "param": None if self.param is None else _shown(self.param),
            "code": self.code,
        }
        return {"error": info}

    def response(self) -> JSONResponse:
        """Return the whole answer."""
        return JSONResponse(self.to_json(), self.status_code, headers=self.headers)


def retry_after(seconds: float) -> str:
    """Return whole seconds that all clients heed: 1 to 60."""
    return str(max(1, min(60, math.ceil(seconds))))


def of_problems(
    problems: Sequence[ProblemInfo] | Sequence[Problem],
    *,
    reason: Reason = "input",
    params: Mapping[str, str | None] | None = None,
    retry_after_s: float | None = None,
) -> ApiError:
    """Return the error of a request that the service, or what makes its record, refuses.

    Args:
        params: By code, the key that such problems are about.
        retry_after_s: Is told where trying again may help.
    """
    first = problems[0]
    status = _STATUS_OF_CODE.get(first.code, _STATUS[reason])
    return ApiError(
        status,
        first.code,
        " ".join(sentence(each.message, each.hint) for each in problems),
        param="model" if first.code == _NO_MODEL else (params or {}).get(first.code),
        retry_after_s=retry_after_s if status in (429, 503) else None,
    )


def sentence(message: str, hint: str = "") -> str:
    """Return a message with what to do about it."""
    stop = "" if message.endswith((".", "?", "!")) else "."
    return f"{message}{stop} {hint}".strip()


def _shown(text: str) -> str:
    """Return text that may hold parts of a request, cut, and harmless where it is printed."""
    text = harmless(text)
    return text if len(text) <= _MAX_MESSAGE_CHARS else f"{text[:_MAX_MESSAGE_CHARS]}..."


def internal_error() -> ApiError:
    """Return the error of a bug of ours, which says nothing of it."""
    hint = "The log of the service says more; if it is a bug in recmas, report it."
    return ApiError(500, "RM507", sentence("internal error", hint))


def documented(*statuses: int) -> dict[int | str, dict[str, Any]]:
    """Return the part of an OpenAPI page that declares errors."""
    return {
        status: {"model": ErrorBody, "description": _DESCRIPTIONS[status]}
        for status in (*statuses, *_ANYWHERE)
    }


_DESCRIPTIONS: Final = {
    400: "A request that cannot be honoured; `param` names the key at fault.",
    401: "No API key, or a wrong one.",
    404: "No such address, or a model that is not loaded.",
    408: "The body did not arrive in time.",
    413: "A body that is too large.",
    414: "An address that is too long.",
    415: "A body that is not application/json.",
    421: "A Host header that names no host of this service.",
    431: "Headers that are too large or too many.",
    429: "No room for another request; try again after `Retry-After`.",
    500: "The engine failed.",
    502: "A model behind an API failed, which an agent of the system runs on.",
    503: "The service starts, ends or was restarted, or a model behind an API has no room; try "
    "again after `Retry-After`.",
    504: "The answer took longer than the service allows, or a model behind an API did.",
}
_ANYWHERE: Final = (401, 414, 421, 431, 500, 503)
