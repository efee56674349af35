"""Texts of components, translated in the browser by Gradio.

The key of a text is the text in both languages, which Gradio shows if it gets no `translations`.
"""

from __future__ import annotations

from typing import Any

import gradio as gr

from ..shared.language import both

_CHINESE: dict[str, str] = {}
_ENGLISH: dict[str, str] = {}


def label(chinese: str, english: str) -> Any:
    """Returns a translated text for labels, placeholders and values of components."""
    key = both(chinese, english)
    _CHINESE[key], _ENGLISH[key] = chinese, english
    return gr.I18n()(key)


def translations() -> gr.I18n:
    """Returns all texts registered so far, for ``launch(i18n=)``."""
    return gr.I18n(**{"zh": _CHINESE, "zh-CN": _CHINESE, "zh-TW": _CHINESE, "en": _ENGLISH})
