"""How a bundle tells where its links come from: the receipts of the training that made them."""

from __future__ import annotations

import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import Final

from recmas_compiler.links.trained import RECEIPT_NAME, read_receipt, vouched_digests
from recmas_runtime.core.files import sha256_of

FOLDER: Final = "training"


def receipts_of(link_files: Iterable[str]) -> tuple[Path, ...]:
    """Return the training receipts that vouch for at least one of the files, in order.

    Args:
        link_files: Absolute paths; a receipt lies beside the links it vouches for.
    """
    digests: dict[Path, set[str]] = {}
    for file in link_files:
        digests.setdefault(Path(file).parent, set()).add(sha256_of(Path(file)))
    found = []
    for folder, used in digests.items():
        receipt = read_receipt(folder / RECEIPT_NAME)
        if receipt is not None and used & set(vouched_digests(receipt).values()):
            found.append(folder / RECEIPT_NAME)
    return tuple(found)


def write_receipts(receipts: Iterable[Path], folder: Path) -> None:
    """Copy receipts into a bundle: `training/receipt.json`, then `receipt-2.json` and so on."""
    for number, receipt in enumerate(receipts, start=1):
        target = folder / FOLDER / (RECEIPT_NAME if number == 1 else f"receipt-{number}.json")
        target.parent.mkdir(exist_ok=True)
        shutil.copyfile(receipt, target)
