"""Pages of `docs`: each is in a list of the index, and its commands are run or say why not."""

from __future__ import annotations

import re
import sys
from collections.abc import Callable
from importlib import import_module
from importlib.machinery import SourceFileLoader
from importlib.util import module_from_spec, spec_from_loader
from pathlib import Path
from types import ModuleType

import pytest

from recmas_compiler.spec.schema.document import SECTIONS
from recmas_compiler.spec.schema.json_schema import key_rows
from recmas_runtime.core.errors import CODES

ROOT = Path(__file__).parent.parent
INDEX = ROOT / "docs/index.md"
# Links from page to page, read as a code host reads them: from file to file.
LINK = re.compile(r"\[(?:[^\[\]]|\[[^\]]*\])*\]\(([^()\s]+)\)")
PAGES = [
    *sorted((ROOT / "docs").glob("*.md")),
    *(ROOT / name for name in ("README.md", "CHANGELOG.md", "CONTRIBUTING.md", "specs/README.md")),
]


@pytest.fixture(scope="module")
def commands() -> ModuleType:
    """The program that runs the documents' commands."""
    loader = SourceFileLoader("readme_commands", str(ROOT / ".ci/readme-commands"))
    spec = spec_from_loader(loader.name, loader)
    assert spec is not None
    module = module_from_spec(spec)
    sys.modules[loader.name] = module
    loader.exec_module(module)
    return module


def test_every_page_is_in_a_list_of_the_index() -> None:
    named = re.findall(r"^- \[[^\]]*\]\((\w+\.md)\)", INDEX.read_text(encoding="utf-8"), re.M)
    there = {path.name for path in (ROOT / "docs").glob("*.md")} - {INDEX.name}
    assert sorted(named) == sorted(there), f"add a line to {INDEX.relative_to(ROOT)}"


def test_every_command_is_run_or_says_why_not(commands: ModuleType) -> None:
    pages = commands.pages()
    assert {page.name for page in (ROOT / "docs").glob("*.md")} <= {page.name for page in pages}
    found = [block for page in pages for block in commands.blocks(page)]
    assert commands.problems(found) == []
    run = [block for block in found if block.is_code and block.not_run is None]
    assert len(run) >= 30
    assert all(block.kind == "python" or block.commands for block in run)
    # A line of these programs outside of such a block would be neither.
    for page in pages:
        outside = re.sub(r"^```.*?^```", "", page.read_text(encoding="utf-8"), flags=re.M | re.S)
        assert not re.findall(r"^(?: {4}|\$ )recmasc? \S.*", outside, re.M), page


def test_remarks_are_read(commands: ModuleType, tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text(
        "<!-- file: a.txt -->\n```text\nwords\n```\n"
        "<!-- before: export PLACE=there -->\n<!-- status: 3 -->\n"
        "```sh\n# a remark\ntest $PLACE = there && \\\n  test -s a.txt\n(exit 3)\nsleep 60 &\n```\n"
        "```console\n$ kill %1\nwhat it prints\n$ false\n```\n"
        "<!-- not run: gpu, of any kind -->\n```sh\nfalse\n```\n"
    )
    commands.ROOT = tmp_path
    found = commands.blocks(page)
    commands.ROOT = ROOT
    assert [block.kind for block in found] == ["text", "sh", "console", "sh"]
    assert commands.problems(found) == []
    assert commands.counted(found) == "5 commands are run, 1 are not (needs a GPU: 1)"
    assert commands.run_page(found, tmp_path, set()) == ["page.md:14: false"]
    assert commands.run_page(found[1:2], tmp_path, set()) == []  # another page, in the same folder
    found[3].not_run = "whim"
    assert "page.md:20: `not run: whim`" in commands.problems(found)[0]


@pytest.fixture
def made(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], ModuleType]:
    """Loads a module that makes pages of the site."""
    monkeypatch.syspath_prepend(ROOT / ".ci/docs")
    return import_module


def test_the_site_has_every_key(made: Callable[[str], ModuleType]) -> None:
    text = (ROOT / "specs/README.md").read_text(encoding="utf-8")
    guide, keys = made("language_pages").split(text)
    for path, section in SECTIONS.items():
        name = ".".join(path) or "spec"
        for key, row in zip(section.model_fields, key_rows(name), strict=True):
            anchor = f"[`{key}`]{{#key-{name.replace('.', '-').replace('*', 'name')}-{key}}}"
            assert keys.count(anchor) == 1
            assert f"  {row.meaning}\n" in keys
    # Nothing of the page is lost between the two, but for the tables.
    headings = re.findall(r"^#+ (.*)", text, re.M)
    both = re.findall(r"^#+ (.*)", guide + keys, re.M)
    assert sorted(headings) == sorted(both)


def test_the_site_has_what_is_said_under_each_code(made: Callable[[str], ModuleType]) -> None:
    pages = made("error_pages")
    said = pages.messages(ROOT)
    assert len(said.keys() & CODES.keys()) > 0.9 * len(CODES)
    hint = "Add `SOURCE: SETTINGS` to `links`, or remove the slot."
    message = "`TARGET` has a slot for `SOURCE`, but no link brings its message."
    assert (message, hint) in said["RM113"]
    page = pages.page((ROOT / "docs/errors.md").read_text(encoding="utf-8"), root=ROOT)
    for code, (_, meaning) in CODES.items():
        assert f"\n### {code}\n\n{meaning[0].upper()}{meaning[1:]}." in page


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_to_files(page: Path) -> None:
    text = re.sub(r"^ *```.*?^ *```", "", page.read_text(encoding="utf-8"), flags=re.M | re.S)
    targets = [target.partition("#")[0] for target in LINK.findall(text) if ":" not in target]
    missing = [name for name in targets if name and not (page.parent / name).exists()]
    assert not missing
