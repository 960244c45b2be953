"""The stubs that mypy checks the code against say what the published bindings say.

`bindings.json` holds what wheels from the package index say, see `record_bindings.py`; where the
packages are installed they are asked themselves.
"""

from __future__ import annotations

import importlib
import json
from typing import Any

import pytest

from record_bindings import RECORD, STUBS
from stub_names import disagreements, published, stubbed

RECORDED: dict[str, dict[str, Any]] = json.loads(RECORD.read_text(encoding="utf-8"))
CASES = [(name, version) for name, versions in RECORDED.items() for version in versions]


def stub_of(name: str) -> dict[str, Any]:
    return stubbed(STUBS[name].read_text(encoding="utf-8"))


@pytest.mark.parametrize(("name", "version"), CASES)
def test_published_wheels_have_what_the_stubs_declare(name: str, version: str) -> None:
    assert disagreements(stub_of(name), RECORDED[name][version]) == []


def test_the_record_covers_both_majors_and_the_oldest_version() -> None:
    versions = set(RECORDED["tensorrt"])
    assert {version.partition(".")[0] for version in versions} == {"10", "11"}
    assert any(version.startswith("10.15.") for version in versions)
    assert {version.partition(".")[0] for version in RECORDED["cuda.bindings.runtime"]} >= {"13"}


@pytest.mark.parametrize("name", STUBS)
def test_installed_bindings_have_what_the_stubs_declare(name: str) -> None:
    try:
        module = importlib.import_module(name)
    except (ImportError, OSError, RuntimeError) as error:
        pytest.skip(f"{name} cannot be imported here: {error}")
    assert disagreements(stub_of(name), published(module, list(stub_of(name)))) == []


def test_a_wrong_stub_is_found() -> None:
    stub = stubbed(
        "class Builder:\n"
        "    def create_network(self, flags: int) -> None: ...\n"
        "    def create_net(self) -> None: ...\n"
        "class IOptimizationProfile:\n"
        "    def set_shape(self, input: str, max: int) -> None: ...\n"
    )
    version = next(iter(RECORDED["tensorrt"]))
    assert disagreements(stub, RECORDED["tensorrt"][version]) == [
        "Builder.create_net does not exist",
        "IOptimizationProfile.set_shape(input, max) is [['input', 'min', 'opt', 'max']]",
    ]
