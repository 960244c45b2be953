"""Checks the links of the built site.

Each leads to a file and an anchor that are there, and no page needs an address outside to be read.
Links to outside are listed in `outside_links.txt`, and none is fetched.
"""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

# What a browser fetches by itself.
_FETCHED = {
    ("img", "src"),
    ("script", "src"),
    ("link", "href"),
    ("source", "src"),
    ("iframe", "src"),
}
OUTSIDE_FILE = "outside_links.txt"


@dataclass
class Report:
    """What was found: links between pages, links to outside with the pages that have them."""

    num_pages: int = 0
    num_links: int = 0
    outside: dict[str, set[str]] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        lines = [f"broken: {problem}" for problem in self.problems]
        told = f"{self.num_pages} pages, {self.num_links} links inside"
        lines.append(f"{told}, {len(self.problems)} broken; {len(self.outside)} outside (listed)")
        return "\n".join(lines)


class _Page(HTMLParser):
    """The anchors of a page, its links, and what a browser fetches for it."""

    def __init__(self) -> None:
        super().__init__()
        self.anchors: set[str] = set()
        self.links: list[str] = []
        self.fetched: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        """Note what a tag names and where it leads."""
        for name, value in attrs:
            if not value:
                continue
            if name == "id" or (tag == "a" and name == "name"):
                self.anchors.add(value)
            elif (tag, name) in _FETCHED:
                self.fetched.append(value)
            elif tag == "a" and name == "href":
                self.links.append(value)


def check(site: Path) -> Report:
    """Return what is wrong with the links of a site, and write the list of those to outside."""
    pages: dict[str, _Page] = {}
    for path in sorted(site.rglob("*.html")):
        page = _Page()
        page.feed(path.read_text("utf-8"))
        pages[path.relative_to(site).as_posix()] = page
    report = Report(num_pages=len(pages))
    for name, page in pages.items():
        for target in page.fetched:
            if urlsplit(target).scheme not in ("", "data") or target.startswith("//"):
                report.problems.append(f"{name} fetches {target}")
            else:
                _follow(target, name, pages, site, report)
        for target in page.links:
            if urlsplit(target).scheme or target.startswith("//"):
                report.outside.setdefault(target, set()).add(name)
            else:
                _follow(target, name, pages, site, report)
    for sheet in site.rglob("*.css"):
        text = sheet.read_text("utf-8")
        if "url(http" in text or "url(//" in text or "@import" in text:
            report.problems.append(f"{sheet.relative_to(site)} fetches from outside")
    lines = [f"{url}  ({', '.join(sorted(at))})" for url, at in sorted(report.outside.items())]
    (site / OUTSIDE_FILE).write_text("\n".join(lines) + "\n", "utf-8")
    return report


def _follow(target: str, name: str, pages: dict[str, _Page], site: Path, report: Report) -> None:
    """Note a link that leads to no file or no anchor."""
    parts = urlsplit(target)
    path, anchor = unquote(parts.path), unquote(parts.fragment)
    there = os.path.normpath(Path(name).parent / path) if path else name
    report.num_links += 1
    if not (site / there).exists():
        report.problems.append(f"{name} -> {target}: no such file")
    elif anchor and there in pages and anchor not in pages[there].anchors:
        report.problems.append(f"{name} -> {target}: no such anchor")
