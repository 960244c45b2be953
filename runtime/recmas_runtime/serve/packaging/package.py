"""Files that make a container of a bundle: `templates` holds them, this fills them in."""

from __future__ import annotations

import re
import secrets
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, Final
from urllib.parse import urlsplit

import jinja2

from recmas_runtime.core.addresses import is_loopback
from recmas_runtime.core.errors import fail
from recmas_runtime.core.text import human_bytes
from recmas_runtime.formats.bundle import Bundle, keep_out
from recmas_runtime.formats.manifest import MANIFEST_NAME
from recmas_runtime.serve.operation.memory import PROCESS_BYTES, BundleNeeds
from recmas_runtime.serve.service import ServiceLimits

_PACKAGE: Final = Path(__file__).parents[2]
_TEMPLATES: Final = Path(__file__).parent / "templates"
# Where a template's name differs from what is written: tools would take it for their own.
_NAMES: Final = {"dockerignore": ".dockerignore", "env": ".env"}
_BUNDLE: Final = "bundle"
_RUNTIME: Final = "runtime"
_MIB: Final = 2**20
_REFERENCE: Final = re.compile(
    r"[a-z0-9][a-z0-9._/:-]*(:[A-Za-z0-9._-]{1,128})?(@sha256:[0-9a-f]{64})?"
)


@dataclass(frozen=True, kw_only=True)
class PackageOptions:
    """What a package is made with.

    Attributes:
        image: Its name and tag; None for `recmas/NAME` with the beginning of the fingerprint.
        base: The image that has Python.
        max_batch: Requests at a time; None for what the bundle was planned for.
    """

    image: str | None = None
    base: str = "python:3.11.14-slim-bookworm"
    cpus: int = 4
    max_batch: int | None = None
    replicas: int = 2


@dataclass(frozen=True, kw_only=True)
class Package:
    """What was written.

    Attributes:
        memory_bytes: What a container gets; see `memory_note`.
        remote_keys: Environment variables with the keys of models behind an API, which the bundle
            names and only its owner has.
        unreachable: Endpoints that are on this machine, and so not on a container's.
    """

    folder: Path
    image: str
    memory_bytes: int
    memory_note: str
    files: tuple[str, ...]
    remote_keys: tuple[str, ...] = ()
    unreachable: tuple[str, ...] = ()

    def to_json(self) -> dict[str, Any]:
        """Return the form that `--json` prints."""
        return {
            "folder": str(self.folder),
            "image": self.image,
            "memory_bytes": self.memory_bytes,
            "files": list(self.files),
            "remote_keys": list(self.remote_keys),
            "unreachable": list(self.unreachable),
        }

    @property
    def text(self) -> str:
        """What comes next, for people."""
        lines = [
            f"{self.folder}: {len(self.files)} files, the runtime and the bundle.",
            f"Build and start it with its metrics: cd {self.folder} && docker compose up --build",
            f"Memory of a container: {self.memory_note}",
            "Its keys are in .env: keep that file to yourself.",
        ]
        if self.remote_keys:
            names = ", ".join(self.remote_keys)
            lines.append(f"Write the keys of models behind an API there, too: {names}.")
        lines += [
            f"{url} is this machine, and in a container the container itself: build the bundle "
            "with an address that is reached from there."
            for url in self.unreachable
        ]
        return "\n".join(lines)


