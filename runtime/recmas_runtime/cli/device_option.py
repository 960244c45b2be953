"""The option `--device` of the command line: a device, or one for a backbone, repeated."""

from __future__ import annotations

import argparse
from typing import Any

from recmas_runtime.core.errors import RecmasError
from recmas_runtime.engines.devices import DeviceChoice
from recmas_runtime.formats.precisions import AUTO, DEVICES


def add_device_option(parser: argparse.ArgumentParser) -> None:
    """Add the option; its value is one text that `DeviceChoice.parse` reads."""
    parser.add_argument(
        "--device",
        default=AUTO,
        type=_device,
        action=_Joined,
        metavar="[BACKBONE=]DEVICE",
        help=f"where to run: {', '.join(DEVICES)}, or cuda:1 for the second GPU; auto takes what "
        "the bundle says of a backbone, or the best that is there; may be repeated",
    )


def _device(text: str) -> str:
    try:
        DeviceChoice.parse(text)
    except RecmasError:
        known = f"{', '.join(DEVICES)}, cuda:1 or BACKBONE=DEVICE"
        raise argparse.ArgumentTypeError(
            f"invalid choice: {text!r} (choose from {known})"
        ) from None
    return text


class _Joined(argparse.Action):
    """Puts the values of a repeated option together, with commas between."""

    def __call__(
        self,
        parser: argparse.ArgumentParser,
        namespace: argparse.Namespace,
        values: Any,
        option_string: str | None = None,
    ) -> None:
        """Add a value to those before; the default is none of them."""
        given = vars(namespace).setdefault("given_devices", [])
        given.append(values)
        setattr(namespace, self.dest, ",".join(given))
