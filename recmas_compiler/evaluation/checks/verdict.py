"""What checks share: verdicts, right answers, and where in a text the answer stands."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Final, Protocol, Self

from recmas_compiler.evaluation.data.data_file import Question
from recmas_runtime.core.errors import RecmasError, fail


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """How a check scores an answer.

    Attributes:
        extracted: What was taken for the answer; None if the text holds none.
        score: From 0 to 1, where a check knows degrees; else 0 or 1.
    """

    correct: bool
    extracted: str | None
    score: float


NO_ANSWER = Verdict(correct=False, extracted=None, score=0.0)


def verdict(*, correct: bool, extracted: str) -> Verdict:
    """Return a verdict that knows no degrees."""
    return Verdict(correct=correct, extracted=extracted, score=float(correct))


class Check(Protocol):
    """Judges answers. A context manager, because some checks keep a process."""

    def __call__(self, answer: str, question: Question) -> Verdict:
        """Judge the text of an answer.

        Raises:
            RecmasError: RM601 if the question's gold answer is of a form that this check cannot
                use.
        """

    def check_record(self, question: Question) -> None:
        """Refuse a record that no answer could be judged by, before anything is asked.

        Safe to call from many threads.

        Raises:
            RecmasError: RM601 if that concerns the record, RM602 if something is not installed.
        """
        self("", question)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        """Free what the check holds; most hold nothing."""
        return


def gold_texts(question: Question) -> tuple[str, ...]:
    """Return every text that counts as right; never none.

    Raises:
        RecmasError: RM601 if `answer` is neither text, a number, nor a list of them.
    """
    answer = question.gold.get("answer")
    listed = answer if isinstance(answer, list | tuple) else (answer,)
    texts = tuple(str(a).strip() for a in listed if isinstance(a, str | int | float))
    if not texts or len(texts) != len(listed) or any(isinstance(a, bool) for a in listed):
        raise unusable_gold(question, f"the right answer is {answer!r}, not a text or number")
    return texts


def gold_text(question: Question) -> str:
    """Return the one right answer.

    Raises:
        RecmasError: RM601 if there are several, or none.
    """
    first, *others = gold_texts(question)
    if others:
        raise unusable_gold(question, f"has {len(others) + 1} right answers where one is expected")
    return first


_UNUSABLE: Final = "Correct the record, or choose a protocol whose check reads such answers."


def unusable_gold(question: Question, message: str, *, hint: str = _UNUSABLE) -> RecmasError:
    """Return the error for a question that a check cannot use."""
    return fail(
        "RM601",
        f"record {question.record.id!r}: {message}",
        file=question.file,
        line=question.line,
        hint=hint,
    )


_BOX: Final = re.compile(r"\\f?box(?:ed)?\s*(\{|[^\s{])")
# "The final answer is", "So the correct choice is:"; before a colon only where a sentence begins,
# because "To find the answer: ..." announces none; "####" is the mark of GSM8K's own solutions.
_NAMED: Final = r"(?:answer|(?:correct|right|best) (?:choice|option))"
_IS: Final = r"(?:is|are|was|(?:would|should|must|will|can only|has to) be)"
_SURELY: Final = r"(?:therefore|thus|hence|then|so|indeed|clearly|simply|actually|just)\b"
_BEGINS: Final = (
    r"(?:^|[.!?]\s)[\s*_#>-]*(?:(?:so|thus|hence|therefore),? )?(?:the |my )?(?:final )?"
)
_PHRASE: Final = re.compile(
    rf"\b{_NAMED}\b[\s*_]*{_IS}\b[\s*_]*(?:{_SURELY},?[\s*_]+)?:?"
    rf"|{_BEGINS}(?:(?:correct|right|best) )?{_NAMED}[\s*_]*[:=]"
    r"|\#{4}",
    re.IGNORECASE | re.MULTILINE,
)
_TAGGED: Final = re.compile(r"<answer>(.*?)</answer>", re.IGNORECASE | re.DOTALL)
_RESULT: Final = re.compile(r"<result>.*?</result>", re.DOTALL)


# How models mark their thinking: what opens it, what ends it. The first letters of the marks that
# are words on their own are small ones; gpt-oss begins its answer on a channel of its own.
_THINKING: Final = (
    (r"<think>", r"</think>"),
    (r"<thinking>", r"</thinking>"),
    (r"<thoughts?>", r"</thoughts?>"),
    (r"<reason(?:ing)?>", r"</reason(?:ing)?>"),
    (r"<seed:think>", r"</seed:think>"),
    (r"\[THINK\]", r"\[/THINK\]"),
    (r"\u25c1think\u25b7", r"\u25c1/think\u25b7"),
    (r"<\|begin_of_thought\|>", r"<\|end_of_thought\|>"),
    (r"<\|START_THINKING\|>", r"<\|END_THINKING\|>"),
    (r"<unused94>(?:thought)?", r"<unused95>"),
    (r"<\|channel>thought", r"<channel\|>"),
    (
        r"<\|channel\|>\s*(?:analysis|commentary)\b[^<]{0,40}(?:<\|message\|>)?",
        r"(?:<\|end\|>)?(?:<\|start\|>assistant)?<\|channel\|>\s*final\s*(?:<\|message\|>)?",
    ),
    (r"\Aanalysis(?=[A-Z])", r"assistantfinal"),
)
_MARK: Final = re.compile(
    "|".join(
        [
            f"(?P<open{i}>{opens})|(?P<close{i}>{closes})"
            for i, (opens, closes) in enumerate(_THINKING)
        ]
    ),
    re.IGNORECASE,
)
_OPENED: Final = re.compile(rf"(?:{'|'.join(opens for opens, _ in _THINKING)})\s*\Z", re.IGNORECASE)


def opened_thinking(prompt: str) -> str:
    """Return the mark by which a prompt leaves a model thinking; empty if it does not."""
    found = _OPENED.search(prompt)
    return found.group() if found else ""


def without_thinking(text: str) -> str:
    """Return what the model says: without its thinking, and without results of tools.

    What stands behind an opening mark that nothing closes was cut off before it said anything.
    """
    said: list[str] = []
    opened: str | None = None
    start = 0
    for mark in _MARK.finditer(text):
        kind = mark.lastgroup or ""
        if kind.startswith("open"):
            if opened is None:
                said.append(text[start : mark.start()])
                opened = kind.removeprefix("open")
        elif opened is None:  # the prompt has opened it
            said.clear()
            start = mark.end()
        elif kind.removeprefix("close") == opened:
            opened, start = None, mark.end()
    if opened is None:
        said.append(text[start:])
    return _RESULT.sub("\n", "\n".join(filter(None, said)))


def last_box(text: str) -> str | None:
    r"""Return what the last complete `\boxed{...}` holds; None if there is none."""
    for found in reversed(list(_BOX.finditer(text))):
        if found.group(1) != "{":
            return found.group(1)
        inside = _balanced(text, found.end())
        if inside is not None and inside.strip():
            return inside.strip()
    return None


def after_phrases(text: str) -> list[str]:
    """Return what follows every "the answer is", to the end of its line, in order.

    Where the phrase ends its line, the next line with text counts.
    """
    return [rest for _, rest in placed_phrases(text)]


def placed_phrases(text: str) -> list[tuple[int, str]]:
    """Return what follows every "the answer is" as `after_phrases` does, and where that begins."""
    rests = []
    for found in _PHRASE.finditer(text):
        rest = text[found.end() :].lstrip("*_ \t\n")
        line = rest.partition("\n")[0].strip()
        if line:
            rests.append((found.end(), line))
    return rests


def last_tagged(text: str) -> str | None:
    """Return what the last `<answer>...</answer>` holds; None if there is none."""
    found = _TAGGED.findall(text)
    return found[-1].strip() or None if found else None


def stripped(text: str) -> str:
    """Return a short answer without the marks around it: emphasis, quotes, a final stop."""
    return text.strip().strip("*_`\"'").strip().rstrip(".!").strip().strip("*_`\"'").strip()


def _balanced(text: str, start: int) -> str | None:
    """Return the text from `start` to the brace that closes the one before it."""
    depth = 1
    for index in range(start, len(text)):
        depth += {"{": 1, "}": -1}.get(text[index], 0)
        if depth == 0:
            return text[start:index]
    return None
