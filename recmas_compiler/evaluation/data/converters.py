"""From the forms that data sets are published in to ours.

A converter gets what the protocol found of one record, fields and gold together, and returns the
same in our form. What is in our form already stays as it is, so one protocol reads both.
"""

from __future__ import annotations

import ast
import base64
import binascii
import hashlib
import json
import pickletools
import random
import re
import zlib
from collections.abc import Callable, Mapping
from contextlib import suppress
from typing import Any, Final

from recmas_runtime.core.text import counted

Values = dict[str, Any]
Converter = Callable[[Values], Values]

LETTERS: Final = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"

# Larger than the tests of any problem; a compressed text may unpack to anything.
MAX_TESTS_BYTES: Final = 512 * 2**20


def after_hashes(values: Values) -> Values:
    """GSM8K: the answer is what follows `####` in the worked solution."""
    answer = values["answer"]
    if isinstance(answer, str) and "####" in answer:
        values["answer"] = answer.rpartition("####")[2].strip().replace(",", "")
    return values


def yes_or_no(values: Values) -> Values:
    """StrategyQA: true and false become yes and no."""
    answer = values["answer"]
    if isinstance(answer, bool) or str(answer).strip().lower() in ("true", "false"):
        values["answer"] = "yes" if str(answer).strip().lower() == "true" else "no"
    return values


def labelled_choices(values: Values) -> Values:
    """ARC, CommonsenseQA, MedQA, MMLU, AQuA-RAT: choices become texts, the right one a letter.

    Choices are `{text: [...], label: [...]}`, a list of `{text, label}`, `{LABEL: text}`, or a list
    of texts, perhaps each with its label before it. The right one is a label, its place from 0
    where there are no labels, or its text.
    """
    texts, labels = _labelled(_listed(values["choices"]))
    values["choices"] = texts
    values["answer"] = LETTERS[_place(values["answer"], texts, labels)]
    return values


def _labelled(choices: Any) -> tuple[list[Any], list[str]]:
    """Return the texts of choices and their labels, of which there may be none."""
    if isinstance(choices, Mapping) and "text" in choices and "label" in choices:
        return list(choices["text"]), [str(label) for label in choices["label"]]
    if isinstance(choices, Mapping):
        labels = sorted(choices)
        return [choices[label] for label in labels], labels
    if not isinstance(choices, list) or not choices:
        raise ValueError(f"the choices are {str(choices)[:80]!r}, not a list")
    if all(isinstance(choice, Mapping) for choice in choices):
        return [choice["text"] for choice in choices], [str(choice["label"]) for choice in choices]
    found = [_LABEL.match(choice) if isinstance(choice, str) else None for choice in choices]
    labels = [match["label"].upper() if match else "" for match in found]
    if labels == list(LETTERS[: len(choices)]):
        return [match["text"].strip() for match in found if match], labels
    return choices, []


# "A)5", "(b) Rome", "C. Berlin", "D: Madrid"
_LABEL: Final = re.compile(
    r"\s*\(?(?P<label>[A-Za-z])(?:\)|[.:](?=\s|\S{2}))(?P<text>.*)", re.DOTALL
)
_ONE_LABEL: Final = re.compile(r"\s*\(?(?P<label>[A-Za-z0-9])\)?[.:]?\s*")


def _place(answer: Any, texts: list[Any], labels: list[str]) -> int:
    """Return the place of the right choice, from 0."""
    if isinstance(answer, bool) or not isinstance(answer, str | int):
        raise ValueError(f"the right answer is {answer!r}, not a label, a place or a text")
    names = labels or list(LETTERS[: len(texts)])
    found = _ONE_LABEL.fullmatch(str(answer))
    label = found["label"] if found else ""
    spelled = {i for i, text in enumerate(texts) if _same(text, answer)}
    for one in (label, label.upper()):
        if one in names and (labels or not one.isdigit()):
            return names.index(one)
    places = {int(answer)} & set(range(len(texts))) if str(answer).isdecimal() else set()
    if isinstance(answer, int) and all(isinstance(text, str) for text in texts):
        spelled = set()  # a number beside texts is a place
    if len(both := places | spelled) == 1:
        return both.pop()
    if not both:  # the text may have a label before it
        match = _LABEL.match(str(answer))
        both = {i for i, text in enumerate(texts) if match and _same(text, match["text"])}
    if len(both) == 1:
        return both.pop()
    what = "may be several of" if both else "is none of"
    raise ValueError(f"the right answer {answer!r} {what} the {len(texts)} choices")


def _same(text: Any, answer: Any) -> bool:
    return " ".join(str(text).split()).casefold() == " ".join(str(answer).split()).casefold()


