"""Texts in which tokenizers differ: two that agree on all of these agree on what people write.

One list for all who compare: the build holds a bundle's tokenizer against the model's own file.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Final

SAMPLES: Final = (
    "Hello world, it's HE'LL and I'm o'clock.",
    " leading  and   trailing    ",
    "It costs 1234567 dollars, 3.14159 or 1e-10; 007 and 12/31/1999.",
    "first\nsecond\n\nthird\n\n\n\nfourth\r\nfifth\r\n\r\n\tsixth \n seventh",
    "a\n1\n\n22\n  333\t4444",
    "def f(x_1):\n    if x_1 >= 10:\n        return [x**2 for x in range(100)]\n",
    "{\"key\": [1, 2.5, null]} <tag attr='x'/> $\\frac{a}{b}$ @user #1 ~/p/q?x=1&y=2 !!! ...",
    # Latin with accents, composed and decomposed; Greek, Cyrillic
    "na\u00efve caf\u00e9 cafe\u0301 \u00dcBER stra\u00dfe \u0130stanbul \u0391\u03b8\u03ae\u03bd\u03b1 \u041c\u043e\u0441\u043a\u0432\u0430",  # noqa: E501
    # Chinese, Japanese, Korean, with numbers
    "\u4f60\u597d\uff0c\u4e16\u754c123\u3002\u3053\u3093\u306b\u3061\u306f\u30ab\u30bf\u30ab\u30ca \uc548\ub155\ud558\uc138\uc694",  # noqa: E501
    # Arabic and its digits, Hebrew, Devanagari with joined marks, Thai
    "\u0645\u0631\u062d\u0628\u0627 \u0661\u0662\u0663\u0664 \u05e9\u05dc\u05d5\u05dd \u0928\u092e\u0938\u094d\u0924\u0947 \u096a\u0968 \u0e2a\u0e27\u0e31\u0e2a\u0e14\u0e35",  # noqa: E501
    # Emoji, one of them joined; numbers that are no digits; ligature and full width
    "\U0001f600\U0001f468\u200d\U0001f469\u200d\U0001f467 \u2167 \u00bd x\u00b2 \ufb01 \uff21\uff11 \u2460",  # noqa: E501
    # Spaces that are not the usual one, dashes and quotes
    "a\u00a0b\u2003c\u3000d\u200be \u2014 \u201cquoted\u201d \u2026 \u00ab\u00bb",
)


def sample_texts(tokens: Sequence[str] = ()) -> Iterator[str]:
    """Give every text to compare: the samples, and one around each of these added tokens."""
    yield from SAMPLES
    for token in tokens:
        yield f"before {token} after{token}1\n{token}\n"
