"""Render a folder of chat templates beside transformers: `compare_templates.py FOLDER`.

Every `*.jinja` file is rendered as it is, within a loop and within a block, over conversations of
one to four turns with and without a system text, with and without a generation prompt. Where one
side refuses a conversation, the other must refuse it too.
"""

from __future__ import annotations

import itertools
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Final

from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerFast

from recmas_runtime.core.errors import RecmasError
from recmas_runtime.prompts.chat_template import ChatTemplate

SPECIAL: Final = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>", "unk_token": "<u>"}
# Statements that Jinja takes at the top of a template only.
WRAPPINGS: Final = {
    "as it is": "{}",
    "in a loop": "{{% for _ in [1] %}}{}{{% endfor %}}",
    "in a block": "{{% block wrapped %}}{}{{% endblock %}}",
}
Message = dict[str, str]


def conversations() -> Iterator[list[Message]]:
    """Yield conversations of one to four turns, each with and without a system text."""
    turns: list[Message] = [
        {"role": "user", "content": " What is 7 * 8?\n"},
        {"role": "assistant", "content": "<think>\nSeven eights.\n</think>\n\nIt is 56. "},
        {"role": "user", "content": "<b>Why</b>, \"please\" & 'soon'? \u00e9\u4e2d"},
        {"role": "assistant", "content": "Because seven eights are fifty-six."},
    ]
    for count, system in itertools.product(range(1, 5), (None, "Be brief.\n")):
        first = [] if system is None else [{"role": "system", "content": system}]
        yield [*first, *turns[:count]]


def compare(template: str) -> tuple[int, list[str]]:
    """Return how many renderings were compared, and what differs in some of them."""
    raw = Tokenizer(models.WordLevel({token: i for i, token in enumerate(SPECIAL.values())}, "<u>"))
    reference = PreTrainedTokenizerFast(
        tokenizer_object=raw,
        chat_template=template,
        **SPECIAL,  # type: ignore[arg-type]
    )
    differing: list[str] = []
    count = 0
    try:
        ours = ChatTemplate(template, SPECIAL)
    except RecmasError as error:
        ours, refusal = None, str(error)
    for messages, generation in itertools.product(conversations(), (True, False)):
        count += 1
        what = f"{[m['role'][0] for m in messages]}, generation {generation}"
        try:
            expected = reference.apply_chat_template(
                messages, tokenize=False, add_generation_prompt=generation, enable_thinking=False
            )
        except Exception as error:  # a template may raise anything
            expected, refusal = None, repr(error)
        found = None
        if ours is not None:
            try:
                found = ours.render(
                    messages, add_generation_prompt=generation, enable_thinking=False
                )
            except RecmasError as error:
                refusal = str(error)
        if found != expected:
            shown = refusal if None in (found, expected) else _difference(str(found), str(expected))
            differing.append(f"{what}: {shown}")
    return count, differing


def _difference(found: str, expected: str) -> str:
    same = [a == b for a, b in zip(found, expected, strict=False)]
    at = same.index(False) if False in same else len(same)
    return f"{found[at : at + 40]!r} in the place of {expected[at : at + 40]!r}"


def main() -> int:
    files = sorted(Path(sys.argv[1]).glob("*.jinja"))
    right = 0
    renderings = 0
    for file in files:
        text = file.read_text(encoding="utf-8")
        problems = []
        for name, wrapping in WRAPPINGS.items():
            count, differing = compare(wrapping.format(text))
            renderings += count
            problems += [f"{file.name}, {name}, {line}" for line in differing]
        right += not problems
        print("\n".join(problems[:3]), end="\n" if problems else "")
    print(
        f"{right} of {len(files)} templates as transformers renders them ({renderings} renderings)"
    )
    return int(right != len(files))


if __name__ == "__main__":
    sys.exit(main())
