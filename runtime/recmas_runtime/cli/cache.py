"""`recmas cache`: what loaded bundles, and builds, keep on this machine for later."""

from __future__ import annotations

import argparse
from typing import Any

from recmas_runtime.core.errors import fail


def add_cache_options(parser: argparse.ArgumentParser) -> None:
    """Add what the command takes."""
    parser.add_argument(
        "action",
        choices=("ls", "prune", "where"),
        help="list what is kept, remove what was not used for longest, or print the folder",
    )
    parser.add_argument("--to", metavar="SIZE", help="prune: how much to keep, such as `2 GB`")
    parser.add_argument("--all", action="store_true", help="prune: keep nothing")


def run_cache(options: argparse.Namespace, data: dict[str, Any]) -> str:
    """Do what the command line asks, put it into `data` and return it as text.

    Raises:
        RecmasError: RM506 for options of another action, and what `cache.overview` raises.
    """
    from recmas_runtime.cache.overview import list_cache, locate_cache, prune_cache

    if options.action != "prune" and (options.to is not None or options.all):
        hint = "Use them with `recmas cache prune`."
        raise fail("RM506", f"--to and --all mean nothing to `cache {options.action}`", hint=hint)
    if options.action == "prune":
        told = prune_cache(options.to, everything=options.all)
    else:
        told = list_cache() if options.action == "ls" else locate_cache()
    data |= told.data
    return told.text
