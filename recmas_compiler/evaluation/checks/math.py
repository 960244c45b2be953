r"""Mathematics: the last `\boxed{}`, or what is called the answer, or the last number."""

from __future__ import annotations

import json
import os
import re
import select
import subprocess
import sys
import time
from dataclasses import dataclass
from fractions import Fraction
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Final, Self

from recmas_compiler.evaluation.checks.verdict import (
    NO_ANSWER,
    Check,
    Verdict,
    after_phrases,
    gold_text,
    last_box,
    stripped,
    verdict,
    without_thinking,
)
from recmas_compiler.evaluation.data.data_file import Question

_FORMULA: Final = re.compile(r"\$([^$]+)\$|\\\((.+?)\\\)|\\\[(.+?)\\\]", re.DOTALL)
_STARTS_FORMULA: Final = re.compile(r"[\s*_]*(?:\$(?!\d)|\$.+\$|\\[(\[])")
# The end of a sentence, but not the point of a decimal.
_SENTENCE_END: Final = re.compile(r"[.;!?](?=\s|$)")
# What differs between two ways to write one expression.
_NOTATION: Final = ((r"\\[dt]frac", r"\\frac"), (r"\\frac(\d)(\d)", r"\\frac{\1}{\2}"))


class MathCheck(Check):
    """Compares mathematical answers.

    Numbers are compared here, exactly; other expressions by math-verify in a process that is killed
    after `timeout_s`, and where it is not installed or fails, as text.
    """

    def __init__(self, *, timeout_s: float) -> None:
        self._process = MathProcess(timeout_s)

    def __call__(self, answer: str, question: Question) -> Verdict:
        """Judge an answer."""
        gold = gold_text(question)
        found = extract_math(answer, wants_number=read_number(gold) is not None)
        if found is None:
            return NO_ANSWER
        return verdict(correct=self._is_equal(gold, found), extracted=found)

    def __exit__(self, *exception: object) -> None:
        self._process.close()

    def _is_equal(self, gold: str, found: str) -> bool:
        wanted, given = read_number(gold), read_number(found)
        if wanted is not None and given is not None:
            return equal_numbers(wanted, given)
        if notation(gold) == notation(found):
            return True
        return self._process.equal(gold, found) is True


def extract_math(text: str, *, wants_number: bool) -> str | None:
    """Return the part of a model's text that is its answer; None if there is none.

    Args:
        wants_number: Whether the right answer is a number: then only numbers are looked for where
            the text does not mark its answer.
    """
    text = without_thinking(text)
    boxed = last_box(text)
    if boxed is not None:
        return boxed
    for rest in reversed(after_phrases(text)):
        found = _in_sentence(rest, wants_number=wants_number)
        if found is not None:
            return found
    if not wants_number and (formulas := _formulas(text)):
        return formulas[-1]
    numbers = numbers_in(text)
    return numbers[-1] if numbers else None


def notation(text: str) -> str:
    """Return an expression in one notation, without spaces, for comparison as text."""
    text = clean(text)
    for pattern, replacement in _NOTATION:
        text = re.sub(pattern, replacement, text)
    return re.sub(r"\s+|[{}]", "", text)


def _in_sentence(rest: str, *, wants_number: bool) -> str | None:
    """Return the answer in what follows "the answer is"."""
    formulas = _formulas(rest)
    if formulas and (not wants_number or _STARTS_FORMULA.match(rest)):
        sentence = formulas[0]
    else:
        end = _SENTENCE_END.search(rest)
        sentence = rest[: end.start()] if end else rest
    if not wants_number:
        return stripped(sentence) or None
    sentence = sentence.rpartition("=")[2]
    if read_number(stripped(sentence)) is not None:
        return stripped(sentence)
    numbers = numbers_in(sentence)
    return numbers[0] if numbers else None


def _formulas(text: str) -> list[str]:
    return [
        next(part for part in found if part).strip()
        for found in _FORMULA.findall(text)
        if any(part.strip() for part in found)
    ]


WORKER: Final = Path(__file__).with_name("math_worker.py")
# Importing computer algebra takes seconds on a busy machine, once.
START_TIMEOUT_S: Final = 60.0
# A line longer than a pipe's buffer could block both ends, and no final answer is that long.
MAX_QUESTION_CHARACTERS: Final = 2000


