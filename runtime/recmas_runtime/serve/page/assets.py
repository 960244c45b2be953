"""The files of the page and of reports, and what a browser may do with them."""

from __future__ import annotations

import base64
import hashlib
from pathlib import Path
from typing import Final

_STATIC: Final = Path(__file__).with_name("static")

# In the order in which they need each other.
_DRAWING: Final = ("elements.js", "graph.js", "trace.js")
PAGE_SCRIPTS: Final = (*_DRAWING, "client.js", "page.js")
REPORT_SCRIPTS: Final = (*_DRAWING, "report.js")

# By name the media type of what the page loads.
ASSETS: Final = {
    "style.css": "text/css",
    "icon.svg": "image/svg+xml",
    **dict.fromkeys(PAGE_SCRIPTS, "text/javascript"),
}

# Nothing but the page's own files runs, nothing but its own service is asked.
PAGE_POLICY: Final = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; connect-src 'self'; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)


def asset(name: str) -> str:
    """Return the text of a file."""
    return (_STATIC / name).read_text(encoding="ascii")


def report_policy(style: str, script: str) -> str:
    """Return the policy of a file that holds this style and this script and runs nothing else."""
    return (
        f"default-src 'none'; script-src '{_digest(script)}'; style-src '{_digest(style)}'; "
        "base-uri 'none'; form-action 'none'"
    )


def _digest(text: str) -> str:
    return f"sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}"
