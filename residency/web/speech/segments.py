"""Splits a text into sentences, for engines that speak one at a time. Pure.

The ends of sentences are those of sentencex (Wikimedia). The caller's language selects abbreviations; text in Chinese
or Japanese needs no language of its own, since its punctuation is not that of other languages.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterator
from itertools import groupby

import sentencex

from ...sentences import without_surrogates

_BLOCK = 4096
"""Characters given to sentencex at once: its time grows with the square of a text without spaces."""

_LEAST_WEIGHT = 8
"""Letters and digits of a segment (Chinese characters count twice): a cloned voice speaks shorter ones badly."""

_WIDE = "[\u3040-\u30ff\u3400-\u9fff\uac00-\ud7af\uf900-\ufaff\U00020000-\U0003ffff]"
_WEIGHED = re.compile(r"\w"), re.compile(_WIDE)
_TAG = re.compile(r"\[[\w-]{1,30}\]")
_CLOSING = "\"'”’»」』）)\\]】》"
_AFTER_CLOSING = re.compile("[”’」』）】》]+")
#: Quotes and brackets as spaces: sentencex does not divide what they enclose.
_UNQUOTED = str.maketrans(dict.fromkeys("\"'“”‘’«»„「」『』（）()【】《》", " "))
#: Where a sentence is cut, by preference: after clauses, at spaces, beside Chinese characters.
_CUTS = (
    re.compile(rf"[,;:–—،؛、][{_CLOSING}]*(?=\s)|[，、；：—…][{_CLOSING}]*(?![，、；：—…{_CLOSING}])"),
    re.compile(r"(?=\s)"),
    re.compile(rf"(?<={_WIDE})(?![\s，。！？、；：…{_CLOSING}])|(?={_WIDE})(?<![“‘「『（(\[【《])"),
)
_JOINER = "\u200d"


def sentences(text: str, most_characters: int = 300, language: str = "en") -> list[str]:
    """Returns the sentences of a text in order; joined by spaces they contain each word. Takes linear time.

    Blank lines end sentences, all other white space becomes one space. Sentences of fewer than some 8 letters are
    joined with the next, or the last one with that before. Longer ones than ``most_characters`` are divided: at the
    sentences within quotes, after clauses, at spaces, beside Chinese characters, then anywhere. No string is empty; a
    text without visible characters has no sentences. Lone surrogates, which no engine can read, become U+FFFD.

    Args:
        language: ISO 639-1 code, whose abbreviations end no sentence; an unknown one is read as English.

    Raises:
        ValueError: ``most_characters`` is less than 1.
    """
    if most_characters < 1:
        raise ValueError(f"most_characters must be at least 1, not {most_characters}")
    lines = without_surrogates(text).splitlines()
    paragraphs = [" ".join(" ".join(each).split()) for blank, each in groupby(lines, _is_blank) if not blank]
    found = []
    for sentence in _spoken(paragraphs, language):
        if len(sentence) <= most_characters:
            found.append(sentence)
        else:
            for part in _spoken([sentence], language, apart=True):
                found += _cut(part, most_characters)
    return found


def _is_blank(line: str) -> bool:
    return not line.strip()


def _spoken(paragraphs: list[str], language: str, apart: bool = False) -> Iterator[str]:
    """Yields sentences that are long enough to be spoken; with ``apart``, also those within quotes and brackets."""
    text = " ".join(paragraphs)
    ends, start = [], 0
    for paragraph in paragraphs:
        ends += [start + end for end in _ends(paragraph.translate(_UNQUOTED) if apart else paragraph, language)]
        start += len(paragraph) + 1
    spans: list[tuple[int, int]] = []
    start = last = weight = 0
    for end in ends:
        weight += _weight(text[last:end])
        last = end
        if weight >= _LEAST_WEIGHT:
            spans.append((start, end))
            start, weight = end, 0
    if start < last:
        start = spans.pop()[0] if spans else start
        spans.append((start, last))
    yield from filter(None, (text[start:end].strip() for start, end in spans))


def _ends(paragraph: str, language: str) -> Iterator[int]:
    """Yields the ends of sentences, as indices; the last is that of the paragraph."""
    start = 0
    while start < len(paragraph):
        block = paragraph[start : start + _BLOCK]
        at_end = start + len(block) == len(paragraph)
        parts = sentencex.segment(language, block)
        # The last sentence of a block may continue in the next one.
        for part in parts if at_end else parts[:-1]:
            start += len(part)
            if closing := _AFTER_CLOSING.match(paragraph, start):
                yield closing.end()
            else:
                yield start
        if not at_end and len(parts) == 1:
            start += len(block)


def _weight(text: str) -> int:
    """Returns the number of letters and digits outside of tags such as [Laughter]; Chinese characters count twice."""
    text = _TAG.sub("", text)
    return sum(len(each.findall(text)) for each in _WEIGHED)


def _cut(sentence: str, most: int) -> Iterator[str]:
    """Yields parts of a sentence with at most ``most`` characters, of similar lengths."""
    while len(sentence) > most:
        at = _where(sentence, most)
        yield sentence[:at].rstrip()
        sentence = sentence[at:].lstrip()
    yield sentence


def _where(sentence: str, most: int) -> int:
    least = max(1, most // 4)
    latest = max(least, min(most, len(sentence) - least))
    best = len(sentence) / -(-len(sentence) // most)
    window = sentence[: latest + 32]
    within_tags = {at for tag in _TAG.finditer(window) for at in range(tag.start() + 1, tag.end())}
    allowed = set(range(least, latest + 1)) - within_tags
    for cuts in _CUTS:
        if found := allowed.intersection(match.end() for match in cuts.finditer(window)):
            return min(found, key=lambda at: abs(at - best))
    return max((at for at in allowed if not _is_joined(sentence[at - 1], sentence[at])), default=latest)


def _is_joined(before: str, after: str) -> bool:
    """Tells whether two characters are parts of one that readers see, such as a letter and its accent."""
    joined = unicodedata.category(after).startswith("M") or after == _JOINER or "\U0001f3fb" <= after <= "\U0001f3ff"
    return joined or before == _JOINER