def write_package(bundle: Bundle, out: Path, options: PackageOptions, *, force: bool) -> Package:
    """Write a folder that `docker build`, `docker compose` and `kubectl apply` take.

    Keys that are there from an earlier time stay.

    Raises:
        RecmasError: RM506 for options that no image can have, or a folder in the bundle, RM520 for
            a folder that holds something, unless `force` writes over it.
    """
    keep_out(bundle.root, {"--output": out})
    values = _values(bundle, options)
    if out.exists() and (not out.is_dir() or any(out.iterdir())) and not (force and out.is_dir()):
        raise fail(
            "RM520",
            f"{out} holds something already",
            hint="Name a folder that does not exist yet or is empty; --force writes over the files "
            "of an earlier package and leaves its keys.",
        )
    for folder in (_BUNDLE, _RUNTIME):
        if (out / folder).exists():
            shutil.rmtree(out / folder)
    for name in (MANIFEST_NAME, *bundle.manifest.files):
        (out / _BUNDLE / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(bundle.root / name, out / _BUNDLE / name)
    caches = shutil.ignore_patterns("__pycache__")
    shutil.copytree(_PACKAGE, out / _RUNTIME / _PACKAGE.name, ignore=caches)
    written = []
    for name, text in _filled(values):
        written.append(name)
        if name == ".env" and (out / name).exists():
            continue
        (out / name).parent.mkdir(parents=True, exist_ok=True)
        (out / name).touch(mode=0o600 if name == ".env" else 0o644)
        (out / name).write_text(text, encoding="utf-8", newline="\n")
    return Package(
        folder=out,
        image=values["image"],
        memory_bytes=values["memory_mib"] * _MIB,
        memory_note=values["memory_note"],
        files=tuple(sorted(written)),
        remote_keys=tuple(values["remote_keys"]),
        unreachable=tuple(
            sorted(
                url
                for url in {entry.base_url for entry in bundle.manifest.remotes.values()}
                if is_loopback(urlsplit(url).hostname or "")
            )
        ),
    )


def _values(bundle: Bundle, options: PackageOptions) -> dict[str, Any]:
    """Return what templates show."""
    name = re.sub(r"[^a-z0-9]+", "-", bundle.plan.name.lower()).strip("-")[:50] or "system"
    image = options.image or f"recmas/{name}:{bundle.manifest.fingerprint[:12]}"
    for option, reference in (("--image", image), ("--base", options.base)):
        if not _REFERENCE.fullmatch(reference):
            message = f"{option} {reference!r} is no name of an image"
            raise fail("RM506", message, hint="Write it as registry.example.org/name:tag.")
    max_batch = options.max_batch or bundle.plan.limits.max_batch
    memory_mib, note = _memory(bundle, max_batch)
    return {
        "name": name,
        "image": image,
        "base": options.base,
        "user": 10001,
        "port": 8000,
        "cpus": options.cpus,
        "max_batch": max_batch,
        "replicas": options.replicas,
        "grace_s": 30,
        "memory_mib": memory_mib,
        "memory_note": note,
        "prometheus_image": "prom/prometheus:v3.5.0",
        "grafana_image": "grafana/grafana:12.1.0",
        "api_key": secrets.token_hex(32),
        "grafana_password": secrets.token_hex(16),
        "has_remotes": bool(bundle.manifest.remotes),
        "remote_keys": sorted(
            {each.api_key_env for each in bundle.manifest.remotes.values() if each.api_key_env}
        ),
    }


def _memory(bundle: Bundle, max_batch: int) -> tuple[int, str]:
    """Return the memory that a container needs, in MiB, and of what it is the sum."""
    needs, kept_bytes = BundleNeeds.of(bundle), ServiceLimits().kept_bytes
    memory_mib = -(-needs.whole_bytes(max_batch=max_batch, kept_bytes=kept_bytes) // _MIB)
    return memory_mib, (
        f"{memory_mib} MiB = weights {human_bytes(needs.weight_bytes)} + {max_batch} requests of "
        f"{human_bytes(needs.bytes_per_request)} + kept prompts {human_bytes(kept_bytes)} + "
        f"processes {human_bytes(PROCESS_BYTES)}"
    )


def _filled(values: dict[str, Any]) -> Iterator[tuple[str, str]]:
    """Yield the files by their names, filled in; a dashboard is written as it is."""
    environment = jinja2.Environment(  # noqa: S701 - no HTML
        undefined=jinja2.StrictUndefined, keep_trailing_newline=True
    )
    for path in sorted(path for path in _TEMPLATES.rglob("*") if path.is_file()):
        name = path.relative_to(_TEMPLATES).as_posix()
        text = path.read_text(encoding="utf-8")
        if path.name == "requirements.txt":
            lines = environment.from_string(text).render(values).splitlines()
            text = "".join(f"{_pinned(line)}\n" for line in lines)
        elif path.suffix != ".json":
            text = environment.from_string(text).render(values)
        yield _NAMES.get(name, name), text


def _pinned(requirement: str) -> str:
    """Return a requirement at the version that is installed here, if one is."""
    name, _, _ = requirement.partition(">=")
    try:
        return f"{name}=={version(name)}"
    except PackageNotFoundError:
        return requirement
