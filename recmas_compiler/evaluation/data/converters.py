"""From the forms that data sets are published in to ours.

A converter is given what the protocol found of one record, fields and gold together, and returns
the same in our form. What is in our form already stays as it is, so one protocol reads both.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import json
import pickletools
import random
import zlib
from collections.abc import Callable, Mapping
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
    if isinstance(values["answer"], bool):
        values["answer"] = "yes" if values["answer"] else "no"
    return values


def labelled_choices(values: Values) -> Values:
    """ARC, CommonsenseQA, MedQA: labelled choices become a list, the right label a letter.

    Choices are `{text: [...], label: [...]}`, a list of `{text, label}`, or `{LABEL: text}`.
    """
    choices, answer = values["choices"], str(values["answer"])
    if isinstance(choices, Mapping) and "text" in choices and "label" in choices:
        texts, labels = list(choices["text"]), [str(label) for label in choices["label"]]
    elif isinstance(choices, Mapping):
        labels = sorted(choices)
        texts = [choices[label] for label in labels]
    elif choices and all(isinstance(choice, Mapping) for choice in choices):
        texts = [choice["text"] for choice in choices]
        labels = [str(choice["label"]) for choice in choices]
    else:
        return values
    values["choices"] = texts
    values["answer"] = LETTERS[labels.index(answer)]
    return values


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
    context = values.get("context")
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
    tests = values.get("plus") or values["tests"]
    before = [*(values.get("imports") or []), values.get("setup") or ""]
    values["tests"] = [*filter(None, before), *([tests] if isinstance(tests, str) else tests)]
    values["examples"] = "\n".join(values["examples"])
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
