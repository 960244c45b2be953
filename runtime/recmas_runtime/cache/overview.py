"""What both command lines say of the cache: its entries, and what was removed."""

from __future__ import annotations

import time
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

from recmas_runtime.cache.settings import FOLDER_VARIABLE, OFF, size_of, user_store
from recmas_runtime.cache.store import Kept, Store
from recmas_runtime.core.errors import fail
from recmas_runtime.core.files import reason_of
from recmas_runtime.core.text import counted, human_bytes


@dataclass(frozen=True)
class Told:
    """A text for people, and the same as JSON."""

    text: str
    data: dict[str, Any]


def list_cache() -> Told:
    """List what is kept, what was used last first.

    Raises:
        RecmasError: RM305 without a cache.
    """
    store = _store()
    kept, size_bytes = store.entries(), store.size_bytes()
    width = max((len(each.entry.kind) for each in kept), default=0)
    lines = [_line(each, width) for each in kept]
    total = f"{counted(len(kept), 'part')}, {human_bytes(size_bytes)}"
    total += f" of at most {human_bytes(store.limit_bytes)}, in {store.folder}"
    return Told(
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


def prune_cache(size: str | None, *, everything: bool) -> Told:
    """Remove what was not used for longest, until no more is kept than may be.

    Args:
        size: How much to keep, such as `2 GB`; None for as much as may be.

    Raises:
        RecmasError: RM305 without a cache or for a size that is none, RM506 for both arguments,
            RM303 if it cannot be written to.
    """
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
    return Told(
        text=f"Removed {counted(pruned.num_removed, 'part')}, {human_bytes(pruned.freed_bytes)}; "
        f"{human_bytes(pruned.left_bytes)} are left in {store.folder}.",
        data={
            "folder": str(store.folder),
            "removed": pruned.num_removed,
            "freed_bytes": pruned.freed_bytes,
            "size_bytes": pruned.left_bytes,
        },
    )


def locate_cache() -> Told:
    """Tell the cache's folder, or that there is none."""
    store = user_store()
    folder = None if store is None else str(store.folder)
    return Told(
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
