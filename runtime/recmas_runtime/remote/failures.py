"""What goes wrong with a remote model, as errors of ours: what, where, and what to do."""

from __future__ import annotations

import re
from typing import Any, Final

from recmas_runtime.core.errors import RecmasError, fail
from recmas_runtime.formats.manifest import RemoteEntry

_SHOWN_CHARS: Final = 300
# Services say it in a code or in words; there is no status of its own.
_TOO_LONG: Final = re.compile(
    r"context.?length|maximum context|context.?window|exceeds? the (?:available )?context|"
    r"prompt is too long|too many (?:input )?tokens|\bRM501\b",
    re.IGNORECASE,
)


def failure_of(error: Exception, entry: RemoteEntry, key: str | None) -> RecmasError:
    """Return an error of the `openai` package, or of reading a reply, as one of ours.

    Args:
        key: Is shown nowhere, even if the endpoint repeats it.
    """
    import openai

    def told(code: str, what: str, hint: str) -> RecmasError:
        said = _said(error, key)
        message = f"{entry.name} {what}" + (f": {said}" if said else "")
        return fail(code, message, hint=hint)

    tried = f" in {entry.max_retries + 1} attempts" if entry.max_retries else ""
    match error:
        case openai.APITimeoutError():
            return told(
                "RM566",
                f"has not answered within {entry.timeout_s:g} s{tried}",
                "Raise `timeout_s` of the backbone, or find out what the endpoint is busy with.",
            )
        case openai.AuthenticationError() | openai.PermissionDeniedError():
            variable = entry.api_key_env
            where = (
                f"Correct the key in {variable}"
                if variable
                else "Name the variable of a key with `api_key_env`"
            )
            return told(
                "RM562", f"refuses the key ({error.status_code})", f"{where}; see what it may do."
            )
        case openai.RateLimitError():
            return told(
                "RM563",
                f"has too many requests (429){tried}",
                "Ask later, run fewer records at a time (--batch), raise `max_retries`, or check "
                "the account's quota.",
            )
        case openai.APIStatusError() if error.status_code >= 500:
            return told(
                "RM564",
                f"fails ({error.status_code}){tried}",
                "See the log of the endpoint, or ask later.",
            )
        case openai.APIStatusError() if _is_too_long(error):
            return told(
                "RM567",
                f"has no room for this prompt ({error.status_code})",
                "Shorten the record or the agent's prompt, lower `max_tokens` of the links to it, "
                "or name a model with a longer context.",
            )
        case openai.APIStatusError():
            return told(
                "RM568",
                f"refuses the request ({error.status_code})",
                "Correct `base_url`, the model's name or the sampling settings; `leave_out` drops "
                "settings that a model does not take.",
            )
        case openai.APIConnectionError():
            return told(
                "RM561",
                f"cannot be reached{tried}",
                "Start the endpoint, or correct `base_url` of the backbone and build again.",
            )
    return unusable(entry, f"is no answer of OpenAI's form ({type(error).__name__})")


def unusable(entry: RemoteEntry, why: str) -> RecmasError:
    """Return RM565 for a reply of which no text can be taken."""
    return fail(
        "RM565",
        f"the reply of {entry.name} {why}",
        hint="Ask the endpoint by hand (`curl BASE_URL/chat/completions`) to see what it sends; "
        "`base_url` goes up to and with its version, such as /v1.",
    )


def no_key(entry: RemoteEntry, agents: str) -> RecmasError:
    """Return RM560 for a variable that is not set, or empty."""
    return fail(
        "RM560",
        f"the environment variable {entry.api_key_env} is not set, which holds the key of "
        f"{entry.name} for {agents}",
        hint=f"Set it where the bundle runs: export {entry.api_key_env}=... (a bundle holds no "
        "keys).",
    )


def _is_too_long(error: Any) -> bool:
    return bool(_TOO_LONG.search(f"{getattr(error, 'code', '')} {error}"))


def _said(error: Exception, key: str | None) -> str:
    """Return what the endpoint or the network said, in one line, without the key."""
    body = getattr(error, "body", None)
    cause = error.__cause__
    text = str(error)
    if isinstance(body, dict) and isinstance(body.get("message"), str):
        text = body["message"]
    elif cause is not None and not hasattr(error, "status_code"):
        text = f"{type(cause).__name__}: {cause}" if str(cause) else type(cause).__name__
    text = " ".join(text.split())
    if key:
        text = text.replace(key, "***")
    return text if len(text) <= _SHOWN_CHARS else f"{text[:_SHOWN_CHARS]}..."
