"""Answers in words: the letter of a choice, exact match, F1."""

from __future__ import annotations

import re
import string
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Final

from recmas_compiler.evaluation.checks.choice_statements import Statement, is_denied, stated_letters
from recmas_compiler.evaluation.checks.verdict import (
    NO_ANSWER,
    Check,
    Verdict,
    after_phrases,
    gold_text,
    gold_texts,
    last_box,
    last_tagged,
    placed_phrases,
    stripped,
    unusable_gold,
    verdict,
    without_thinking,
)
from recmas_compiler.evaluation.data.converters import LETTERS
from recmas_compiler.evaluation.data.data_file import Question

_NO_PUNCTUATION: Final = str.maketrans("", "", string.punctuation + "\u2018\u2019\u201c\u201d")
_ARTICLES: Final = re.compile(r"\b(?:a|an|the)\b")


class ExactCheck(Check):
    """Compares words: equal once case, punctuation, articles and spacing are set aside.

    Args:
        among: The only possible answers, such as yes and no; None for any text.
    """

    def __init__(self, *, among: Sequence[str] | None = None) -> None:
        self._among = among

    def __call__(self, answer: str, question: Question) -> Verdict:
        """Judge an answer."""
        golds = gold_texts(question)
        among = self._among
        found = extract_words(answer) if among is None else extract_among(answer, among)
        if found is None:
            return NO_ANSWER
        said = normalize(found)
        return verdict(correct=any(said == normalize(gold) for gold in golds), extracted=found)


@dataclass(frozen=True, kw_only=True)
class Script:
    """How the script of a data set compares words.

    Attributes:
        punctuation: What it takes out.
        whole_words: Texts that share words with another by chance only; these must be equal.
    """

    punctuation: Mapping[int, int | None]
    whole_words: frozenset[str] = frozenset()


# SQuAD's script leaves the quotes of printed texts; HotpotQA's answers are often yes or no.
SQUAD: Final = Script(punctuation=str.maketrans("", "", string.punctuation))
HOTPOTQA: Final = Script(
    punctuation=_NO_PUNCTUATION, whole_words=frozenset({"yes", "no", "noanswer"})
)


class F1Check(Check):
    """Scores the words that an answer shares with the nearest right one; correct is exact match."""

    def __init__(self, script: Script = HOTPOTQA) -> None:
        self._script = script

    def __call__(self, answer: str, question: Question) -> Verdict:
        """Judge an answer."""
        golds = gold_texts(question)
        found = extract_words(answer)
        if found is None:
            return NO_ANSWER
        said, *right = (normalize(text, self._script) for text in (found, *golds))
        return Verdict(
            correct=said in right,
            extracted=found,
            score=max(f1(said, gold, self._script) for gold in right),
        )


def normalize(text: str, script: Script = HOTPOTQA) -> str:
    """Return text as it is compared: without case, punctuation, articles and extra spaces."""
    return " ".join(_ARTICLES.sub(" ", text.lower().translate(script.punctuation)).split())


def f1(said: str, gold: str, script: Script = HOTPOTQA) -> float:
    """Return the harmonic mean of precision and recall over the words of two normalized texts."""
    said_words, gold_words = said.split(), gold.split()
    if said != gold and {said, gold} & script.whole_words:
        return 0.0
    shared = sum((Counter(said_words) & Counter(gold_words)).values())
    if not shared:
        return float(said_words == gold_words)
    precision, recall = shared / len(said_words), shared / len(gold_words)
    return 2 * precision * recall / (precision + recall)


def extract_words(text: str) -> str | None:
    """Return a model's short answer: marked as such, or its last line."""
    text = without_thinking(text).strip()
    marked = last_tagged(text) or last_box(text)
    if marked is not None:
        return stripped(_without_command(marked)) or None
    rests = after_phrases(text)
    lines = [line for line in text.splitlines() if line.strip()]
    for line in (*reversed(rests), *lines[-1:]):
        if stripped(line):
            return stripped(line)
    return None


def extract_among(text: str, among: Sequence[str]) -> str | None:
    """Return the one of a few possible answers that a text gives; None if it is not one.

    Where the text marks its answer, that part decides; then its first word, its last line, and at
    last whether only one of them occurs at all.
    """
    text = without_thinking(text).strip()
    rests = after_phrases(text)
    lines = [line for line in text.splitlines() if line.strip()]
    for part in (last_tagged(text), last_box(text), *rests[-1:]):
        if part is not None and (found := _first_of(_without_command(part), among)):
            return found
    words = normalize(text).split()
    for option in among:
        if words[:1] == [normalize(option)]:
            return option
    for part in (*lines[-1:], text):
        mentioned = [option for option in among if _mentions(part, option)]
        if len(mentioned) == 1:
            return mentioned[0]
    return None