def _listed(value: Any) -> Any:
    """Return what a text holds that is a list or a mapping, as CSV files have them."""
    if isinstance(value, str) and value.strip()[:1] in ("[", "{"):
        for read in (json.loads, ast.literal_eval):
            with suppress(ValueError, SyntaxError, RecursionError, MemoryError):
                return read(value.strip())
    return value


def shuffled_choices(values: Values) -> Values:
    """GPQA: the right and the wrong answers become choices in an order that the question decides.

    The order is the same in every run and on every machine, and the right one is not always first.
    """
    wrong = [values.pop(name) for name in ("wrong_1", "wrong_2", "wrong_3") if name in values]
    if not wrong:
        return values
    choices = [str(choice).strip() for choice in (values["answer"], *wrong)]
    right = choices[0]
    seed = hashlib.sha256(str(values["question"]).encode()).hexdigest()
    random.Random(seed).shuffle(choices)  # noqa: S311 - an order, not a secret
    values["choices"] = choices
    values["answer"] = LETTERS[choices.index(right)]
    return values


def passages(values: Values) -> Values:
    """HotpotQA: paragraphs of sentences become one text with a title before each."""
    context = _listed(values.get("context"))
    if isinstance(context, Mapping):
        context = list(zip(context["title"], context["sentences"], strict=True))
    if isinstance(context, list):
        texts = (f"{title}: {''.join(sentences).strip()}" for title, sentences in context)
        values["context"] = "\n\n".join(texts)
    return values


def answers(values: Values) -> Values:
    """SQuAD: several annotators' answers become texts, each once; one alone is a text itself."""
    found = _listed(values["answer"])
    if isinstance(found, Mapping):  # columns, as the hub has them
        found = found["text"]
    listed = found if isinstance(found, list) else [found]
    texts = [one["text"] if isinstance(one, Mapping) else one for one in listed]
    different = list(dict.fromkeys(texts))
    values["answer"] = different[0] if len(different) == 1 else different
    values["question"] = values["question"].strip()  # some end in spaces
    return values


def _without_answers(values: Values) -> str | None:
    found = _listed(values.get("answer"))
    found = found.get("text") if isinstance(found, Mapping) else found
    return "no answer stands in the passage" if found == [] else None


def supporting_facts(values: Values) -> Values:
    """HotpotQA: the needed sentences of either article become a fact, its paragraph another text.

    Both begin with the article's title and stand in the order in which the articles are needed.
    """
    needed = _needed_by_title(values)
    if needed is not None:
        values["facts"] = [f"{title}: {' '.join(texts)}" for title, texts in needed.items()]
    if "supporting" in values:
        paragraphs = _paragraphs(values["context"])
        values["paragraphs"] = [f"{t}: {''.join(paragraphs[t]).strip()}" for t in needed or ()]
    values.pop("supporting", None)
    values.pop("titles", None)
    return passages(values)


def derived_facts(values: Values) -> Values:
    """R4C: the facts that annotators wrote become two texts, one for each article."""
    needed = _needed_by_title(values)
    values.pop("titles", None)
    if needed is not None:
        values["facts"] = [" ".join(map(_as_sentence, texts)) for texts in needed.values()]
    values["context"] = " ".join(values["facts"])
    return values


def _needed_by_title(values: Values) -> dict[str, list[str]] | None:
    """Return what is needed of each article, in order; None of a record that has it so already."""
    if "supporting" in values:
        paragraphs = _paragraphs(values["context"])
        pairs = [
            (title, text)
            for title, number in _places(values["supporting"])
            for text in paragraphs[title][number : number + 1]  # a few are beyond the last one
        ]
    elif "titles" in values:
        pairs = list(zip(_listed(values["titles"]), _listed(values["facts"]), strict=True))
    else:
        return None
    needed: dict[str, list[str]] = {}
    for title, text in pairs:
        needed.setdefault(title, []).append(text.strip())
    return needed


def _places(supporting: Any) -> list[tuple[str, int]]:
    """Return titles with numbers of sentences."""
    supporting = _listed(supporting)
    if isinstance(supporting, Mapping):  # columns, as the hub has them
        supporting = zip(supporting["title"], supporting["sent_id"], strict=True)
    return [(title, int(number)) for title, number in supporting]


def _paragraphs(context: Any) -> dict[str, list[str]]:
    """Return the sentences of paragraphs by title."""
    context = _listed(context)
    if isinstance(context, Mapping):
        context = zip(context["title"], context["sentences"], strict=True)
    return dict(context)


def _as_sentence(text: str) -> str:
    return text if text.endswith((".", "!", "?")) else f"{text}."


def _without_two_articles(values: Values) -> str | None:
    if "question" not in values:
        return "the file beside has no such question"
    needed = _needed_by_title(values)
    return _not_two(len(values["facts"] if needed is None else needed), "article")


