"""The options of `recmas serve`: apart from what serves, so that help needs none of that."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Final

from recmas_runtime.serve.log import LOG_FORMATS

KEY_VARIABLE: Final = "RECMAS_API_KEY"


def add_serve_options(parser: argparse.ArgumentParser) -> None:
    """Declare what the command takes, but for the machine."""
    parser.add_argument(
        "bundles",
        nargs="*",
        metavar="[NAME=]BUNDLE",
        help="a model that requests may ask; its name is the system's without NAME",
    )
    parser.add_argument(
        "--watch",
        type=Path,
        metavar="FOLDER",
        help="each bundle in it is a model of its folder's name, loaded, replaced and removed as "
        "the folders are",
    )
    address = parser.add_argument_group("address and access")
    address.add_argument("--host", default="127.0.0.1", help="to listen on [default: %(default)s]")
    address.add_argument(
        "--port", type=int, default=8000, metavar="N", help="[default: %(default)s]; 0: a free one"
    )
    address.add_argument(
        "--api-key-file",
        type=Path,
        metavar="FILE",
        help=f"keys that requests must have one of, a line each; or ${KEY_VARIABLE}",
    )
    address.add_argument(
        "--allowed-hosts",
        metavar="NAME,...",
        help="host names that requests may name besides this machine's and --host; * for any",
    )
    address.add_argument(
        "--cors-origin",
        dest="cors_origins",
        action="append",
        default=[],
        metavar="ORIGIN",
        help="pages of this origin, scheme://host[:port] or *, may read answers; may be repeated",
    )
    address.add_argument(
        "--insecure",
        action="store_true",
        help="let others than this machine's programs ask without a key",
    )
    address.add_argument("--open-metrics", action="store_true", help="/metrics needs no key")
    load = parser.add_argument_group("how much it takes on")
    load.add_argument(
        "--max-batch", type=int, metavar="N", help="requests at a time; default: the bundles' limit"
    )
    load.add_argument(
        "--max-queue",
        type=int,
        default=64,
        metavar="N",
        help="requests that may wait [default: %(default)s]",
    )
    load.add_argument(
        "--max-wait-ms", type=int, metavar="MS", help="refuse requests that waited so long"
    )
    load.add_argument(
        "--request-timeout", type=float, metavar="S", help="most seconds of an answer"
    )
    load.add_argument(
        "--keep-memory",
        type=int,
        default=256,
        metavar="MIB",
        help="for beginnings of prompts that later requests may share [default: %(default)s]",
    )
    load.add_argument(
        "--grace",
        type=float,
        default=30.0,
        metavar="S",
        help="seconds that running requests get when a signal ends it [default: %(default)g]",
    )
    told = parser.add_argument_group("what it tells")
    told.add_argument(
        "--log-format", default="text", choices=LOG_FORMATS, help="[default: %(default)s]"
    )
    told.add_argument(
        "--log-prompts", action="store_true", help="questions and answers go into the log"
    )
    told.add_argument(
        "--otlp", metavar="URL", help="send spans of OpenTelemetry to this collector (extra `otel`)"
    )
