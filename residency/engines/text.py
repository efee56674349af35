"""Texts that people ask for, checked before anything is computed."""

from __future__ import annotations

import re
import unicodedata

from ..errors import InvalidInput

MAX_CHARACTERS = 5000
#: Full-width forms (U+FF01 to U+FF5E) and Chinese punctuation, typed with an input method that was left on.
_HALF_WIDTH = {0xFF01 + offset: 0x21 + offset for offset in range(94)} | str.maketrans("。、", ".,")
_WORD = re.compile(r"[^\W\d_]+")


def required(text: str | None, en: str, zh: str) -> str:
    """The text without surrounding space; `InvalidInput` if nothing is left or it is too long.

    Args:
        en, zh: what the text is, for the message (``Prompt Text``).
    """
    stripped = (text or "").strip()
    if not stripped:
        raise InvalidInput(f"{en} is empty: fill it in", f"{zh}为空：请填写")
    if len(stripped) > MAX_CHARACTERS:
        raise InvalidInput(
            f"{en} has {len(stripped):,} characters: give at most {MAX_CHARACTERS:,} at a time",
            f"{zh}有 {len(stripped):,} 个字符：每次最多 {MAX_CHARACTERS:,} 个",
        )
    return stripped


def english(text: str) -> str:
    """The text with half-width punctuation; `InvalidInput` if it has words that are not written in Latin letters.

    One such word is enough: it would be left out of the speech without a sound. Greek letters that stand alone
    (α, π) pass.
    """
    text = unicodedata.normalize("NFC", text.translate(_HALF_WIDTH))
    foreign = foreign_words(text)
    if foreign:
        quoted = foreign[0] if len(foreign[0]) <= 20 else foreign[0][:20] + "…"
        raise InvalidInput(
            f"Write the text in English: the built-in engine speaks English only and cannot say “{quoted}” "
            f"(Step-Audio-EditX, started with --model-path, also speaks Chinese, Japanese and Korean)",
            f"请用英文填写：内置引擎只会说英语，无法朗读“{quoted}”"
            f"（以 --model-path 启动的 Step-Audio-EditX 还支持中文、日语和韩语）",
        )
    return text


def speakable(target_text: str | None) -> str:
    """The text that the built-in engine shall say, as `english` gives it; `InvalidInput`. Needs no model."""
    return english(required(target_text, "Target Text", "目标文本"))


def foreign_words(text: str) -> list[str]:
    """The words that have letters other than Latin ones, Greek letters that stand alone left out."""
    return [word for word in _WORD.findall(text) if not all(map(_is_latin, word)) and not _is_greek_symbol(word)]


def _is_latin(character: str) -> bool:
    """Also true of what is no letter (²) or a letter of no script (º); 𝐇 and Ｈ are H in other clothes."""
    name = unicodedata.name(unicodedata.normalize("NFKC", character)[0], "")
    return not character.isalpha() or "LATIN" in name or name.startswith("MODIFIER LETTER")


def _is_greek_symbol(word: str) -> bool:
    return len(word) == 1 and unicodedata.name(unicodedata.normalize("NFKC", word), "").startswith("GREEK")
