"""Texts that cannot fit are refused before anything takes their length in time."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, models, normalizers, pre_tokenizers

import recmas_runtime as rt
from kit.hand_bundle import CHAT_TEMPLATE, make_plan, make_tokenizer
from recmas_runtime.core.errors import RecmasError
from recmas_runtime.prompts.chat_template import ChatTemplate
from recmas_runtime.prompts.marks import Marks, unused_salt
from recmas_runtime.prompts.render import Chat
from recmas_runtime.prompts.tokenizer import Tokenizer as RuntimeTokenizer
from recmas_runtime.running.record_prompts import RecordPrompts
from recmas_runtime.running.records import Answer, Record, as_record

PLAN = make_plan()
LIMIT = PLAN.limits.max_prompt_tokens
RAW = make_tokenizer()
LONGEST = len("</lookup>")  # of the tokens


class Untouched(ChatTemplate):
    """A template that must not be asked."""

    def render(self, messages: object, **variables: object) -> str:  # type: ignore[override]
        raise AssertionError("rendered")


def prompts(question: str, template: ChatTemplate) -> RecordPrompts:
    chat = Chat(template=template, tokenizer=RuntimeTokenizer(RAW.to_str(), template))
    chats = dict.fromkeys((agent.backbone for agent in PLAN.agents.values()), chat)
    fields: Mapping[str, object] = {"question": question}
    record = Record(id="r1", fields=fields, index=0)
    return RecordPrompts(PLAN, chats, record, num_rows=dict.fromkeys(chats, RAW.get_vocab_size()))


@pytest.mark.parametrize("unit", ["a", "<|end|>", "recmas0xC0E", "\u00e9"])
def test_a_text_that_cannot_fit_is_refused_unseen(unit: str) -> None:
    text = unit * (2**20 // len(unit))
    with pytest.raises(RecmasError) as caught:
        prompts(text, Untouched(CHAT_TEMPLATE))
    (problem,) = caught.value.problems
    room = LIMIT * LONGEST
    assert problem.code == "RM501"
    assert f"has {len(text)} characters, the {LIMIT} tokens" in problem.message
    assert f"hold at most {room}" in problem.message


def test_space_around_a_text_is_not_counted() -> None:
    # A template may strip it.
    trimming = ChatTemplate("{% for m in messages %}<|user|>{{ m.content | trim }}{% endfor %}")
    question = " " * 2**16 + "7" + "\n" * 2**16
    with pytest.raises(RecmasError, match="positions"):  # those inside the prompt stay
        prompts(question, trimming)


def bounded(raw: Tokenizer) -> int | None:
    return RuntimeTokenizer(raw.to_str(), "").max_token_chars


def bpe(**options: object) -> Tokenizer:
    letters = [*"\u2581abcdefgh", "ab", "<unk>"]
    return Tokenizer(models.BPE({c: i for i, c in enumerate(letters)}, [("a", "b")], **options))


def test_the_bound_is_that_of_the_longest_token() -> None:
    assert bounded(RAW) == LONGEST
    assert bounded(bpe(unk_token="<unk>")) == len("<unk>")
    composing = bpe(unk_token="<unk>")
    composing.normalizer = normalizers.Sequence([normalizers.NFC(), normalizers.Prepend("_")])
    assert bounded(composing) == 4 * len("<unk>")
    shrinking = bpe(unk_token="<unk>")
    shrinking.normalizer = normalizers.Replace("aaa", "a")
    assert bounded(shrinking) == 3 * len("<unk>")


def test_tokenizers_that_make_little_of_much_have_no_bound() -> None:
    silent = bpe()  # drops what it does not know
    fusing = bpe(unk_token="<unk>", fuse_unk=True)
    dropping = bpe(unk_token="<unk>")
    dropping.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    stripping = bpe(unk_token="<unk>")
    stripping.normalizer = normalizers.Sequence([normalizers.NFD(), normalizers.StripAccents()])
    deleting = bpe(unk_token="<unk>")
    deleting.normalizer = normalizers.Replace("a", "")
    removing = bpe(unk_token="<unk>")
    removing.pre_tokenizer = pre_tokenizers.Split(" ", "removed")
    swallowing = bpe(unk_token="<unk>")
    swallowing.add_tokens([AddedToken("word", lstrip=True)])
    words = Tokenizer(models.WordLevel({"<unk>": 0}, "<unk>"))
    pieces = Tokenizer(models.WordPiece(vocab={"<unk>": 0}, unk_token="<unk>"))
    for raw in (
        silent, fusing, dropping, stripping, deleting, removing, swallowing, words, pieces
    ):  # fmt: skip
        assert bounded(raw) is None, raw


def tokenizers_of_all_kinds() -> list[Tokenizer]:
    composing = bpe(unk_token="<unk>")
    composing.normalizer = normalizers.NFKC()
    spaced = bpe(unk_token="<unk>")
    spaced.pre_tokenizer = pre_tokenizers.Metaspace()
    fallback = Tokenizer(
        models.BPE(
            {**{f"<0x{b:02X}>": b for b in range(256)}, "a": 256, "aa": 257},
            [("a", "a")],
            byte_fallback=True,
            unk_token="<0x00>",
            fuse_unk=True,
        )
    )
    return [RAW, composing, spaced, fallback]


KINDS = tokenizers_of_all_kinds()


@given(st.text(), st.sampled_from(range(len(KINDS))))
def test_no_text_has_fewer_tokens_than_the_bound_says(text: str, kind: int) -> None:
    most = bounded(KINDS[kind])
    assert most is not None
    num_tokens = len(KINDS[kind].encode(text, add_special_tokens=False).ids)
    assert num_tokens * most >= len(text)


class Counted(list[tuple[int, int]]):
    """Spans that count how often one of them is looked at."""

    looks = 0

    def __getitem__(self, index: object) -> object:  # type: ignore[override]
        self.looks += 1
        return super().__getitem__(index)  # type: ignore[index]

    def __iter__(self) -> Iterator[tuple[int, int]]:
        for span in super().__iter__():
            self.looks += 1
            yield span


@pytest.mark.parametrize("num_tokens", [10, 1000])
def test_each_span_of_foreign_text_is_looked_at_a_few_times(num_tokens: int) -> None:
    tokenizer = RuntimeTokenizer(RAW.to_str(), CHAT_TEMPLATE)
    text = "<|end|>" * num_tokens
    spans = Counted(tokenizer.control_spans(text))
    marks = Marks("recmas0x")
    marked = marks.mark_controls(text, spans, tokenizer)
    assert marks.restore(marked) == (text, list(tokenizer.control_spans(text)))
    tokenizer.encode_placed(text, spans)
    assert spans.looks <= 8 * num_tokens


def test_the_salt_is_the_first_that_is_free() -> None:
    assert unused_salt("recmas0xrecmas1x recmas 2x", ("recmas3x",)) == "recmas4x"
    assert unused_salt("recmas00x", ()) == "recmas0x"


@pytest.mark.parametrize("unit", ["a", "<|end|>", "recmas0xC0E "])
def test_a_record_of_16_mib_is_refused_and_its_neighbours_are_answered(
    unit: str, hand_bundle: Path
) -> None:
    with rt.load(hand_bundle, device="cpu") as system:
        questions = ["7", unit * (2**24 // len(unit)), "3"]
        records = [as_record(question, index) for index, question in enumerate(questions)]
        first, long, last = system.run_batch(records)
    assert isinstance(first, Answer)
    assert isinstance(last, Answer)
    assert (first.answer, last.answer) == ("h", "d")
    assert isinstance(long, RecmasError)
    (problem,) = long.problems
    assert problem.code == "RM501"
    assert len(problem.message) < 300
