"""Chinese for everybody whose answers are in Chinese, under the names that Gradio knows it by.

Gradio's page speaks zh-CN and zh-TW, and looks at the browser's first language only, before anything of ours is run; a
browser that says zh-HK or zh-Hans-CN is taken for an English one. Answers are in the first of Chinese and English among
all its languages (`language.preferred`). So the page's first line has it named by that, if it is Chinese.
"""

from __future__ import annotations

from .page_head import with_script

around = with_script("""{
  const read = navigator.languages.find(each => /^(zh|en)\\b/i.test(each));
  const known = /hant|tw|hk|mo/i.test(read) ? "zh-TW" : "zh-CN";
  if (/^zh/i.test(read)) Object.defineProperty(navigator, "language", {get: () => known});
}""")
"""An ASGI middleware."""
