"""What an HTTP front end is set to, and what it tells of itself."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Final, Protocol

from recmas_runtime.core.addresses import is_loopback
from recmas_runtime.core.errors import fail
from recmas_runtime.serve.keys import check_key

# As browsers write it: in lower case, and what is not ASCII as punycode.
_ORIGIN: Final = re.compile(
    r"(?P<scheme>[a-z][a-z0-9+.-]*)://(?:[a-z0-9._-]+|\[[0-9a-f:.]+\])(?::(?P<port>[1-9][0-9]{0,4}))?"
)
_PORTS: Final = {"http": "80", "https": "443"}
_LOOPBACK: Final = ("localhost", "127.0.0.1", "[::1]")
_EVERYWHERE: Final = ("0.0.0.0", "::", "[::]", "")  # noqa: S104


class MetricsSource(Protocol):
    """Writes the page that `/metrics` shows; what the service does is seen by its observers.

    Attributes:
        content_type: Of that page.
    """

    content_type: str

    def render(self) -> bytes:
        """Return the page."""

    def on_refusal(self, reason: str, code: str) -> None:
        """An error was told that no observer of the service has seen."""

    def on_response(self, route: str, status: int, seconds: float) -> None:
        """Receive the end of an HTTP response.

        Args:
            route: The path as it is declared, such as `/v1/models/{id}`; `other` for none of ours.
            status: 499 if the client left first.
        """


@dataclass(frozen=True, kw_only=True)
class HttpSettings:
    """How an HTTP front end listens and what it bounds.

    Attributes:
        host: The address that is bound; requests may name it as their host.
        api_keys: Any of them opens what needs a key; without one nothing needs a key.
        allowed_hosts: Host names that requests may name besides those of this machine and `host`;
            `*` for any.
        cors_origins: Origins whose pages may read answers, as `https://example.org`; `*` for any.
        open_metrics: Whether `/metrics` needs no key.
        max_body_bytes: Of a request.
        body_timeout_s: In which a request's body must arrive.
        max_requests: HTTP requests at a time, streams that nobody reads included.
        request_timeout_s: In which an answer must be whole; None for as long as it takes.
        stall_timeout_s: How long a client of a stream may take nothing.
        first_event_s: How long a stream waits for a reason to refuse it with a status of its own.
        comment_s: Between two signs of life in a stream.
        chunk_s: Between two chunks of a stream, empty ones included; some clients parse no other.
        max_choices: Answers and readings of one HTTP request.
    """

    host: str = "127.0.0.1"
    port: int = 8000
    api_keys: tuple[str, ...] = ()
    allowed_hosts: tuple[str, ...] = ()
    cors_origins: tuple[str, ...] = ()
    open_metrics: bool = False
    max_body_bytes: int = 4 * 2**20
    body_timeout_s: float = 30.0
    max_requests: int = 1024
    request_timeout_s: float | None = None
    stall_timeout_s: float = 60.0
    first_event_s: float = 1.0
    comment_s: float = 15.0
    chunk_s: float = 45.0
    max_choices: int = 128

    def __post_init__(self) -> None:
        """Refuse what would open a service by mistake."""
        for key in self.api_keys:
            check_key(key)
        for origin in self.cors_origins:
            _check_origin(origin)

    @property
    def is_loopback(self) -> bool:
        """Whether only this machine can reach the address that is bound."""
        return is_loopback(self.host)

    @property
    def hosts(self) -> frozenset[str]:
        """Host names that requests may name, in lower case, without ports."""
        # Addresses that stand for all of a machine's are names of none.
        own = () if self.host in _EVERYWHERE else (_as_host(self.host),)
        named = (*_LOOPBACK, *own, *map(_as_host, self.allowed_hosts))
        return frozenset(name.lower().rstrip(".") for name in named)


def _check_origin(origin: str) -> None:
    """Refuse what no browser sends: an origin is compared as it is."""
    found = _ORIGIN.fullmatch(origin)
    says_port = found is not None and found["port"] is not None
    if origin != "*" and (
        found is None or (says_port and found["port"] == _PORTS.get(found["scheme"]))
    ):
        raise fail(
            "RM545",
            f"{origin!r} is no origin that a browser sends",
            hint="Give scheme://host[:port] in lower case, without a path and without the port "
            "that the scheme has anyway, such as https://app.example.org; or * for any.",
        )


def _as_host(address: str) -> str:
    """Return an address as a Host header has it."""
    return f"[{address}]" if address.count(":") > 1 and not address.startswith("[") else address
