"""Where a text says outright which letter it chooses, in the languages that models answer in."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Final

# What is chosen: English, French, German, Dutch, Spanish, Portuguese, Italian, Russian, Chinese,
# Japanese, Korean.
_NOUNS: Final = (
    r"answer|ans|choice|option|letter|selection|pick|guess|response|verdict|conclusion|solution"
    r"|correct(?: one)?|(?:right|best) one|richtig|korrekt"
    r"|r\u00e9ponse|reponse|choix|antwort|l\u00f6sung|loesung|auswahl|antwoord"
    r"|respuesta|opci\u00f3n|opcion|elecci\u00f3n|resposta|op\u00e7\u00e3o|alternativa"
    r"|risposta|opzione|scelta|\u043e\u0442\u0432\u0435\u0442|\u0432\u0430\u0440\u0438\u0430\u043d\u0442"
    r"|\u7b54\u6848|\u9009\u9879|\u9078\u9805|\u7b54\u3048|\u6b63\u89e3|\u89e3\u7b54|\u6b63\u7b54"
    r"|\uc815\ub2f5|\ub2f5"
)
# What may stand between that and the verb, or the verb and the letter, and says nothing.
_FILLERS: Final = (
    r"(?:correct|right|best|final|chosen|most|likely|choice|option|options? here|letter|here|above"
    r"|to|for|of|the|this|that|question|problem|therefore|thus|hence|then|so|clearly|definitely"
    r"|probably|indeed|actually|simply|just|still|obviously|certainly|surely|now|indeed|given|only"
    r"|correcte?|juste|bonne|donc|la|le|lettre|l'option|option|die|der|richtige|ist|also|somit"
    r"|buchstabe|juiste|dus|correcta|letra|por|lo|tanto|correta|a letra|corretta|giusta|quindi"
    r"|lettera|\u5e94\u8be5|\u6700\u7ec8|\u6b63\u786e|\u9009\u9879|\u9078\u9805|\u5e94|\u9078\u629e\u80a2)"
)
_COPULAS: Final = (
    r"(?:is|are|was|be|must be|has to be|have to be|will be|would be|should be|can only be"
    r"|could only be|may be|might be|seems to be|appears to be|remains|becomes|est|serait|ist"
    r"|lautet|w\u00e4re|is dus|es|ser\u00eda|\u00e9|seria|\u00e8|sarebbe"
    r"|(?<!\u4e0d)\u662f|(?<!\u4e0d)\u4e3a|(?<!\u4e0d)\u70ba|\u306f|\uc740|\ub294)"
)
_MARKS: Final = r"(?:[:=\uff1a\u2192]|[-=]+>|[-\u2013\u2014](?=\s))"
_VERBS: Final = (
    r"(?:go(?:ing)? (?:with|for)|went (?:with|for)|stick(?:ing)? (?:with|to)|opt(?:ing)? for"
    r"|settl(?:e|ing) (?:on|for)|choos(?:e|ing)|chose|pick(?:ing)?|picked|select(?:ing)?|selected"
    r"|vote (?:for)?|guess|say|answer|answer with|leaves(?: us with| only)?|points to|conclude"
    r"|choisis|choisirais|w\u00e4hle|kies|elijo|escojo|escolho|scelgo"
    r"|\u6545\u9009|\u5e94\u9009|\u9009\u62e9|(?<!\u4e0d)\u9009|(?<!\u4e0d)\u9078)"
)
# What a letter is called when it is right.
_RIGHT: Final = (
    r"(?:correct|right|best|true|the answer|the one"
    r"|the (?:only |most )?(?:correct|right|best|likely|appropriate|plausible"
    r"|suitable|accurate|reasonable|fitting|logical)\b"
    r"|most (?:likely|appropriate|plausible|suitable|accurate|fitting))"
)
_IS: Final = (
    r"(?:is|'s|must be|has to be|would be|should be|seems(?: to be)?|looks|appears(?: to be)?)"
)
_OPENING: Final = (
    r"[\s*_\"'`(\[{$\u201c\u300c\u300e\uff08]{0,8}(?:\\(?:text|mathrm|textbf)\{)?[\s(\[*]{0,4}"
)
_CALLED: Final = (
    r"(?P<called>(?:option|choice|letter|answer|lettre|buchstabe|letra|lettera|opci\u00f3n"
    r"|op\u00e7\u00e3o|alternativa|opzione|\u9009\u9879|\u9078\u9805)\s*)?"
)
_LETTER: Final = rf"{_OPENING}{_CALLED}{_OPENING}(?P<letter>[A-Za-z])(?![A-Za-z0-9'\u2019]|-\w)"
# The end of a word, where words have spaces between them.
_END: Final = r"(?:(?<![a-z])|(?![a-z]))"
_GAP: Final = rf"(?:[\s*_,]{{0,8}}{_FILLERS}{_END}){{0,8}}[\s*_]{{0,8}}"
_STATEMENTS: Final = tuple(
    re.compile(pattern, re.IGNORECASE | re.MULTILINE)
    for pattern in (
        # the correct answer must be B; Answer - B
        rf"(?<![a-z])(?:{_NOUNS}){_GAP}(?:(?:'s|(?<![a-z]){_COPULAS}){_END}[\s*_]{{0,8}}[:\uff1a]?|{_MARKS}){_GAP}"
        rf"{_LETTER}",
        # I would go with B
        rf"(?<![a-z]){_VERBS}{_END}{_GAP}{_LETTER}",
        # it must be B
        rf"(?<![a-z])(?:it|this|that)\s*{_IS}{_END}{_GAP}{_LETTER}",
        # ..., so B.
        rf"(?<![a-z])(?:so|thus|hence|therefore|leaving|only){_END}[,:]?{_LETTER}(?=[\s*)\]]*[.!]?\s*$)",
        # not A but B
        rf"(?<![a-z])not\s+{_OPENING}[A-Z](?![A-Za-z])[^.!?\n]{{0,60}}?\bbut\s+(?:rather\s+)?{_LETTER}",
        # B it is
        rf"(?<![A-Za-z0-9'\u2019.-]){_OPENING}(?P<letter>[A-Z])[\s*)]{{1,4}}it is"
        r"(?=[\s*]*[.!]?\s*$)",
        # B is correct; option B would be the best choice
        rf"(?<![A-Za-z0-9'\u2019.-]){_OPENING}(?P<letter>[A-Z])(?P<more>[\s*)\].:]{{1,8}}(?:(?!\b[B-Z]\b)[^.!?\n]){{0,80}}?)?"
        rf"[\s*_)\]]{{0,8}}(?:\b|(?='))\s{{0,4}}{_IS}\s+(?:{_FILLERS}\s+){{0,4}}?{_RIGHT}{_END}",
        # B is the right one, in Chinese
        r"(?P<letter>[A-Z])\s*(?:\u9879)?\s*(?:\u662f)?\u6b63\u786e",
    )
)
# The article, and not a letter: a word follows that gives no reason.
_ARTICLE: Final = re.compile(
    r"\s+(?!because|since|as\b|is\b|must\b|would\b|should\b|seems|looks|appears|has\b|for\b|with\b|and\b|or\b|but\b)[a-z]\w"
)
_SECOND: Final = re.compile(
    r"[\s*)\].,]*(?:or|and|/|&|ou|oder|o|und|et|y|e|\u6216|\u548c)[\s*(\[]*(?P<letter>[A-Z])(?![A-Za-z])"
    r"|[\s*)\]]*,[\s*(\[]*(?P<listed>[A-Z])[\s*)\]]*(?:,|\bor\b|\band\b)"
)
_BEFORE_SECOND: Final = re.compile(r"(?<![A-Za-z])[A-Z][\s*)\]]*(?:,|or|and|/|&)[\s*(\[]*$")
_NOT: Final = re.compile(
    r"\b(?:not|never|cannot|neither|nor|without|unlike|instead of|rather than|if|whether|suppose"
    r"|supposing|assum\w+|unless|pas|nicht|kein\w*|no|non|n\u00e3o)\b|n't\b|\u4e0d",
    re.IGNORECASE,
)
_LESSER: Final = re.compile(r"(?<=[A-Za-z])\s*(?:but|,|;|:)\s")
_SENTENCE_ENDS: Final = re.compile(r"[.!?\u3002\uff1f\uff01](?=\s|$)|\n|[\u3002\uff1f\uff01]")


# How far is looked around a statement: the longest sentence, and a few signs.
_SENTENCE: Final = 400
_NEAR: Final = 40


@dataclass(frozen=True)
class Statement:
    """A place where a text names a letter as its answer.

    Attributes:
        letter: A capital one; None where several are named at once.
    """

    start: int
    letter: str | None


def stated_letters(text: str) -> list[Statement]:
    """Return the places where a text says which letter it chooses, in order.

    What is denied, supposed or asked is no statement, and the article "a" is no letter.
    """
    found = {
        statement
        for pattern in _STATEMENTS
        for match in pattern.finditer(text)
        for statement in _statements(match, text)
    }
    return sorted(found, key=lambda statement: statement.start)


def is_denied(text: str, start: int) -> bool:
    """Tell whether a statement is denied, supposed or asked: by what precedes it, or a `?`."""
    before = text[max(0, start - _SENTENCE) : start]
    ends = [found.end() for found in _SENTENCE_ENDS.finditer(before)]
    clauses = _LESSER.split(before[ends[-1] if ends else 0 :])
    if _NOT.search(clauses[-1]) and not re.match(r"\s*no\b", clauses[-1], re.IGNORECASE):
        return True
    end = _SENTENCE_ENDS.search(text, start, start + _SENTENCE)
    return end is not None and end.group()[0] in "?\uff1f"


def _statements(match: re.Match[str], text: str) -> Iterator[Statement]:
    groups = match.groupdict()
    letter, called, more = match["letter"], groups.get("called"), groups.get("more") or ""
    start, end = match.start("letter"), match.end("letter")
    before, after = text[max(0, start - _NEAR) : start], text[end : end + _NEAR]
    if is_denied(text, match.start()) or _NOT.search(more):
        return
    if letter.islower() and not _is_marked(text, match, called):
        return
    if letter in "aA" and not called and _ARTICLE.match(after):
        return
    second = _SECOND.match(after)
    is_list = second is not None and (second["letter"] or second["listed"]) != letter.upper()
    if is_list or _BEFORE_SECOND.search(before):
        yield Statement(start, None)
    else:
        yield Statement(start, letter.upper())


def _is_marked(text: str, match: re.Match[str], called: str | None) -> bool:
    """Tell whether a small letter can only be a choice: `(b)`, `option b`, or nothing behind it."""
    start, end = match.start("letter"), match.end("letter")
    before, after = text[max(0, start - _NEAR) : start], text[end : end + _NEAR]
    if before.endswith(("(", "[", "*")) and after[:1] in tuple(")]*"):
        return True
    ends = re.match(r"[\s*)\]]*(?:[.,;:!]?\s*$|[.!,;:]\s|\n)", after, re.MULTILINE)
    return ends is not None and (
        called is not None or re.match(r"[\s*)\]]*[.!]?\s*$", after) is not None
    )
