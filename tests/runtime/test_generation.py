"""One row's tokens to text: special tokens are seen by who looks for them, and not shown."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from tokenizers import AddedToken

from kit.hand_bundle import CHAT_TEMPLATE, make_tokenizer
from recmas_runtime.formats.plan import ToolsPlan
from recmas_runtime.prompts.tokenizer import Tokenizer
from recmas_runtime.running.generation import (
    AnswerTools,
    DecoderSettings,
    RowDecoder,
    visible_specials,
)
from recmas_runtime.scheduling.engine_lock import EngineLock
from recmas_runtime.tools import Toolbox

SPECIAL = (
    "<tool_call>", "</tool_call>", "<lookup>", "</lookup>", "<|turn_end|>", "<|pad|>", "[THINK]",
    "[/THINK]", "[TOOL_CALLS]", "[ARGS]", "<|call|>", "<|python_tag|>",
)  # fmt: skip
END = "<|end|>"


def make(
    stop: tuple[str, ...] = (), *, ends: tuple[str, ...] = (END,), num_rows: int = 512
) -> tuple[Callable[[str], str], RowDecoder]:
    """Return what writes a text into a row, each special token as its one token, and the row."""
    raw = make_tokenizer()
    raw.add_special_tokens([AddedToken(token, normalized=False) for token in SPECIAL])
    tokenizer = Tokenizer(raw.to_str(), CHAT_TEMPLATE)
    plan = ToolsPlan(functions=("lookup",), max_result_chars=200)
    toolbox = Toolbox(plan, corpus=None, functions={"lookup": lambda text: f"found {text}"})
    lock = EngineLock()
    tools = AnswerTools(toolbox=toolbox, lock=lock)
    eos = frozenset(raw.token_to_id(token) for token in ends)
    settings = DecoderSettings(
        tokenizer=tokenizer, eos_token_ids=eos, max_positions=512, num_rows=num_rows
    )
    row = RowDecoder(settings, stop, tools, specials=visible_specials(tokenizer, stop, tools))

    def write(text: str) -> str:
        """Write until the text ends or the row does; return what is shown piece by piece."""
        shown = ""
        with lock.held():
            for token_id in tokenizer.encode(text):
                shown += row.push(token_id)
                if row.finish_reason is not None:
                    return shown
                if row.calls:
                    piece, ids = row.run_calls(token_id)
                    shown += piece
                    fed.append(ids)
            return shown + (row.finish("length") if row.finish_reason is None else "")

    fed: list[tuple[int, ...]] = []
    row.fed = fed  # type: ignore[attr-defined]
    return write, row


def block(text: str) -> str:
    return f"\n<result>\n{text}\n</result>\n"


@pytest.mark.parametrize(
    ("written", "stop", "text"),
    [
        ("Hello.<|turn_end|> user: and", ("<|turn_end|>",), "Hello."),
        ("Hello.<|turn_end|> user: and", ("turn_end",), "Hello."),
        ("Hello.<|turn_end|> user: and", (".<|turn_end|> user",), "Hello"),
        ("Hello.<|turn_end|>\nuser", ("<|turn_end|>user",), "Hello.\nuser"),
        ("a<|turn_end|><|turn_end|>b", ("<|turn_end|><|turn_end|>",), "a"),
        ("a<|pad|>b c", ("ab",), ""),
        ("a<|pad|>b<|turn_end|>c", ("b<|turn_end|>",), "a"),
        ("stop here<|end|>", ("here<|end|>",), "stop "),
        ("a<|turn_end|>b", (), "ab"),
        ("a<|turn_end|>b", ("x",), "ab"),
        ("[THINK]so[/THINK]ok<|pad|>", (), "[THINK]so[/THINK]ok"),
        ("[THINK]so[/THINK]ok", ("[/THINK]",), "[THINK]so"),
    ],
)
def test_stop_strings_see_special_tokens(written: str, stop: tuple[str, ...], text: str) -> None:
    write, row = make(stop)
    assert write(written) == text == row.text
    shown_whole = text == written.replace("<|turn_end|>", "").replace("<|pad|>", "")
    assert row.finish_reason == ("length" if shown_whole else "stop")


def test_a_special_token_within_a_character() -> None:
    write, row = make(("<|turn_end|>",))
    raw = "caf\u00e9"
    assert write(raw) == raw
    write, row = make()
    ids = row._tokenizer.encode("\u00e9")
    pad = row._tokenizer.encode("<|pad|>")
    assert "".join(map(row.push, (ids[0], *pad, *ids[1:]))) == "\u00e9"


JSON = '{"name": "lookup", "arguments": {"key": "order 17"}}'


@pytest.mark.parametrize(
    ("call", "behind"),
    [
        (f"<tool_call>{JSON}</tool_call>", ""),
        ("<lookup>order 17</lookup>", ""),
        # Nothing marks their end: what follows shows that it has come.
        (f"[TOOL_CALLS][{JSON}]", "I"),
        ('[TOOL_CALLS]lookup[ARGS]{"key": "order 17"}', "I"),
    ],
)
def test_a_call_whose_marks_are_special_tokens(call: str, behind: str) -> None:
    write, row = make()
    shown = write(f"I look.<|pad|>{call}It was sent.<|turn_end|>{END}")
    assert [(r.call.name, r.call.argument, r.text) for r in row.results] == [
        ("lookup", "order 17", "found order 17")
    ]
    rest = "It was sent.".removeprefix(behind)
    assert shown == row.text == f"I look.{call}{behind}{block('found order 17')}{rest}"
    assert row.finish_reason == "stop"


@pytest.mark.parametrize("call", [f"[TOOL_CALLS][{JSON}]", "[TOOL_CALLS]lookup[ARGS]" + JSON])
def test_a_token_that_ends_the_turn_completes_a_call(call: str) -> None:
    write, row = make()
    shown = write(f"{call}{END}Done.{END}")
    (result,) = row.results
    assert shown == row.text == f"{call}{block(result.text)}Done."
    # The model goes on in its turn, so the token that ended it is not read.
    (ids,) = row.fed  # type: ignore[attr-defined]
    assert ids == row._tokenizer.encode(block(result.text))
    assert row.num_tokens == len(row._tokenizer.encode(f"{call}{END}Done.{END}"))


def test_a_closing_mark_that_ends_the_turn_is_read() -> None:
    write, row = make(ends=(END, "<|call|>"))
    call = '<|channel|>commentary to=functions.lookup<|message|>{"key": "order 17"}<|call|>'
    shown = write(f"{call}Done.{END}")
    assert shown == f"{call}{block('found order 17')}Done."
    (ids,) = row.fed  # type: ignore[attr-defined]
    assert ids == row._tokenizer.encode("<|call|>" + block("found order 17"))


def test_half_a_call_at_the_end_is_text() -> None:
    for end in (END, ""):
        write, row = make()
        assert write(f"So <tool_call>{JSON[:20]}{end}") == f"So {JSON[:20]}"
        assert row.results == []


def test_a_broken_call_is_answered() -> None:
    write, row = make()
    write("<tool_call>{</tool_call>")
    (result,) = row.results
    assert result.status == "error"
    assert "not valid JSON" in result.text


def test_control_tokens_of_a_result_are_plain() -> None:
    write, row = make()
    write("<lookup><|pad|></lookup>")
    (ids,) = row.fed  # type: ignore[attr-defined]
    assert not set(ids[1:]) & set(row._tokenizer.special_texts)


def test_a_result_that_the_model_cannot_read_is_an_error_of_its_own() -> None:
    write, row = make()
    letter = row._tokenizer.encode("~")[0]
    write, row = make(num_rows=letter)
    assert write("<lookup>a~b</lookup>").endswith(block(row.results[0].text))
    (result,) = row.results
    assert (result.status, result.text) == (
        "error",
        "the result has characters that this model cannot read",
    )
