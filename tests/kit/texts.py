"""A thousand texts to compare tokenizers on, the same on every machine."""

from __future__ import annotations

import random
from collections.abc import Iterator

_PHRASES = (
    "What is 7 * 8?",
    "Tom's 16 eggs cost $3.14 each; he'll sell 2/5 of them.",
    "The answer is \\boxed{42}.",
    "def f(x):\n    return x ** 2  # squared\n",
    "if (a&&b) { c[i]++; } // done",
    "SELECT * FROM t WHERE id IN (1, 2, 3);",
    '{"name": "search", "arguments": {"query": "words"}}',
    "https://example.org/a/b?c=d&e=%20f#g",
    "caf\u00e9 na\u00efve \u0153uvre stra\u00dfe \u00c5ngstr\u00f6m",
    "\u041f\u0440\u0438\u0432\u0435\u0442, \u043c\u0438\u0440! "
    "\u041a\u0430\u043a \u0434\u0435\u043b\u0430?",
    "\u4f60\u597d\uff0c\u4e16\u754c\u3002\u6570\u5b66\u9898\uff1a\u4e09\u52a0\u56db",
    "\u3053\u3093\u306b\u3061\u306f\u4e16\u754c\u3001\u30c6\u30b9\u30c8",
    "\uc548\ub155\ud558\uc138\uc694 \uc138\uacc4",
    "\u0645\u0631\u062d\u0628\u0627 \u0628\u0627\u0644\u0639\u0627\u0644\u0645 \u0663\u0664\u0665",
    "\u05e9\u05dc\u05d5\u05dd \u05e2\u05d5\u05dc\u05dd",
    "\u0928\u092e\u0938\u094d\u0924\u0947 \u0926\u0941\u0928\u093f\u092f\u093e \u0967\u0968\u0969",
    "\u0e2a\u0e27\u0e31\u0e2a\u0e14\u0e35\u0e0a\u0e32\u0e27\u0e42\u0e25\u0e01",
    "\u03b1 + \u03b2 = \u03b3, \u2211\u221a\u222b \u2264 \u221e",
    "e\u0301 a\u0308 (combining)",
    "\U0001f600\U0001f468\u200d\U0001f469\u200d\U0001f467 \U0001f1e9\U0001f1ea",
    "isn't we're I've I'm you'd DON'T IT'S",
    "CamelCaseWords and snake_case_words, ALLCAPS",
    "\u00bd \u00b2 \u2167 \u2460 \uff11\uff12",
    "3.14159 1,000,000 0x1F 1e-9 12:30 2026-11-30",
)
_GAPS = (
    "",
    " ",
    "  ",
    "   ",
    " " * 9,
    " " * 33,
    "\n",
    "\n\n",
    "\n" * 5,
    "\r\n",
    "\t",
    "\t\t",
    " \n ",
)
_GAPS += ("\u00a0", "\u3000", "\u200b", ".", ", ", " - ", "...", "!!", "/", "_", "'", '"')
_ALPHABETS = (
    "abcdefghijklmnopqrstuvwxyz",
    "aeiou ",
    "0123456789",
    "0123456789.,-+",
    '!"#$%&()*+,-./:;=?@[]^_{|}~',
    " \t\n",
    "".join(map(chr, range(0xC0, 0x180))),
    "".join(map(chr, range(0x370, 0x530))),
    "".join(map(chr, range(0x5D0, 0x6FF))),
    "".join(map(chr, range(0x900, 0x980))),
    "".join(map(chr, range(0x3040, 0x3100))),
    "".join(map(chr, range(0x4E00, 0x5E00))),
    "".join(map(chr, range(0xAC00, 0xB400))),
    "".join(map(chr, range(0x1F300, 0x1F650))),
    "".join(map(chr, range(0x2000, 0x2700))),
)


def texts_to_compare(count: int = 1000) -> Iterator[str]:
    """Give texts of many kinds: sentences, code, numbers, scripts, white space, noise."""
    draw = random.Random("texts")
    yield from _PHRASES
    for _ in range(count - len(_PHRASES)):
        parts = []
        for _ in range(draw.randint(1, 6)):
            if draw.random() < 0.6:
                phrase = draw.choice(_PHRASES)
                begin = draw.randrange(len(phrase))
                parts.append(phrase[begin : begin + draw.randint(1, 40)])
            else:
                alphabet = draw.choice(_ALPHABETS)
                parts.append("".join(draw.choices(alphabet, k=draw.randint(1, 24))))
            parts.append(draw.choice(_GAPS))
        yield "".join(parts)
