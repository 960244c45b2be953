"""Passages to search: read from files and folders, refused by line, part of bundle and identity."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from kit.bundles import compile_system, each_backbone_exported_once, write_twins
from kit.files import MadeOnce
from recmas_export.build import build
from recmas_export.bundle.attachments import corpus_lines
from recmas_runtime.core.errors import RecmasError
from recmas_runtime.formats.bundle import open_bundle


def passages(corpus: Path) -> list[dict[str, str]]:
    lines = list(corpus_lines(corpus))
    assert all(line.endswith("\n") and line.count("\n") == 1 for line in lines)
    return [json.loads(line) for line in lines]


def test_a_file(tmp_path: Path) -> None:
    path = tmp_path / "passages.jsonl"
    path.write_bytes(
        b'\xef\xbb\xbf{"id": "a", "title": "A", "text": "one\\ntwo", "more": [1]}\r\n'
        b"\n"
        b'{"text": "caf\xc3\xa9 \xe2\x80\xa8"}\n'
        b'{"id": 7, "text": "seven"}'
    )
    assert passages(path) == [
        {"id": "a", "title": "A", "text": "one\ntwo"},
        {"id": "3", "title": "", "text": "caf\u00e9 \u2028"},
        {"id": "7", "title": "", "text": "seven"},
    ]


def test_a_folder(tmp_path: Path) -> None:
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "inner.md").write_text("# Deep\ntext")
    (tmp_path / "top.txt").write_text("top")
    (tmp_path / "empty.txt").write_text(" \n")
    (tmp_path / "other.pdf").write_bytes(b"\xff")
    assert passages(tmp_path) == [
        {"id": "b/inner.md", "title": "inner", "text": "# Deep\ntext"},
        {"id": "top.txt", "title": "top", "text": "top"},
    ]


# id: (lines, line of the error, a word of the message)
MALFORMED = {
    "no_json": (b'{"text": "a"}\nplain text\n', 2, "not valid JSON"),
    "cut_off": (b'{"text": "a"', 1, "not valid JSON"),
    "list": (b'\n["a"]\n', 2, "not a JSON object"),
    "no_text": (b'{"id": "a", "title": "b"}\n', 1, "no text"),
    "blank_text": (b'{"text": "  "}\n', 1, "no text"),
    "text_number": (b'{"text": 3}\n', 1, "no text"),
    "title_list": (b'{"text": "a", "title": []}\n', 1, "title []"),
    "id_real": (b'{"text": "a", "id": 1.5}\n', 1, "id 1.5"),
    "id_empty": (b'{"text": "a", "id": ""}\n', 1, "id ''"),
    "id_true": (b'{"text": "a", "id": true}\n', 1, "id True"),
    "id_twice": (b'{"text": "a", "id": "x"}\n{"text": "b", "id": "x"}\n', 2, "line 1"),
    "id_like_a_line": (b'{"text": "a", "id": 2}\n{"text": "b"}\n', 2, "line 1"),
    "latin1": (b'{"text": "a"}\n{"text": "caf\xe9"}\n', 2, "not UTF-8 at byte 14"),
    "surrogate": (b'{"text": "\\ud800"}\n', 1, "surrogate"),
    "deep": (b"[" * 100_000 + b"\n", 1, "not valid JSON"),
    "long_number": (b'{"text": ' + b"9" * 5000 + b"}\n", 1, "not valid JSON"),
}


@pytest.mark.parametrize("name", MALFORMED)
def test_malformed_lines(name: str, tmp_path: Path) -> None:
    content, line, said = MALFORMED[name]
    path = tmp_path / "passages.jsonl"
    path.write_bytes(content)
    with pytest.raises(RecmasError) as refused:
        list(corpus_lines(path))
    (problem,) = refused.value.problems
    assert (problem.code, problem.file, problem.line) == ("RM123", str(path), line)
    assert said in problem.message


def test_a_file_of_a_folder_that_is_not_text(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes(b"caf\xe9")
    with pytest.raises(RecmasError, match=r"a\.txt: error\[RM123\].*not UTF-8 at byte 4"):
        list(corpus_lines(tmp_path))


def test_nothing_to_search(tmp_path: Path) -> None:
    (tmp_path / "empty.jsonl").write_text("\n\n")
    for corpus in (tmp_path / "empty.jsonl", tmp_path):
        with pytest.raises(RecmasError, match=r"RM123.*no passages"):
            list(corpus_lines(corpus))


def test_it_is_part_of_the_bundle_and_of_its_identity(tmp_path: Path, made_once: MadeOnce) -> None:
    # What the corpus changes is the bundle, not its graphs.
    with each_backbone_exported_once(made_once):
        _check_bundle_and_identity(tmp_path)


def _check_bundle_and_identity(tmp_path: Path) -> None:
    path = write_twins(tmp_path / "system")
    corpus = path.parent / "passages.jsonl"
    corpus.write_text('{"text": "Cats sleep all day."}\n')
    spec, program = compile_system(path, "answer.tools.search.corpus=passages.jsonl")
    first = build(program, spec=spec, out=tmp_path / "bundle")
    bundle = open_bundle(first.path, verify_hashes=True)
    assert bundle.plan.tools is not None
    assert bundle.plan.tools.search is not None
    assert bundle.plan.tools.search.corpus == "tools/search.jsonl"
    assert "tools/search.jsonl" in bundle.manifest.files
    written = (first.path / "tools/search.jsonl").read_text()
    assert json.loads(written) == {"id": "1", "title": "", "text": "Cats sleep all day."}
    assert build(program, spec=spec, out=tmp_path / "bundle").reused

    corpus.write_text('{"text": "Cats sleep all night."}\n')
    second = build(program, spec=spec, out=tmp_path / "bundle")
    assert not second.reused
    assert second.fingerprint != first.fingerprint

    corpus.write_text("no passage\n")
    with pytest.raises(RecmasError, match="RM123"):
        build(program, spec=spec, out=tmp_path / "bundle")
    kept = open_bundle(tmp_path / "bundle", verify_hashes=True)
    assert kept.manifest.fingerprint == second.fingerprint
