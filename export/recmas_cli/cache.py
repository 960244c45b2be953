"""`recmasc cache`: what builds and loaded bundles keep for later."""

from __future__ import annotations

import click

from recmas_cli.console import Outcome, command
from recmas_runtime.cache.overview import Told, list_cache, locate_cache, prune_cache


@click.group()
def cache() -> None:
    """Show or shrink what builds and loaded bundles keep for later.

    RECMAS_CACHE names its folder, or is `off`; RECMAS_CACHE_SIZE is how large it may get.
    """


@cache.command("ls")
@command
def ls() -> Outcome:
    """List what is kept, what was used last first."""
    return _outcome(list_cache())


@cache.command("prune")
@click.option(
    "--to",
    "size",
    metavar="SIZE",
    help="How much to keep, such as `2 GB`  [default: RECMAS_CACHE_SIZE].",
)
@click.option("--all", "everything", is_flag=True, help="Keep nothing.")
@command
def prune(size: str | None, *, everything: bool) -> Outcome:
    """Remove what was not used for longest, until no more is kept than may be."""
    return _outcome(prune_cache(size, everything=everything))


@cache.command("where")
@command
def where() -> Outcome:
    """Print the cache's folder."""
    return _outcome(locate_cache())


def _outcome(told: Told) -> Outcome:
    return Outcome(text=told.text, data=told.data)
