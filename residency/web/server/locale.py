"""Sets the browser's language to zh-CN or zh-TW for Gradio's page, if Chinese comes before English.

Gradio's page supports these two names only, and reads only the first language of the browser: it falls back to English
for zh-HK or zh-Hans-CN. Messages use the first of Chinese and English among all languages (`language.preferred`).
"""

from __future__ import annotations

from .page_head import with_script

around = with_script("""{
  const read = navigator.languages.find(each => /^(zh|en)\\b/i.test(each));
  const known = /hant|tw|hk|mo/i.test(read) ? "zh-TW" : "zh-CN";
  if (/^zh/i.test(read)) Object.defineProperty(navigator, "language", {get: () => known});
}""")
"""An ASGI middleware."""
