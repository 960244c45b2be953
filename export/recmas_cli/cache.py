"""`recmasc cache`: what builds keep for later ones."""

from __future__ import annotations

import time
from datetime import UTC, datetime

import click

from recmas_cli.console import Outcome, command
from recmas_runtime.cache.settings import FOLDER_VARIABLE, OFF, size_of, user_store
from recmas_runtime.cache.store import Kept, Store
from recmas_runtime.core.errors import fail
from recmas_runtime.core.files import reason_of
from recmas_runtime.core.text import counted, human_bytes


@click.group()
def cache() -> None:
    """Show or shrink what builds keep for later ones.

    RECMAS_CACHE names its folder, or is `off`; RECMAS_CACHE_SIZE is how large it may get.
    """


@cache.command("ls")
@command
def ls() -> Outcome:
    """List what is kept, what was used last first."""
    store = _store()
    kept, size_bytes = store.entries(), store.size_bytes()
    width = max((len(each.entry.kind) for each in kept), default=0)
    lines = [_line(each, width) for each in kept]
    total = f"{counted(len(kept), 'part')}, {human_bytes(size_bytes)}"
    total += f" of at most {human_bytes(store.limit_bytes)}, in {store.folder}"
    return Outcome(
        text="\n".join([*lines, total]),
        data={
            "folder": str(store.folder),
            "size_bytes": size_bytes,
            "limit_bytes": store.limit_bytes,
            "parts": [
                {
                    "key": each.key,
                    "kind": each.entry.kind,
                    "about": each.entry.about,
                    "size_bytes": each.size_bytes,
                    "used": datetime.fromtimestamp(each.used_s, UTC).isoformat(timespec="seconds"),
                }
                for each in kept
            ],
        },
    )


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
    if everything and size is not None:
        raise fail("RM506", "--all and --to say different things", hint="Give one of them.")
    store = _store()
    limit_bytes = store.limit_bytes if size is None else size_of(size, said_by="--to")
    try:
        pruned = store.prune(0 if everything else limit_bytes)
    except OSError as error:
        raise fail(
            "RM303",
            f"the cache cannot be written to: {reason_of(error)}",
            file=str(store.folder),
            hint="Run this as the user who owns it.",
        ) from error
    return Outcome(
        text=f"Removed {counted(pruned.num_removed, 'part')}, {human_bytes(pruned.freed_bytes)}; "
        f"{human_bytes(pruned.left_bytes)} are left in {store.folder}.",
        data={
            "folder": str(store.folder),
            "removed": pruned.num_removed,
            "freed_bytes": pruned.freed_bytes,
            "size_bytes": pruned.left_bytes,
        },
    )


@cache.command("where")
@command
def where() -> Outcome:
    """Print the cache's folder."""
    store = user_store()
    folder = None if store is None else str(store.folder)
    return Outcome(
        text=OFF if folder is None else folder,
        data={"folder": folder, "limit_bytes": None if store is None else store.limit_bytes},
    )


def _store() -> Store:
    store = user_store()
    if store is None:
        raise fail(
            "RM305",
            f"there is no cache of builds: {FOLDER_VARIABLE} is `{OFF}`",
            hint=f"Set {FOLDER_VARIABLE} to its folder, or unset it.",
        )
    return store


def _line(kept: Kept, width: int) -> str:
    ago_h = max(0.0, time.time() - kept.used_s) / 3600
    used = f"{ago_h * 60:.0f} min ago" if ago_h < 1 else f"{ago_h:.0f} h ago"
    if ago_h >= 48:
        used = f"{ago_h / 24:.0f} days ago"
    size = human_bytes(kept.size_bytes)
    return f"{kept.key[:8]}  {kept.entry.kind:<{width}}  {size:>8}  {used:>11}  {kept.entry.about}"
