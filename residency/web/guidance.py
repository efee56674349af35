"""What the page explains, in Chinese and English. Pure data."""

from __future__ import annotations

HELP = (
    "**CLONE** 用录音的音色朗读目标文本（任务须为 clone），成功后开始新的历史。\n\n"
    "**EDIT** 修改录音；已有结果时，在上一次结果上继续叠加；要编辑新的录音，请先清空历史。",
    "**CLONE** says the target text in the voice of the recording (task: clone); once it succeeds, a new history "
    "begins.\n\n**EDIT** changes the recording, or the latest result if there is one: edits stack. Clear the history "
    "to edit a new recording.",
)
TAGS = """
`[Breathing] [Laughter] [Surprise-oh] [Confirmation-en] [Uhm] [Surprise-ah] [Surprise-wa] [Sigh] [Question-ei]
[Dissatisfaction-hnn]`
"""
PARALINGUISTIC_HELP = (
    f"**paralinguistic** 在目标文本中加入标签： {TAGS}",
    f"**paralinguistic** puts sounds where the target text has tags: {TAGS}",
)
PROMPT_TEXT_HELP = (
    "录音中所说的话，一字不差：模型据此把声音和文字对应起来。",
    "The words that are spoken in the recording; the model matches its sound with them.",
)
PROMPT_EXAMPLE = ("例如：Good morning, nice to meet you.", "For example: Good morning, nice to meet you.")
PROMPT_IS_HEARD = ("上传录音后自动填写", "Written from the recording")
TARGET = ("要用这个声音说的话", "What the voice shall say")
TARGET_IN_ENGLISH = ("要用这个声音说的话（内置引擎只会说英语）", "What the voice shall say, in English")
VERIFIED = (
    "本项目尚未在真实 GPU 上运行过：CUDA 部分用 PyTorch 自身的 CUDA 分配器在一块假显卡上测试，"
    "其余部分用模拟显卡和 CPU 测试。",
    "Nothing of this has run on a real GPU yet: the CUDA code is tested with PyTorch's own CUDA allocator over a fake "
    "card, and everything else with a simulated card and on the CPU.",
)
"""What has and what has not been verified on a GPU, as the READMEs say it near their top."""