class MathProcess:
    """Asks math-verify whether two expressions are equal. Started at the first question.

    Args:
        timeout_s: For one comparison; a process that takes longer is killed, the next comparison
            starts another.
        worker: The script that answers.
    """

    def __init__(self, timeout_s: float, *, worker: Path = WORKER) -> None:
        self._timeout_s = timeout_s
        self._worker = worker
        self._process: subprocess.Popen[bytes] | None = None
        self.is_available = find_spec("math_verify") is not None
        self.num_killed = 0

    def equal(self, gold: str, answer: str) -> bool | None:
        """Tell whether two expressions are equal; None if that was not to be found out."""
        if not self.is_available or len(gold) + len(answer) > MAX_QUESTION_CHARACTERS:
            return None
        if self._process is None and not self._start():
            return None
        reply = self._ask({"gold": gold, "answer": answer})
        return None if reply is None else reply["equal"]

    def close(self) -> None:
        """End the process, if there is one."""
        if self._process is not None:
            self._process.kill()
            self._process.communicate()
            self._process = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def _start(self) -> bool:
        self._process = subprocess.Popen(  # noqa: S603 - our own script
            [sys.executable, "-P", str(self._worker)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            # Ctrl-C is the parent's to handle.
            start_new_session=True,
        )
        self.is_available = self._read(START_TIMEOUT_S) is not None
        return self.is_available

    def _ask(self, question: dict[str, str]) -> dict[str, Any] | None:
        assert self._process is not None
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(json.dumps(question).encode() + b"\n")
            self._process.stdin.flush()
        except OSError:  # it died between two questions
            self.close()
            return None
        return self._read(self._timeout_s)

    def _read(self, timeout_s: float) -> dict[str, Any] | None:
        """Return the next line; kills the process if none comes in time or it ended."""
        assert self._process is not None
        assert self._process.stdout is not None
        descriptor = self._process.stdout.fileno()
        deadline = time.monotonic() + timeout_s
        line = b""
        while not line.endswith(b"\n"):
            ready, _, _ = select.select([descriptor], [], [], max(0.0, deadline - time.monotonic()))
            piece = os.read(descriptor, 65536) if ready else b""
            if not piece:
                self.num_killed += 1
                self.close()
                return None
            line += piece
        reply: dict[str, Any] = json.loads(line)
        return reply


# Numbers as people and models write them: `$1,234.50`, `\frac{3}{4}`, `2 1/2`, `45 %`, `8 cm`.
_DECIMAL: Final = r"(?:\d+\.?\d*|\.\d+)"
_FRACTION: Final = r"\\frac\s*(?:\{\s*(-?\d+)\s*\}|(\d))\s*(?:\{\s*(\d+)\s*\}|(\d))"
_UNIT: Final = (
    r"(?:\s*(?P<percent>%|percent\b|per cent\b))?"
    r"(?P<unit>[A-Za-z][A-Za-z. ]*(?:/[a-z]+)?(?:\s*\^\s*\{?[23]\}?)?)?"
)
_FORMS: Final = {
    "mixed": re.compile(rf"(?P<sign>[-+]?)\s*(\d+)\s+(\d+)\s*/\s*(\d+)\s*{_UNIT}"),
    "latex": re.compile(rf"(?P<sign>[-+]?)\s*(\d*)\s*{_FRACTION}\s*{_UNIT}"),
    "power": re.compile(
        rf"(?P<sign>[-+]?)\s*({_DECIMAL})\s*(?:\\times|\\cdot|\*|x)\s*10"
        rf"\s*\^\s*\{{?\s*(-?\d{{1,3}})\s*\}}?\s*{_UNIT}"
    ),
    "ratio": re.compile(rf"(?P<sign>[-+]?)\s*({_DECIMAL})\s*/\s*({_DECIMAL})\s*{_UNIT}"),
    "exponent": re.compile(rf"(?P<sign>[-+]?)\s*({_DECIMAL})[eE]([-+]?\d{{1,3}})\s*{_UNIT}"),
    "decimal": re.compile(rf"(?P<sign>[-+]?)\s*({_DECIMAL})\s*{_UNIT}"),
}
# A number inside of a sentence. A minus with a space after it, or with a digit or a bracket right
# before it, is a subtraction or a dash and not a sign.
_IN_TEXT: Final = re.compile(
    r"(?:(?<![\w.)\]])-)?(?:\\?\$\s?)?(?:(?<=\$)-)?"
    rf"(?:\d*\s?{_FRACTION}"
    r"|\d+ \d+/\d+(?![\d/])"
    r"|(?:\d{1,3}(?:(?:,|\{,\})\d{3})+(?!\d)|\d+)(?:\.\d+)?(?:\s?/\s?\d+(?![\d/]))?"
    r"|(?<!\w)\.\d+)"
    r"(?:\s?\\?%)?"
)
# Longer texts are no numbers.
_MAX_NUMBER_CHARACTERS: Final = 200
# Words that make what follows a number part of a formula and not a unit.
_NOT_UNITS: Final = frozenset((
    "sin", "cos", "tan", "cot", "sec", "csc", "log", "ln", "exp", "sqrt", "pi", "mod",
    "or", "and", "i", "e", "x", "y",
))  # fmt: skip
_THOUSANDS: Final = re.compile(r"(?<=\d)(?:,|\{,\})\s?(?=\d{3}(?!\d))")
_WRAPPED: Final = re.compile(r"\\(?:text|textbf|mathrm|mathbf|mbox|operatorname)\s*\{([^{}]*)\}")
_SPACES: Final = re.compile(r"\\[,;: ]|\\q?quad|~|\u00a0|\u202f")
_DROPPED: Final = re.compile(r"\\left|\\right|\\displaystyle|\\[()\[\]]|\^\s*\{?\\circ\}?|\u00b0")
_CURRENCY: Final = re.compile(r"\\\$|[$\u20ac\u00a3\u00a5]")


@dataclass(frozen=True)
class Number:
    """A number as written: 45 for `45 %`."""

    value: Fraction
    is_percent: bool = False


def clean(text: str) -> str:
    """Return text without what never changes a value: currency, spacing commands, thousands."""
    text = _plain_notation(text)
    text = _WRAPPED.sub(r" \1", text)
    text = _DROPPED.sub("", _CURRENCY.sub("", _SPACES.sub(" ", text)))
    text = _THOUSANDS.sub("", text).strip().strip("*")
    return text.rstrip(".,;: ").strip()


def read_number(text: str) -> Number | None:
    """Return the number that the whole text is, a unit after it aside; None if it is none."""
    if len(text) > _MAX_NUMBER_CHARACTERS:
        return None
    text = clean(text).rpartition("=")[2].strip()
    for form, pattern in _FORMS.items():
        found = pattern.fullmatch(text)
        if found is None or not _is_unit(found["unit"]):
            continue
        value = _value(form, found)
        if value is None:
            return None
        signed = -value if found["sign"] == "-" else value
        return Number(signed, is_percent=found["percent"] is not None)
    return None


def numbers_in(text: str) -> list[str]:
    """Return the numbers in a text, as they are written, in order."""
    return [found.group().strip() for found in _IN_TEXT.finditer(_plain_notation(text))]


def equal_numbers(left: Number, right: Number) -> bool:
    """Tell whether two numbers are the same.

    If only one of them is a percentage, either reading of it counts: 45 % is 45 where percent are
    asked for, and 0.45 where a share is.
    """
    if left.is_percent == right.is_percent:
        return _close(left.value, right.value)
    percent, plain = (left, right) if left.is_percent else (right, left)
    return _close(percent.value, plain.value) or _close(percent.value / 100, plain.value)


def _plain_notation(text: str) -> str:
    """Return text with one form of minus, percent, fraction and thousands."""
    text = text.replace("\u2212", "-").replace("\\%", "%")
    return re.sub(r"\\[dtc]frac", r"\\frac", re.sub(r"\\!\s*", "", text))


def _close(left: Fraction, right: Fraction) -> bool:
    if left.denominator == right.denominator == 1:
        return left == right
    # Decimals of a repeating fraction are written to some digit.
    return abs(left - right) <= max(Fraction(1), abs(right)) / 10**6


def _value(form: str, found: re.Match[str]) -> Fraction | None:
    _, *groups = found.groups()[:7]
    match form:
        case "mixed":
            whole, over, under = (Fraction(group) for group in groups[:3])
        case "latex":
            whole = Fraction(groups[0] or 0)
            over, under = Fraction(groups[1] or groups[2]), Fraction(groups[3] or groups[4])
        case "ratio":
            whole, over, under = Fraction(0), Fraction(groups[0]), Fraction(groups[1])
        case "power" | "exponent":
            whole, over, under = Fraction(0), Fraction(groups[0]), Fraction(10) ** -int(groups[1])
        case _:
            whole, over, under = Fraction(groups[0]), Fraction(0), Fraction(1)
    return whole + over / under if under else None


def _is_unit(unit: str | None) -> bool:
    """Tell whether letters after a number are a unit; `2 x` and `2 sin` are formulas."""
    words = re.findall(r"[A-Za-z]+", unit or "")
    if len(words) > 5:
        return False
    return not words or (
        (len(words[0]) > 1 or words[0] in "mghsLKlCF") and not _NOT_UNITS & set(words)
    )
