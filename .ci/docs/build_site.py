"""Builds the site: `python .ci/docs/build_site.py OUT`.

Writes the pages' source beside it (`OUT-source`), lets Sphinx make HTML of it, every warning an
error, and checks the links of what came out.
"""

from __future__ import annotations

import sys
import time
from pathlib import Path

from sphinx.cmd.build import main as sphinx

import check_links
import source_pages


def main(out: Path) -> int:
    """Build into `out`; returns the exit status."""
    started = time.monotonic()
    source = out.with_name(f"{out.name}-source")
    try:
        source_pages.write(source)
    except source_pages.BrokenLinkError as error:
        print(f"links of pages lead nowhere:\n{error}", file=sys.stderr)
        return 1
    options = ["-b", "html", "-W", "--keep-going", "-q", "-c", str(Path(__file__).parent)]
    status: int = sphinx([*options, "-d", str(source / ".doctrees"), str(source), str(out)])
    if status:
        return status
    report = check_links.check(out)
    print(f"{report}\n{out / 'index.html'}: {time.monotonic() - started:.0f} s")
    return 1 if report.problems else 0


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1] if len(sys.argv) > 1 else "out/docs")))