def _first_of(text: str, among: Sequence[str]) -> str | None:
    said = f" {normalize(text)} "
    places = {option: said.find(f" {normalize(option)} ") for option in among}
    there = [option for option in among if places[option] >= 0]
    return min(there, key=lambda option: places[option]) if there else None


def _mentions(text: str, option: str) -> bool:
    return f" {normalize(option)} " in f" {normalize(text)} "


def _without_command(text: str) -> str:
    found = re.fullmatch(r"\\(?:text|textbf|mathrm)\{(.*)\}", text.strip(), re.DOTALL)
    return found.group(1) if found else text


# A letter that stands for a choice: "B", "(B)", "B)", "**B**", "option B:", "\text{B}".
_OPENING: Final = r"[\s*_\"'`(\[{$]{0,8}(?:\\(?:text|mathrm|textbf)\{)?[\s(\[*]{0,4}"
_NAMED: Final = rf"(?:\b(?:option|choice|letter|answer)\b{_OPENING})?"
_SECOND: Final = re.compile(
    r"^[\s*)\].,]*(?:or\b|and\b|/|&)[\s*(\[]*([A-Z])(?![A-Za-z])"
    r"|^[\s*]*,?[\s*(\[]*([A-Z])[\s*)\]]*(?:,|or\b|and\b)"
)


# Of blanks and emphasis in a row patterns try every division.
_LONG_BLANKS: Final = re.compile(r"[\s*_]{6,}")
_LONGEST_PHRASE: Final = 2000
_DENIED: Final = re.compile(r"[\s*_]*(?:not|neither|never|none)\b", re.IGNORECASE)
# How a last line begins that says what follows from the ones before it.
_CONCLUDING: Final = re.compile(
    r"^[\s*_>#-]*(?:(?:and )?(?:therefore|so|thus|hence|consequently|accordingly|finally|overall"
    r"|in conclusion|in short|as a result|final|result|ergo|donc|ainsi|also|daher|somit|folglich"
    r"|por lo tanto|as\u00ed que|entonces|portanto|logo|quindi|dunque"
    r"|\u56e0\u6b64|\u6240\u4ee5|\u6545)\b|[=-]+>|\u2192|\u2234)[\s*_,:\uff0c\uff1a]*",
    re.IGNORECASE,
)


class ChoiceCheck(Check):
    """Compares the letter that an answer means with the right one.

    What names two choices, or none, is no answer.
    """

    def __call__(self, answer: str, question: Question) -> Verdict:
        """Judge an answer."""
        choices = question.record.fields.get("choices")
        if not isinstance(choices, list) or not 2 <= len(choices) <= len(LETTERS):
            raise unusable_gold(question, "has no list of choices")
        gold = gold_text(question).upper()
        if len(gold) != 1 or gold not in LETTERS[: len(choices)]:
            last = LETTERS[len(choices) - 1]
            raise unusable_gold(question, f"the right answer is {gold!r}, not a letter A to {last}")
        found = extract_letter(answer, [str(choice) for choice in choices])
        return NO_ANSWER if found is None else verdict(correct=found == gold, extracted=found)


def extract_letter(text: str, choices: Sequence[str]) -> str | None:
    """Return the letter of the choice that a text means; None if it is none, or not one.

    Where it says so outright ("the answer is ...", a box) the last time counts. Otherwise a last
    line that is a letter, the only letter that begins a line or is marked as a choice, or the only
    choice whose words it repeats.
    """
    text = _LONG_BLANKS.sub(_shortened, without_thinking(text)).strip()
    for marked in (last_box(text), last_tagged(text)):
        if marked is not None:
            return _whole(marked, choices) or _by_words(marked, choices)
    phrases = [(start, rest) for start, rest in placed_phrases(text) if not is_denied(text, start)]
    said: list[tuple[int, str | Statement]] = [*phrases]
    said += [(one.start, one) for one in stated_letters(text)]
    for _, one in sorted(said, key=lambda placed: placed[0], reverse=True):
        letter, is_unclear = _meant(one, choices)
        if letter is not None or is_unclear:
            return letter
    lines = [line for line in text.splitlines() if line.strip()]
    if lines:
        last, num_concluding = _CONCLUDING.subn("", lines[-1], count=1)
        letter = _whole(last, choices)
        if letter and (num_concluding or len(stripped(last)) <= len("(A)")):
            return letter
    # A text that repeats the choices, each with its letter, has not chosen yet.
    letters = {letter for line in lines if (letter := _whole(line, choices))}
    if letters:
        return letters.pop() if len(letters) == 1 else None
    return _only_marked(text, choices) or _by_words(text, choices)


