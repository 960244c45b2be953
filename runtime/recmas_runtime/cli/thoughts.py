"""`recmas thoughts`: what agents thought in a run, as the tokens nearest to each thought."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Final, TypeVar

from recmas_runtime.core.errors import RecmasError, fail
from recmas_runtime.core.files import reason_of
from recmas_runtime.core.jsonl import read_json_lines
from recmas_runtime.core.printing import note, write_out
from recmas_runtime.core.text import aligned, counted
from recmas_runtime.formats.codec import from_json
from recmas_runtime.formats.ids import link_ends, path_text
from recmas_runtime.running.run_trace import RECORDS_NAME
from recmas_runtime.sequences.thoughts import NearToken, Reading, RecordReadings, ThoughtReading

T = TypeVar("T")

_KEYS: Final = RecordReadings.__struct_fields__
_THE_SAME: Final = "sent as it was fed back"
_AMONG: Final = "sent, among input embeddings of the receiver (cosine)"


def print_thoughts(
    folder: Path, record: str | None, data: dict[str, Any], *, as_json: bool
) -> None:
    """Print what was thought for each record of a trace, or for the one with an id.

    With `as_json` nothing is printed, and `data` gets the records instead.

    Raises:
        RecmasError: RM502 if there is no trace or it cannot be read, RM506 if it has no such
            record, or was written without thoughts.
    """
    num_records = num_found = 0
    for number, line in trace_lines(folder):
        if record is not None and str(line.get("id")) != record:
            continue
        num_records += 1
        if not all(key in line for key in _KEYS):
            continue
        num_found += 1
        own = {key: line[key] for key in _KEYS}
        readings = checked(RecordReadings, own, folder, number)
        if as_json:
            data.setdefault("records", []).append({"id": line.get("id"), **own})
        else:
            gap = "\n" if num_found > 1 else ""
            told = readings_text(line.get("id"), readings, handover_texts(line))
            write_out(f"{gap}{told}\n")
    if num_found == 0:
        raise _nothing(folder, record, num_records)
    if as_json:
        data["records_without_thoughts"] = num_records - num_found
    elif num_found < num_records:
        left = f"{num_records - num_found} of {counted(num_records, 'record')}"
        note(f"{left} left out: traced without --thoughts")


def handover_texts(line: Mapping[str, Any]) -> dict[tuple[int, str], str]:
    """Return what agents wrote for others, by round and agent, as a line of a trace has it."""
    return {
        (step["round"], agent): text
        for step in line.get("steps", ())
        for agent, text in zip(step["agents"], step.get("texts", ()), strict=False)
    }


def readings_text(
    record: object, readings: RecordReadings, written: Mapping[tuple[int, str], str] | None = None
) -> str:
    """Return tables of what each agent thought for a record, round by round, and what it sent.

    Args:
        written: What agents wrote for others, by round and agent.
    """
    texts = {} if written is None else written
    thoughts: dict[tuple[int, str], list[ThoughtReading]] = {}
    for thought in readings.thoughts:
        thoughts.setdefault((thought.round, thought.agent), []).append(thought)
    sent: dict[tuple[int, str], dict[str, list[Reading]]] = {}
    for message in readings.messages:
        by_link = sent.setdefault((message.round, link_ends(message.link)[0]), {})
        by_link.setdefault(message.link, []).append(message.embedding)
    parts = [f"record {record}"]
    for key in sorted({**thoughts, **sent, **texts}, key=lambda key: key[0]):
        steps = thoughts.get(key, [])
        fed_back = _table([step.fed_back for step in steps])
        parts.append(f"\n{key[1]}, round {key[0]}")
        if steps:
            parts += [
                "thoughts through the head (probability)",
                *_table([step.head for step in steps], [step.cosine_before for step in steps]),
                "fed back to itself, among input embeddings (cosine)",
                *fed_back,
            ]
        if key in texts:
            parts.append(f"wrote {json.dumps(texts[key], ensure_ascii=False)}")
        for link, vectors in sent.get(key, {}).items():
            table, path = _table(vectors), path_text(*link_ends(link))
            is_same = table == fed_back
            parts.append(f"{path}: {_THE_SAME if is_same else _AMONG}")
            parts += [] if is_same else table
    return "\n".join(
        parts if len(parts) > 1 else [f"{parts[0]}: no agent thought, wrote or sent vectors"]
    )


def _table(readings: Sequence[Reading], befores: Sequence[float | None] = ()) -> list[str]:
    """Return a line for each vector; `befores` are its cosines to the round before, if any."""
    compared = [f"{before:.3f}" for before in befores if before is not None]
    columns = compared or [""] * len(readings)
    head = ("", "norm", "before" if compared else "", "rest", "nearest tokens")
    rows = [
        (str(place), f"{r.norm:.4g}", before, f"{r.rest:.3f}", *map(_token_text, r.tokens))
        for place, (r, before) in enumerate(zip(readings, columns, strict=True), 1)
    ]
    return [f"  {line}" for line in aligned([head, *rows])]


def _token_text(token: NearToken) -> str:
    text = json.dumps(token.text, ensure_ascii=False) if token.text else f"#{token.id}"
    return f"{text} {token.mass if token.cosine is None else token.cosine:.3f}"


def trace_lines(folder: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """Yield a trace's lines and their numbers; a last one that was cut off is left out.

    Raises:
        RecmasError: RM502 if there is no trace or it cannot be read.
    """
    path, number = folder / RECORDS_NAME, 0
    try:
        for number, line in enumerate(read_json_lines(path), 1):
            if not isinstance(line, dict):
                raise _unreadable("expected an object", path, number)
            yield number, line
    except FileNotFoundError:
        raise _unreadable("there is no trace", path) from None
    except OSError as error:
        raise _unreadable(f"the trace cannot be read: {reason_of(error)}", path) from error
    except (ValueError, RecursionError) as error:
        raise _unreadable(f"the trace cannot be read: {error}", path, number + 1) from error


def checked(cls: type[T], data: object, folder: Path, number: int) -> T:
    """Return a part of a trace's line as what it must be; RM502 if it is not."""
    path = folder / RECORDS_NAME
    try:
        return from_json(cls, data, file=str(path))
    except RecmasError as error:
        raise _unreadable(error.problems[0].message, path, number) from error


def _unreadable(message: str, path: Path, line: int | None = None) -> RecmasError:
    hint = "Name a folder that `recmas run --trace DIR` has written."
    return fail("RM502", message, file=str(path), line=line, hint=hint)


def _nothing(folder: Path, record: str | None, num_records: int) -> RecmasError:
    if num_records:
        message = "this trace was written without thoughts"
    else:
        message = "the trace holds " + ("no records" if record is None else f"no record {record!r}")
    hint = "Records without an answer have no trace."
    if num_records:
        hint = (
            "Run again with them: recmas run BUNDLE QUESTION --trace DIR --thoughts 5. Agents that "
            "take no latent steps have none."
        )
    return fail("RM506", message, file=str(folder), hint=hint)
