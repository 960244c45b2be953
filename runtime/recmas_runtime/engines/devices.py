"""Which backbone of a bundle runs on which device, as callers and the bundle say."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from recmas_runtime.core.errors import RecmasError, fail
from recmas_runtime.core.text import listed
from recmas_runtime.formats.precisions import AUTO, device_named


@dataclass(frozen=True, kw_only=True)
class DeviceChoice:
    """Where the backbones of a bundle are to run; what is said here goes before the bundle's own.

    Attributes:
        default: Of backbones that are not named; `auto` for what the bundle says of each.
    """

    default: str
    by_backbone: Mapping[str, str]

    @classmethod
    def parse(cls, text: str) -> DeviceChoice:
        """Return what a text says: a device, `BACKBONE=DEVICE`, or several with commas between.

        Raises:
            RecmasError: RM504 for a name of no device, or two devices for one backbone.
        """
        default: list[str] = []
        by_backbone: dict[str, str] = {}
        for part in (part.strip() for part in text.split(",")):
            backbone, is_named, device = part.rpartition("=")
            device_named(device)
            if not is_named:
                default.append(device)
            elif by_backbone.setdefault(backbone, device) != device:
                raise _twice(f"backbone {backbone!r}", [by_backbone[backbone], device])
        if len(set(default)) > 1:
            raise _twice("all backbones", default)
        return cls(default=default[0] if default else AUTO, by_backbone=by_backbone)

    def of(self, declared: Mapping[str, str]) -> dict[str, str]:
        """Return the device of each backbone, with the bundle's own by name.

        Raises:
            RecmasError: RM504 for a backbone that the bundle does not have.
        """
        for name in self.by_backbone:
            if name not in declared:
                raise fail(
                    "RM504",
                    f"a device is given for backbone {name!r}; the bundle has {listed(declared)}",
                    hint="Write --device BACKBONE=DEVICE with one of these.",
                )
        own = declared if self.default == AUTO else dict.fromkeys(declared, self.default)
        return {**own, **self.by_backbone}


def needs_gpu(text: str) -> bool:
    """Whether what `DeviceChoice.parse` reads asks for a GPU by name."""
    choice = DeviceChoice.parse(text)
    named = {choice.default, *choice.by_backbone.values()}
    return any(device_named(device).kind not in (AUTO, "cpu") for device in named)


def joined(devices: Mapping[str, str]) -> str:
    """Return where backbones run in a line: the device of all, or each with its own."""
    if len(set(devices.values())) == 1:
        return next(iter(devices.values()))
    return ", ".join(f"{name}={device}" for name, device in devices.items())


def _twice(what: str, devices: Iterable[str]) -> RecmasError:
    return fail(
        "RM504",
        f"two devices are given for {what}: {listed(list(devices))}",
        hint="Give one, and BACKBONE=DEVICE for backbones that run elsewhere.",
    )
