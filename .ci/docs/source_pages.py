"""Writes the folder that Sphinx reads: the pages of `docs`, and those that are generated.

A page of the repository keeps its links as they are read on a code host, from file to file; here
they become links between pages of the site. What lies in the repository and is no page comes along
as a file to download; a folder is named and not linked.
"""

from __future__ import annotations

import os
import re
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from mdit_py_plugins.anchors.index import slugify

import command_pages
import error_pages
import language_pages
import python_pages
from recmas_runtime.core.errors import CODES

ROOT: Final = Path(__file__).resolve().parents[2]
INDEX: Final = "docs/index.md"
_ERRORS: Final = "docs/errors.md"

# Pages from outside of `docs`, under the names that they have in the site.
OTHERS: Final = {
    "specs/README.md": "language.md",
    "CHANGELOG.md": "changelog.md",
    "CONTRIBUTING.md": "contributing.md",
    "tests/README.md": "tests.md",
}
# A folder's link leads to its page.
FOLDERS: Final = {"docs": INDEX, "specs": "specs/README.md"}

_LINK = re.compile(r"(!?\[(?:[^\[\]]|\[[^\]]*\])*\])\(([^()\s]+)\)")
_HEADING = re.compile(r"^#+ +(.+?) *$", re.M)
_FENCE = re.compile(r"^( *```).*?^\1 *$", re.M | re.S)
# Code, links and headings, in which a code is no link of its own; blocks of code begin with spaces.
_NO_PLAIN_TEXT = re.compile(r"(`[^`]*`|!?\[[^\]]*\]\([^)]*\)|^#.*$|^ {4}.*$)", re.M)
_REMARK = re.compile(r"^<!-- (?:not run|before|file|status):.*-->\n", re.M)


class BrokenLinkError(Exception):
    """A link of a page that leads nowhere in the repository."""


@dataclass(frozen=True)
class Page:
    """A page of the site: its name there, its Markdown, and the file it was made from."""

    name: str
    text: str
    source: str

    @property
    def title(self) -> str:
        """Its first heading."""
        first = re.search(r"^# +(.+?) *$", self.text, re.M)
        return first[1] if first else self.name

    @property
    def anchors(self) -> set[str]:
        """The anchors of its headings."""
        return {slugify(_plain(title)) for title in _HEADING.findall(_FENCE.sub("", self.text))}


def written_pages() -> list[Page]:
    """Return the pages that people wrote; the language's is cut in two."""
    pages = [
        Page(path.name, path.read_text("utf-8"), f"docs/{path.name}")
        for path in sorted((ROOT / "docs").glob("*.md"))
        if path.name != "errors.md"  # its table is generated, with more than the table has
    ]
    for source, name in OTHERS.items():
        text = (ROOT / source).read_text("utf-8")
        if source == "specs/README.md":
            guide, keys = language_pages.split(text)
            pages += [Page(name, guide, source), Page("spec_keys.md", keys, source)]
        else:
            pages.append(Page(name, text, source))
    return pages


def generated_pages() -> dict[str, str]:
    """Return what is made from the code, by name."""
    errors = error_pages.page((ROOT / "docs/errors.md").read_text("utf-8"), root=ROOT)
    return {"errors.md": errors, **command_pages.pages(), **python_pages.pages()}


def write(folder: Path) -> None:
    """Write all of it into `folder`, which is emptied before.

    Raises:
        BrokenLinkError: All that lead nowhere.
    """
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    pages, made, broken = written_pages(), generated_pages(), []
    places: dict[str, list[Page]] = {_ERRORS: [Page("errors.md", "# Error codes", _ERRORS)]}
    for page in pages:
        places.setdefault(page.source, []).append(page)
    for page in pages:
        text = _REMARK.sub("", page.text)
        try:
            text = _with_links(text, page, places, folder)
        except BrokenLinkError as error:
            broken.append(str(error))
        if page.source == INDEX:
            every = {other.name for other in pages} | set(made)
            text, named = _navigation(text)
            left_out = sorted(every - named - {page.name})
            broken += [f"{name} is in no list of {INDEX}: add a line" for name in left_out]
        (folder / page.name).write_text(text, "utf-8")
    for name, text in made.items():
        (folder / name).write_text(text, "utf-8")
    if broken:
        raise BrokenLinkError("\n".join(broken))


def _with_links(text: str, page: Page, places: dict[str, list[Page]], folder: Path) -> str:
    """Return the text with links to pages of the site, and copy the files that it links."""
    missing = []

    def other(match: re.Match[str]) -> str:
        label, target = match[1], match[2]
        if re.match(r"[a-z]+:", target):
            return match[0]
        path, _, anchor = target.partition("#")
        file = os.path.normpath(Path(page.source).parent / path) if path else page.source
        file = FOLDERS.get(file, file)
        if file in places:
            found = [
                p for p in places[file] if not anchor or file == _ERRORS or anchor in p.anchors
            ]
            if not found:
                missing.append(f"{page.source}: no heading `#{anchor}` in {file}")
                return match[0]
            name = found[0].name
            if re.fullmatch(r"\[`?[\w./]+\.md`?\]", label):
                label = f"[{found[0].title}]"  # a file's name says nothing in the site
            return f"{label}({'' if name == page.name else name}{'#' if anchor else ''}{anchor})"
        if (ROOT / file).is_file():
            copy = folder / "files" / file
            copy.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(ROOT / file, copy)
            return f"{label}(files/{file})"
        if (ROOT / file).is_dir():
            return label.strip("[]")
        missing.append(f"{page.source}: there is no {file}")
        return match[0]

    pieces, at = [], 0
    for fence in _FENCE.finditer(text):
        pieces += [_with_codes(_LINK.sub(other, text[at : fence.start()])), fence[0]]
        at = fence.end()
    pieces.append(_with_codes(_LINK.sub(other, text[at:])))
    if missing:
        raise BrokenLinkError("\n".join(missing))
    return "".join(pieces)


def _with_codes(text: str) -> str:
    """Return the text with links from error codes to what is said of them."""
    parts = _NO_PLAIN_TEXT.split(text)
    for place in range(0, len(parts), 2):
        parts[place] = re.sub(
            r"\bRM\d{3}\b",
            lambda code: (
                f"[{code[0]}](errors.md#{code[0].lower()})" if code[0] in CODES else code[0]
            ),
            parts[place],
        )
    return "".join(parts)


def _navigation(text: str) -> tuple[str, set[str]]:
    """Return the index with a tree of pages for each of its lists, and the pages that they name.

    A generated page stands in a list as its name in code, for it is no file of the repository, and
    what the line says of that; in the site its title takes the place of the line.
    """
    named: set[str] = set()
    first, *sections = re.split(r"^(?=## )", text, flags=re.M)
    parts = [first]
    for section in sections:
        section = re.sub(
            r"^- `(\w+\.(?:md|rst))`: .*$", lambda m: f"- []({m[1]})", section, flags=re.M
        )
        names = re.findall(r"^- \[[^\]]*\]\((\w+\.(?:md|rst))", section, re.M)
        named.update(names)
        title = section.split("\n", 1)[0][3:]
        tree = ["```{toctree}", ":hidden:", f":caption: {title}", "", *names, "```", ""]
        parts.append("\n".join([section.rstrip("\n"), "", *tree, ""]))
    return "".join(parts), named


def _plain(title: str) -> str:
    """Return a heading's text without marks."""
    return re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", title).replace("`", "")
