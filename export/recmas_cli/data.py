"""`recmasc data`: a published data set as JSON lines, which every command reads."""

from __future__ import annotations

from pathlib import Path

import click

from recmas_cli.console import FILE, Outcome, command
from recmas_cli.evaluate import list_protocols
from recmas_runtime.core.files import check_free, placed_together
from recmas_runtime.core.text import counted


@click.command()
@click.argument("protocol", is_eager=True, callback=list_protocols)
@click.argument("file", type=FILE)
@click.option("-o", "--out", type=FILE, required=True, help="The file of JSON lines to write.")
@click.option("--beside", type=FILE, help="The file with the questions, where FILE has none.")
@click.option(
    "--without",
    type=FILE,
    multiple=True,
    help="Leave the questions of this file out, such as those to be tested on; may be repeated.",
)
@click.option(
    "--max-words",
    type=click.IntRange(min=1),
    metavar="N",
    help="Leave questions out with more words to read.",
)
@click.option("--limit", type=click.IntRange(min=1), metavar="N", help="Most questions to write.")
@click.option("--force", is_flag=True, help="Overwrite an existing file.")
@command
def data(
    protocol: str,
    file: Path,
    *,
    out: Path,
    beside: Path | None,
    without: tuple[Path, ...],
    max_words: int | None,
    limit: int | None,
    force: bool,
) -> Outcome:
    """Write the published FILE of a data set as JSON lines: id, question, answer and what to read.

    PROTOCOL is its name, or a file; `recmasc data list` names those that come with recmas. The
    lines are what `recmas run`, `recmasc train` and `bench` take, `eval` with the same protocol.
    """
    from recmas_compiler.evaluation.data.data_file import left_out_warnings
    from recmas_compiler.evaluation.data.data_writer import write_questions
    from recmas_compiler.evaluation.data.protocol import load_protocol

    check_free(out.parent, [out.name], force=force)
    written = write_questions(
        file,
        load_protocol(protocol),
        beside=beside,
        without=without,
        max_words=max_words,
        limit=limit,
    )
    with placed_together(out.parent, [out.name]) as staging:
        (staging / out.name).write_text(written.text, encoding="utf-8")
    return Outcome(
        text=f"Wrote {counted(written.num_written, 'question')} to {out}.",
        data={
            "path": str(out),
            "questions": written.num_written,
            "left_out": dict(written.left_out),
        },
        problems=left_out_warnings(written.left_out, file=str(file)),
    )
