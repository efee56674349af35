"""Help texts of the page, in Chinese and English. Pure."""

from __future__ import annotations

from collections.abc import Iterable

_HELP = (
    "**CLONE** 用录音的音色朗读目标文本（无论选择了什么任务），{}。\n\n"
    "**EDIT** 按所选任务修改录音；已有结果时，在上一次结果上继续叠加；要编辑新的录音，请先清空历史。\n\n"
    "**CLONE + EDIT** 先克隆，再按所选子任务（如情绪或风格）修改结果：一次点击，历史中分为两步。\n\n"
    "**声音** 填入已保存的录音及其提示文本。**保存声音** 保存当前的录音和提示文本，所有用户都可以使用。\n\n"
    "每个页面一次只处理一个请求。**停止** 取消排队中的请求，以及引擎允许中断时正在运行的请求。",
    "**CLONE** says the target text in the voice of the recording, whatever task is chosen; {}.\n\n"
    "**EDIT** does the chosen task with the recording, or with the latest result if there is one: "
    "edits stack. Clear the history to edit a new recording.\n\n"
    "**CLONE + EDIT** clones and does the chosen sub-task, such as an emotion or a style, with the result: one press, "
    "two steps in the history.\n\n"
    "**Voice** fills in a stored recording and its prompt text. **Save voice** stores the current ones for all users."
    "\n\nA page has one request at a time. **Stop** cancels one "
    "that waits, and one that runs where the engine can be interrupted.",
)
_CLONE_APPENDS = ("成功后追加到历史中", "once it succeeds, its result is appended to the history")
_CLONE_REPLACES = ("成功后开始新的历史", "once it succeeds, a new history begins")
_TAGS = (
    "Breathing", "Laughter", "Surprise-oh", "Confirmation-en", "Uhm", "Surprise-ah", "Surprise-wa", "Sigh",
    "Question-ei", "Dissatisfaction-hnn",
)  # fmt: skip
_PARALINGUISTIC_HELP = (
    "**笑声、叹息等（paralinguistic）** 在目标文本中加入标签： `{}`",
    "**laughter, sighs (paralinguistic)** puts sounds where the target text has tags: `{}`",
)


def buttons_help(clone_appends: bool) -> list[str]:
    """Returns the help about the buttons in both languages; ``clone_appends``: to the history."""
    outcomes = _CLONE_APPENDS if clone_appends else _CLONE_REPLACES
    return [text.format(outcome) for text, outcome in zip(_HELP, outcomes, strict=True)]


def paralinguistic_help(more_tags: Iterable[str] = ()) -> list[str]:
    """Returns the help about tags in both languages; ``more_tags`` are listed last."""
    tags = " ".join(f"[{tag}]" for tag in (*_TAGS, *more_tags))
    return [text.format(tags) for text in _PARALINGUISTIC_HELP]


PROMPT_TEXT_HELP = (
    "录音中所说的话，一字不差：模型据此把声音和文字对应起来。",
    "The exact words of the recording; the model matches them with its sound.",
)
PROMPT_EXAMPLE = ("例如：Good morning, nice to meet you.", "For example: Good morning, nice to meet you.")
PROMPT_IS_TRANSCRIBED = ("上传录音后自动填写", "Filled in from the recording")
TARGET = ("要用这个声音说的话", "The words to speak in this voice")
TARGET_IN_ENGLISH = ("要用这个声音说的话（内置引擎只会说英语）", "The words to speak in this voice, in English")
NO_MICROPHONE = (
    "🎤 浏览器只允许 https 页面使用麦克风，而本页面通过 http 打开：请上传录音，或用 https 打开（启动时加上 "
    "--ssl-certfile 与 --ssl-keyfile，或使用反向代理）。",
    "🎤 Browsers allow the microphone only on https pages; this page was opened over http: upload a recording, or open "
    "it over https (start the app with --ssl-certfile and --ssl-keyfile, or behind a reverse proxy).",
)
VERIFIED = (
    "本项目尚未在真实 GPU 上运行过：CUDA 部分用 PyTorch 自身的 CUDA 分配器在一块假显卡上测试，"
    "其余部分用模拟显卡和 CPU 测试。",
    "None of this has run on a real GPU yet: the CUDA code is tested with PyTorch's own CUDA allocator on a fake "
    "card, and everything else with a simulated card and on the CPU.",
)
"""The verification status on GPUs, as in the READMEs."""
