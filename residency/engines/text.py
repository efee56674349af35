"""Checks of input texts."""

from __future__ import annotations

import re
import unicodedata
from functools import cache
from typing import Any

from ..errors import InvalidInput

MAX_CHARACTERS = 5000
#: Full-width forms (U+FF01 to U+FF5E) and Chinese punctuation, typed with an active input method.
_HALF_WIDTH = {0xFF01 + offset: 0x21 + offset for offset in range(94)} | str.maketrans("。、", ".,")
_WORD = re.compile(r"[^\W\d_]+")
_TAG = re.compile(r"\[[^\[\]]*\]")
_LATIN = ("LATIN", "MODIFIER LETTER")
_SPOKEN_BY_STEP_AUDIO = (*_LATIN, "CJK", "IDEOGRAPHIC", "HIRAGANA", "KATAKANA", "HANGUL", "BOPOMOFO")
_NOT_SPOKEN = (
    "ca", "cs", "da", "de", "es", "fi", "fr", "hr", "hu", "it", "nl", "no", "pl", "pt", "ro", "sk", "sl", "sv", "tr",
    "vi",
)  # fmt: skip
"""Languages in Latin letters, as py3langid names them, which no engine speaks."""
_FEWEST_WORDS, _SURE = 6, 0.95
"""Shorter texts, and those of which py3langid is less sure, pass: of 41,000 English ones none is refused."""


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

    The engine would silently omit such a word. Single Greek letters (α, π) are allowed. Texts that are surely in
    another language are refused too.
    """
    text = unicodedata.normalize("NFC", text.translate(_HALF_WIDTH))
    foreign = next((word for word in _WORD.findall(text) if _is_foreign(word, _LATIN)), None)
    if foreign := foreign or _in_another_language(text):
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

    Also if a text of Latin letters is surely in a language that it does not speak. Words of others within it pass.
    """
    text = unicodedata.normalize("NFC", _TAG.sub(" ", text or ""))
    words = _WORD.findall(text)
    foreign = [word for word in words if _is_foreign(word, _SPOKEN_BY_STEP_AUDIO)]
    most = 2 * sum(map(len, foreign)) > sum(map(len, words))
    if unknown := foreign[0] if most else _in_another_language(text):
        raise InvalidInput(
            f"Step-Audio-EditX does not speak the language of “{_short(unknown)}”: write the text in Chinese "
            f"(Mandarin; for Cantonese or Sichuanese begin the text with [Cantonese] or [Sichuanese]), English, "
            f"Japanese (begin the text with [Japanese]) or Korean (begin it with [Korean])",
            f"Step-Audio-EditX 不支持“{_short(unknown)}”所属的语言：请用中文（普通话；粤语、四川话请在开头加 "
            f"[Cantonese] 或 [Sichuanese]）、英语、日语（开头加 [Japanese]）或韩语（开头加 [Korean]）填写",
        )


def _in_another_language(text: str) -> str:
    """Returns the text if it is surely in a language of Latin letters that no engine speaks; else nothing."""
    text, identifier = _TAG.sub(" ", text).strip(), _identifier()
    if identifier is None or len(_WORD.findall(text)) < _FEWEST_WORDS:
        return ""
    language, probability = identifier.classify(text)
    return text if language in _NOT_SPOKEN and probability >= _SURE else ""


@cache
def _identifier() -> Any:
    """Returns py3langid's identifier (0.6 s, 76 MB), which is thread-safe; None where it is not installed."""
    try:
        from py3langid.langid import MODEL_FILE, LanguageIdentifier
    except ModuleNotFoundError:  # in a checkout's environment without the extra
        return None
    return LanguageIdentifier.from_model_file(MODEL_FILE, norm_probs=True)


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
