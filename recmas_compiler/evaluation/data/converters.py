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
    "assertions": assertions,
    "checked_function": checked_function,
    "contest": contest,
    "labelled_choices": labelled_choices,
    "passages": passages,
    "shuffled_choices": shuffled_choices,
    "yes_or_no": yes_or_no,
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
