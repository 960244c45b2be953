"""The `train` section with its paths resolved: what every part of a run is given."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from recmas_compiler.links.trained import links_folder
from recmas_compiler.spec.document.places import path_of
from recmas_compiler.spec.document.problems import problem_at
from recmas_compiler.spec.schema.section import Section
from recmas_compiler.spec.schema.train import TrainSection
from recmas_compiler.spec.spec import Spec
from recmas_runtime.core.errors import RecmasError

# What a run may change between two starts and still end with the same weights, and the stages and
# methods, each of which counts by itself.
_WITHOUT_EFFECT: Final = (
    "accumulation",
    "cache_mb",
    "checkpoint_calls",
    "checkpoint_every",
    "data",
    "eval_every",
    "eval_records",
    "inner",
    "links_dir",
    "lora",
    "outer",
    "preset",
    "sft",
)


@dataclass(frozen=True, kw_only=True)
class TrainSettings:
    """What to train on and how.

    Attributes:
        section: The resolved section of the spec.
        data: Absolute path of the records.
        held_out_file: Absolute path of the held-out records; None if a fraction is held out.
        links_dir: Absolute path of the folder that trained links go to.
    """

    section: TrainSection
    data: Path
    held_out_file: Path | None
    links_dir: Path

    @property
    def held_out_fraction(self) -> float:
        """The part of the records that is held out; 0 if there is a file for that."""
        return self.section.held_out if isinstance(self.section.held_out, int | float) else 0.0

    def digest(self, *own: Section) -> str:
        """Return the sha256 of the settings that a stage's result depends on, hexadecimal.

        Where things are kept, how often they are measured and into how many pieces a device splits
        its work do not count.

        Args:
            own: The stage's section, and that of the method if it is not links that learn.
        """
        values = self.section.model_dump(mode="json", exclude=set(_WITHOUT_EFFECT))
        values["own"] = [section.model_dump(mode="json") for section in own]
        return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()


def train_settings(spec: Spec) -> TrainSettings:
    """Return what a spec says about training.

    Raises:
        RecmasError: RM104 if it says nothing.
    """
    section, folder = spec.document.train, links_folder(spec)
    if section is None or folder is None:
        hint = "Add `train: {data: FILE.jsonl, targets: {AGENT: FIELD}}`."
        place = spec.places.value(())
        raise RecmasError(problem_at(place, "RM104", "the spec has no `train`.", hint=hint))
    held_out = section.held_out
    return TrainSettings(
        section=section,
        data=path_of(section.data, spec.base_dir),
        held_out_file=path_of(held_out, spec.base_dir) if isinstance(held_out, str) else None,
        links_dir=folder,
    )