def _shortened(blanks: re.Match[str]) -> str:
    return "\n" if "\n" in blanks.group() else " "


def _meant(said: str | Statement, choices: Sequence[str]) -> tuple[str | None, bool]:
    """Return the letter of a statement or of what follows "the answer is", and if several do."""
    if isinstance(said, Statement):
        is_other = said.letter is not None and not _is_choice(said.letter, choices)
        return (None, False) if is_other else (said.letter, said.letter is None)
    rest = said[:_LONGEST_PHRASE]
    if spelled := _spelled(rest, choices):
        return spelled, False
    letter, is_clear = _leading_letter(rest, choices)
    if letter is not None or not is_clear:
        return letter, not is_clear
    return (None if _DENIED.match(rest) else _by_words(rest, choices)), False


def _whole(line: str, choices: Sequence[str]) -> str | None:
    """Return the letter of a line that is a letter and, perhaps, its choice or more words."""
    line = line.strip()
    found = re.match(
        rf"{_OPENING}{_NAMED}{_OPENING}([A-Za-z])[\s)\]}}*_\"'`$]*(?:[.:,)!]|\s-|$)", line
    )
    if found is None:
        return None
    letter, rest = found.group(1).upper(), line[found.end() :]
    if not _is_choice(letter, choices) or _SECOND.match(rest):
        return None
    return letter


def _spelled(rest: str, choices: Sequence[str]) -> str | None:
    """Return the letter of the choice that a text is, word for word; "D-dimer" is no D."""
    said = normalize(stripped(rest))
    equal = [i for i, choice in enumerate(choices) if normalize(choice) == said]
    return LETTERS[equal[0]] if len(equal) == 1 and len(said) > 1 else None


def _leading_letter(rest: str, choices: Sequence[str]) -> tuple[str | None, bool]:
    """Return the letter that follows "the answer is", and whether that is clear."""
    found = re.match(rf"{_OPENING}{_NAMED}{_OPENING}([A-Z])(?![A-Za-z0-9']|-\w)", rest)
    if found is None:
        found = re.match(rf"[\s*]*{_NAMED}[\s*]*[(\[]([a-z])[)\]]", rest) or re.match(
            r"[\s*]*([a-z])[\s*.]*$", rest
        )
    if found is None:
        return None, True
    letter, after = found.group(1).upper(), rest[found.end() :]
    if not _is_choice(letter, choices):
        return None, True
    if letter == "A" and re.match(r"\s+(?!because|since|as\b)\w", after):
        return None, True  # the article
    second = _SECOND.match(after)
    another = (second.group(1) or second.group(2)) if second is not None else ""
    if another != letter and _is_choice(another, choices):
        return None, False
    return letter, True


def _only_marked(text: str, choices: Sequence[str]) -> str | None:
    """Return the one letter that is marked as a choice anywhere: "(B)", "B)", "option B"."""
    marks = re.findall(
        r"\(([A-Z])\)|(?:^|\s)([A-Z])\)|\*\*([A-Z])[.:)]?\*\*|\b[Oo]ption ([A-Z])\b"
        r"|\b[Cc]hoice ([A-Z])\b|^([A-Z])[.:]\s",
        text,
        re.MULTILINE,
    )
    letters = {letter for mark in marks for letter in mark if _is_choice(letter, choices)}
    return letters.pop() if len(letters) == 1 else None


def _by_words(text: str, choices: Sequence[str]) -> str | None:
    """Return the letter of the only choice whose words stand in the text."""
    said = f" {normalize(stripped(text))} "
    spelled = [normalize(choice) for choice in choices]
    found = [i for i, words in enumerate(spelled) if words and f" {words} " in said]
    # "red fox" also says "fox"; the longer choice is meant.
    longest = [
        i
        for i in found
        if not any(j != i and f" {spelled[i]} " in f" {spelled[j]} " for j in found)
    ]
    return LETTERS[longest[0]] if len(longest) == 1 else None


def _is_choice(letter: str, choices: Sequence[str]) -> bool:
    return len(letter) == 1 and letter in LETTERS[: len(choices)]
