"""Which bundles a service offers, by name, as they come and go."""

from __future__ import annotations

import asyncio
import hashlib
import os
import re
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Final

from recmas_runtime.core.errors import RecmasError, fail
from recmas_runtime.core.text import human_bytes
from recmas_runtime.formats.bundle import Bundle, is_engine_file, open_bundle
from recmas_runtime.formats.manifest import MANIFEST_NAME
from recmas_runtime.serve.log import ServiceLog
from recmas_runtime.serve.operation.memory import BundleNeeds
from recmas_runtime.serve.protocol import ModelInfo
from recmas_runtime.serve.service import Service, ServiceError

# What stands in requests, addresses, logs and labels of metrics.
_NAME: Final = re.compile(r"[A-Za-z0-9](?:[\w.:@+-]|/(?=\w)){0,127}", re.ASCII)
_LOOK_S: Final = 1.0
# A worker that died while it loaded a bundle may have died of another cause, but not twice.
_MOST_DEATHS: Final = 2


def named_bundles(arguments: Iterable[str]) -> dict[str, Bundle]:
    """Open bundles that are given as `BUNDLE` or `NAME=BUNDLE`; by name, else by the system's.

    Raises:
        RecmasError: RM545 for names that are taken or none, RM4xx for bundles that are broken.
    """
    bundles: dict[str, Bundle] = {}
    for argument in arguments:
        name, path = _name_and_path(argument)
        bundle = open_bundle(path)
        name = check_name(name or bundle.plan.name)
        if name in bundles:
            raise fail(
                "RM545",
                f"two bundles are named {name!r}: {bundles[name].root} and {bundle.root}",
                hint="Give one of them another name, with NAME=BUNDLE.",
            )
        bundles[name] = bundle
    return bundles


def check_name(name: str) -> str:
    """Return the name of a model.

    Raises:
        RecmasError: RM545 if it is none.
    """
    if not _NAME.fullmatch(name):
        hint = "Take up to 128 letters, digits and . _ - : @ + / in it, a letter or digit first."
        raise fail("RM545", f"{name!r} is no name of a model", hint=hint)
    return name


def _name_and_path(argument: str) -> tuple[str, str]:
    name, equals, path = argument.partition("=")
    is_path = not equals or os.path.lexists(argument)
    return ("", argument) if is_path else (name, path)


class Catalog:
    """Adds and removes models of a running service."""

    def __init__(self, service: Service, available_bytes: Callable[[], int | None]) -> None:
        self._service = service
        self._available_bytes = available_bytes

    async def add(self, path: str, name: str) -> ModelInfo:
        """Load a bundle; one that has the name already answers until the new one is loaded.

        Raises:
            RecmasError: RM545 for a name that is none or weights that do not fit, RM4xx for a
                bundle that is broken.
            ServiceError: The engines refuse it.
        """
        check_name(name)
        bundle = await asyncio.to_thread(open_bundle, path)
        needs, free = BundleNeeds.of(bundle), self._available_bytes()
        needed = needs.weight_bytes + needs.bytes_per_request
        if free is not None and needed > free:
            message = (
                f"weights and the caches of one request take {human_bytes(needed)}, and "
                f"{human_bytes(free)} are free"
            )
            raise fail("RM545", message, hint="Remove a model first.", file=path)
        return await self._service.load(str(bundle.root), name)

    async def remove(self, name: str) -> None:
        """Let a model go; its requests end first.

        Raises:
            ServiceError: There is none of that name.
        """
        await self._service.unload(name)


class WatchedFolder:
    """Keeps models in step with the folders in one folder: each with a bundle is a model.

    A bundle counts once nothing of it has changed between two looks, so that one that is being
    copied is not taken for a broken one. One that is broken is reported once, and what had its name
    stays loaded.
    """

    def __init__(self, folder: Path, catalog: Catalog, service: Service, log: ServiceLog) -> None:
        self._folder = folder
        self._catalog = catalog
        self._service = service
        self._log = log
        self._seen: dict[str, str] = {}  # states at the last look
        self._settled: dict[str, str] = {}  # states that are loaded, or given up
        self._loaded: set[str] = set()
        self._deaths: dict[str, int] = {}

    async def run(self) -> None:
        """Look again and again."""
        while True:
            await asyncio.sleep(_LOOK_S)
            try:
                await self.look()
            except Exception as error:  # a bug of ours; the models that are loaded go on
                self._log.error("watched folder", reason=repr(error))

    async def look(self, *, at_once: bool = False) -> None:
        """Load what is new or changed, and let go of what is gone.

        Args:
            at_once: Also what was not there at the last look.
        """
        service = self._service
        if not service.is_ready and (service.models or not service.lost):
            return
        try:
            found = await asyncio.to_thread(_states, self._folder)
        except OSError as error:  # a disk that is away for a moment removes nothing
            self._log.warning("watched folder not read", path=str(self._folder), reason=str(error))
            return
        before, self._seen = self._seen, found
        for name in sorted(self._settled.keys() - found.keys()):
            del self._settled[name]
            if name in self._loaded:
                await self._remove(name)
        for name, state in sorted(found.items()):
            is_quiet = at_once or before.get(name) == state
            if is_quiet and self._settled.get(name) != state:
                await self._add(name, state)

    async def _add(self, name: str, state: str) -> None:
        path = str(self._folder / name)
        try:
            if name in self._service.models and name not in self._loaded:
                hint = "Rename the folder."
                raise fail("RM545", f"a model {name!r} was loaded from elsewhere", hint=hint)
            await self._catalog.add(path, name)
        except ServiceError as error:
            if error.reason == "stopped":
                self._deaths[state] = deaths = self._deaths.get(state, 0) + 1
                if deaths < _MOST_DEATHS:
                    return  # the engines are started again
            self._log.error("not loaded", model=name, path=path, reason=str(error))
        except RecmasError as error:
            self._log.error("not loaded", model=name, path=path, reason=str(error))
        else:
            self._loaded.add(name)
        self._settled[name] = state

    async def _remove(self, name: str) -> None:
        self._loaded.discard(name)
        try:
            await self._catalog.remove(name)
        except ServiceError as error:
            self._log.error("not removed", model=name, reason=str(error))


def _states(folder: Path) -> dict[str, str]:
    """Return the folders with bundles, and for each what changes when a file of it does."""
    states = {}
    for place in folder.iterdir():
        # Builds write into folders that begin with a dot, and rename them when they are whole.
        if place.name.startswith(".") or not (place / MANIFEST_NAME).is_file():
            continue
        digest = hashlib.sha256()
        for path in sorted(place.rglob("*")):
            relative = path.relative_to(place).as_posix()
            if path.is_file() and not is_engine_file(relative):
                stat = path.stat()
                facts = f"{relative}\0{stat.st_size}\0{stat.st_mtime_ns}\0{stat.st_ino}\n"
                digest.update(facts.encode("utf-8", "surrogateescape"))
        states[place.name] = digest.hexdigest()
    return states