def _not_two(number: int, noun: str) -> str | None:
    return None if number == 2 else f"needs {counted(number, noun)}, not two"


def two_parts(values: Values) -> Values:
    """Cut a story of bAbI in two, in order, with one needed fact in each part.

    The cut is the one nearest to the middle. Without `support` the parts are there already.
    """
    facts, support = _listed(values["facts"]), _listed(values.pop("support", None))
    if support is not None:
        first, last = sorted(set(support))
        cut = min(max(first + 1, round(len(facts) / 2)), last)
        facts = [" ".join(facts[:cut]), " ".join(facts[cut:])]
    values["facts"] = facts
    values.setdefault("context", " ".join(facts))
    return values


def _without_two_needed(values: Values) -> str | None:
    support = _listed(values.get("support"))
    return _not_two(len(values["facts"] if support is None else set(support)), "fact")


def assertions(values: Values) -> Values:
    """MBPP: imports, set-up code and assertions become tests; the assertions may be shown.

    Without an example a model cannot know the function's name. MBPP+ brings its own, longer
    tests, which are not shown.
    """
    tests = _listed(values.get("plus") or values["tests"])
    before = [*(_listed(values.get("imports")) or []), values.get("setup") or ""]
    values["tests"] = [*filter(None, before), *([tests] if isinstance(tests, str) else tests)]
    values["examples"] = "\n".join(_listed(values["examples"]))
    return values


def checked_function(values: Values) -> Values:
    """HumanEval: the tests define `check`, which is called with the function."""
    values["tests"] = [values["tests"], f"check({values['entry_point']})"]
    return values


def contest(values: Values) -> Values:
    """LiveCodeBench: public and private tests become inputs with outputs, or calls with results."""
    cases = [*_cases(values.pop("public", None)), *_cases(values.pop("private", None))]
    metadata = values.pop("metadata", None) or {}
    if isinstance(metadata, str):
        metadata = json.loads(metadata)
    values["inputs"] = [
        {"input": case["input"], "output": case["output"]}
        for case in cases
        if case["testtype"] == "stdin"
    ]
    values["calls"] = [
        {
            "arguments": [json.loads(line) for line in case["input"].split("\n") if line.strip()],
            "result": json.loads(case["output"]),
        }
        for case in cases
        if case["testtype"] == "functional"
    ]
    values["function"] = metadata.get("func_name")
    return values


def _cases(text: object) -> list[Any]:
    """Return test cases from JSON, or from JSON that was pickled, compressed and base64-encoded."""
    if not isinstance(text, str):
        return list(text) if isinstance(text, list) else []
    try:
        cases = json.loads(text)
    except json.JSONDecodeError:
        unpacking = zlib.decompressobj()
        packed = base64.b64decode(text, validate=True)
        cases = json.loads(_pickled_text(unpacking.decompress(packed, MAX_TESTS_BYTES)))
    if not isinstance(cases, list):
        raise ValueError("the test cases are not a list")
    return cases


def _pickled_text(raw: bytes) -> str:
    """Return the one text that a pickle holds, without unpickling, which could run anything."""
    harmless = {"PROTO", "FRAME", "MEMOIZE", "BINPUT", "LONG_BINPUT", "PUT", "STOP"}
    texts = []
    for opcode, argument, _ in pickletools.genops(raw):
        if opcode.name in ("BINUNICODE", "SHORT_BINUNICODE", "BINUNICODE8", "UNICODE"):
            texts.append(argument)
        elif opcode.name not in harmless:
            raise ValueError(f"the pickled test cases hold more than a text: {opcode.name}")
    if len(texts) != 1 or not isinstance(texts[0], str):
        raise ValueError(f"the pickled test cases hold {len(texts)} texts instead of one")
    return texts[0]


CONVERTERS: Final[dict[str, Converter]] = {
    "after_hashes": after_hashes,
    "answers": answers,
    "assertions": assertions,
    "checked_function": checked_function,
    "contest": contest,
    "derived_facts": derived_facts,
    "labelled_choices": labelled_choices,
    "passages": passages,
    "shuffled_choices": shuffled_choices,
    "supporting_facts": supporting_facts,
    "two_parts": two_parts,
    "yes_or_no": yes_or_no,
}

# Why a record is no question of the protocol although it is of the form that is read; None if it is
# one. Such records are left out and counted.
LEAVES_OUT: Final[dict[str, Callable[[Values], str | None]]] = {
    "answers": _without_answers,
    "derived_facts": _without_two_articles,
    "supporting_facts": _without_two_articles,
    "two_parts": _without_two_needed,
}

# What a converter raises where a record is not of its form.
UNREADABLE: Final = (
    KeyError,
    TypeError,
    ValueError,
    AttributeError,
    IndexError,
    binascii.Error,
    zlib.error,
    RecursionError,
)
