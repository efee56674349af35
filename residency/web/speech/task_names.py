"""Tasks and sub-tasks of Step-Audio-EditX: values, display names and descriptions. Pure.

Engines get the values, such as ``vad``. A value that is not listed here is its own name, without a description.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence

from ..shared.language import Localize, bracketed, en, zh

#: Name and description of each task, in Chinese and English.
_TASKS = {
    "clone": (
        ("克隆音色", "clone"),
        ("用录音的音色朗读目标文本。", "Says the target text in the voice of the recording."),
    ),
    "emotion": (("情绪", "emotion"), ("内容不变，换一种情绪。", "Says the same with another emotion.")),
    "style": (("风格", "style"), ("内容不变，换一种说话风格。", "Says the same in another manner of speaking.")),
    "vad": (("去除停顿", "cut pauses"), ("去除录音中的长停顿。", "Cuts long pauses out of the recording.")),
    "denoise": (("降噪", "reduce noise"), ("去除录音中的背景噪声。", "Takes background noise out of the recording.")),
    "paralinguistic": (
        ("笑声、叹息等", "laughter, sighs"),
        (
            "在目标文本的标签处加入声音，例如 [Laughter]。",
            "Adds sounds where the target text has tags such as [Laughter].",
        ),
    ),
    "speed": (("语速", "speed"), ("说得快一些或慢一些。", "Speaks faster or slower.")),
}
#: Names of sub-tasks by task, in Chinese and, if it differs from the value, in English.
_SUB_TASKS: dict[str, dict[str, tuple[str, ...]]] = {
    "emotion": {
        "happy": ("高兴",), "angry": ("生气",), "sad": ("悲伤",), "humour": ("幽默",), "confusion": ("困惑",),
        "disgusted": ("厌恶",), "empathy": ("共情",), "embarrass": ("尴尬", "embarrassed"), "fear": ("恐惧",),
        "surprised": ("惊讶",), "excited": ("兴奋",), "depressed": ("沮丧",), "coldness": ("冷漠",),
        "admiration": ("钦佩",), "remove": ("去除情绪", "no emotion"),
    },
    "style": {
        "serious": ("严肃",), "arrogant": ("傲慢",), "child": ("儿童",), "older": ("老人", "elderly person"),
        "girl": ("少女",), "pure": ("清纯",), "sister": ("御姐", "elder sister"), "sweet": ("甜美",),
        "ethereal": ("空灵",), "whisper": ("耳语",), "gentle": ("温柔",), "recite": ("朗诵", "recitation"),
        "generous": ("大方",), "act_coy": ("撒娇", "coy"), "warm": ("温暖",), "shy": ("害羞",),
        "comfort": ("安慰", "comforting"), "authority": ("权威", "authoritative"), "chat": ("闲聊",),
        "radio": ("电台",), "soulful": ("深情",), "story": ("讲故事", "storytelling"), "vivid": ("生动",),
        "program": ("节目主持", "show host"), "news": ("新闻播报",), "advertising": ("广告",), "roar": ("咆哮",),
        "murmur": ("低语",), "shout": ("喊叫",), "deeply": ("低沉", "deep voice"), "loudly": ("洪亮", "loud voice"),
        "remove": ("去除风格", "no style"), "exaggerated": ("夸张",),
    },
    "speed": {
        "faster": ("快一些",), "slower": ("慢一些",), "more faster": ("快很多", "much faster"),
        "more slower": ("慢很多", "much slower"),
    },
}  # fmt: skip
STEP_AUDIO_EDIT_TYPES: dict[str, list[str]] = {task: list(_SUB_TASKS.get(task, {})) for task in _TASKS}
"""Values of sub-tasks by task, for engines that do not list their own."""

#: Descriptions of sub-tasks by task, which replace the task's; ``{}`` is the sub-task's name.
_SUB_TASK_LINES = {
    "emotion": ("内容不变，情绪变为：{}。", "Says the same with this emotion: {}."),
    "style": ("内容不变，风格变为：{}。", "Says the same in this manner: {}."),
    "speed": ("内容不变，语速变为：{}。", "Says the same at another speed: {}."),
}
_REMOVALS = {
    "emotion": ("内容不变，不带情绪。", "Says the same without any emotion."),
    "style": ("内容不变，不带特定风格。", "Says the same in a plain manner."),
}

_SENTENCE_END = re.compile(r"[.!?;。！？；]|(?<![:：])\n(?![-*•])|\b(?<!anything )but\b|但|而是")
"""In lines without spaces at their ends. A list after a colon belongs to its sentence."""
_CLAUSE_END = re.compile(r"[,，、\n]|(?=\b(?:without|instead of|rather than)\b)")
_DENIAL = re.compile(
    r"\b(?:not|no|non|never|nor|neither|cannot|without|stop|avoid|less|anything but|instead of|rather than"
    r"|[a-z]+n['’]t|(?:do|does|is|are|ca|wo|must|should)nt)\b"
    r"|不|没|勿|莫|(?<![特分个])别|无(?!比)|非(?!常)|停止|避免|禁止"
)
_OTHER_WORDS = re.compile("生气(?=勃勃|盎然)")
"""Names of sub-tasks that mean something else there: full of life, not angry."""


def task_name(task: str, localize: Localize) -> str:
    """Returns the name of a task, with its value if that differs: ``cut pauses (vad)``."""
    names = _TASKS[task][0] if task in _TASKS else (task, task)
    return localize(*_with_value(names, task))


def sub_task_name(task: str, sub_task: str, localize: Localize) -> str:
    """Returns the name of a sub-task, with its value if that differs."""
    return localize(*_with_value(_sub_task_names(task, sub_task), sub_task))


def line(task: str | None, sub_task: str | None, localize: Localize) -> str:
    """Returns the description of a task, or of its sub-task; empty if unknown."""
    if task not in _TASKS:
        return ""
    if sub_task == "remove" and task in _REMOVALS:
        return localize(*_REMOVALS[task])
    if sub_task and task in _SUB_TASK_LINES:
        names = _sub_task_names(task, sub_task)
        return localize(*(text.format(name) for text, name in zip(_SUB_TASK_LINES[task], names, strict=True)))
    return localize(*_TASKS[task][1])


def choices(values: Sequence[str], task: str | None, localize: Localize) -> list[tuple[str, str]]:
    """Returns (name, value) of tasks, or of sub-tasks of ``task``, for a dropdown."""
    return [
        (task_name(value, localize) if task is None else sub_task_name(task, value, localize), value)
        for value in values
    ]


def named_in(instructions: str, offered: Mapping[str, Sequence[str]]) -> tuple[str, str] | None:
    """Returns the task and sub-task that instructions name (``happy``, ``in a whisper``, ``高兴``).

    None if they name not exactly one. A name counts as whole words, in either language, with or without its task; of
    ``much faster`` and ``faster`` the longer counts. A denied name (``not happy``, ``别生气``) does not count.
    """
    asked = "".join(_not_denied(instructions.casefold()))
    text = re.sub(r"[\W_]+", " ", f" {asked} ")
    found: dict[tuple[str, str], str] = {}
    for task, sub_tasks in offered.items():
        for sub_task in sub_tasks:
            chinese, english = _sub_task_names(task, sub_task)
            names = [f" {name.replace('_', ' ').casefold()} " for name in (sub_task, english)]
            names = [name for name in names if name in text] + [chinese] * (chinese in asked)
            if sub_task != "remove" and names:
                found[task, sub_task] = max(names, key=len)
    longest = [
        each for each, name in found.items() if not any(name != other and name in other for other in found.values())
    ]
    return longest[0] if len(longest) == 1 else None


def _not_denied(text: str) -> Iterator[str]:
    """Yields the clauses of a text that deny nothing, and follow no denial in their sentence before a ``but``."""
    text = "\n".join(filter(None, map(str.strip, _OTHER_WORDS.sub("", text).splitlines())))
    for sentence in _SENTENCE_END.split(text):
        for clause in _CLAUSE_END.split(sentence):
            if _DENIAL.search(clause):
                break
            yield clause + "\n"


def _sub_task_names(task: str, sub_task: str) -> tuple[str, str]:
    chinese, *english = _SUB_TASKS.get(task, {}).get(sub_task, (sub_task,))
    return chinese, english[0] if english else sub_task


def _with_value(names: tuple[str, str], value: str) -> Iterator[str]:
    for name, localize in zip(names, (zh, en), strict=True):
        yield name if name == value else name + bracketed(value, localize)
