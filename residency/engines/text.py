"""Checks of input texts."""

from __future__ import annotations

import re
import unicodedata

from ..errors import InvalidInput

MAX_CHARACTERS = 5000
#: Full-width forms (U+FF01 to U+FF5E) and Chinese punctuation, typed with an active input method.
_HALF_WIDTH = {0xFF01 + offset: 0x21 + offset for offset in range(94)} | str.maketrans("。、", ".,")
_WORD = re.compile(r"[^\W\d_]+")
_TAG = re.compile(r"\[[^\[\]]*\]")
_LATIN = ("LATIN", "MODIFIER LETTER")
_SPOKEN_BY_STEP_AUDIO = (*_LATIN, "CJK", "IDEOGRAPHIC", "HIRAGANA", "KATAKANA", "HANGUL", "BOPOMOFO")


def required(text: str | None, en: str, zh: str) -> str:
    """Strips a text; raises `InvalidInput` if it is empty or too long. ``en``, ``zh``: its name in the message."""
    stripped = (text or "").strip()
    if not stripped:
        raise InvalidInput(f"{en} is empty: fill it in", f"{zh}为空：请填写")
    if len(stripped) > MAX_CHARACTERS:
        raise InvalidInput(
            f"{en} has {len(stripped):,} characters: give at most {MAX_CHARACTERS:,} at a time",
            f"{zh}有 {len(stripped):,} 个字符：每次最多 {MAX_CHARACTERS:,} 个",
        )
    return stripped


def speakable(target_text: str | None) -> str:
    """Returns the text for the built-in engine; raises `InvalidInput`. Needs no model."""
    return english(required(target_text, "Target Text", "目标文本"))


def english(text: str) -> str:
    """Converts punctuation to half width; raises `InvalidInput` if a word has letters other than Latin ones.

    The engine would silently omit such a word. Single Greek letters (α, π) are allowed.
    """
    text = unicodedata.normalize("NFC", text.translate(_HALF_WIDTH))
    if foreign := next((word for word in _WORD.findall(text) if _is_foreign(word, _LATIN)), None):
        raise InvalidInput(
            f"Write the text in English: the built-in engine speaks English only and cannot pronounce "
            f"“{_short(foreign)}” (Step-Audio-EditX, started with --model-path, also speaks Chinese, Japanese and "
            f"Korean)",
            f"请用英文填写：内置引擎只会说英语，无法朗读“{_short(foreign)}”"
            f"（以 --model-path 启动的 Step-Audio-EditX 还支持中文、日语和韩语）",
        )
    return text


def spoken_by_step_audio(text: str) -> None:
    """Raises `InvalidInput` if most letters are of a script of which Step-Audio-EditX speaks no language.

    Other languages in Latin letters pass, and so do words of other scripts within a text.
    """
    words = _WORD.findall(unicodedata.normalize("NFC", _TAG.sub(" ", text or "")))
    foreign = [word for word in words if _is_foreign(word, _SPOKEN_BY_STEP_AUDIO)]
    if 2 * sum(map(len, foreign)) > sum(map(len, words)):
        raise InvalidInput(
            f"Step-Audio-EditX does not speak the language of “{_short(foreign[0])}”: write the text in Chinese "
            f"(Mandarin; Cantonese or Sichuanese after [Cantonese] or [Sichuanese]), English, Japanese (after "
            f"[Japanese]) or Korean (after [Korean])",
            f"Step-Audio-EditX 不支持“{_short(foreign[0])}”所属的语言：请用中文（普通话；粤语、四川话请在开头加 "
            f"[Cantonese] 或 [Sichuanese]）、英语、日语（开头加 [Japanese]）或韩语（开头加 [Korean]）填写",
        )


def _short(word: str) -> str:
    return word if len(word) <= 20 else word[:20] + "…"


def _is_foreign(word: str, scripts: tuple[str, ...]) -> bool:
    """Whether a word has letters of other scripts, given as the beginnings of their names in Unicode.

    Ignores non-letters (²), letters without a script (º), single Greek letters and compatibility forms (𝐇, Ｈ).
    """
    letters = [letter for letter in word if letter.isalpha()]
    names = [unicodedata.name(unicodedata.normalize("NFKC", letter)[0], "") for letter in letters]
    if len(word) == 1 and names and names[0].startswith("GREEK"):
        return False
    return not all("LATIN" in name or name.startswith(scripts) for name in names)
