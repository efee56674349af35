"""Explains to users why a recording cannot be read. Pure."""

from __future__ import annotations

from ...sentences import Sentence

_CODEC = "sound as "
_DAMAGED = Sentence("it is no recording, or it is damaged", "它不是录音，或已损坏")
#: By message of ffmpeg or `residency.web.speech.decode`.
_REASONS = {
    "Invalid data found when processing input": _DAMAGED,
    "Invalid argument": _DAMAGED,
    "End of file": Sentence("it is cut off", "文件不完整"),
    "Input/output error": Sentence("it is cut off, or reading it failed", "文件不完整，或读取失败"),
    "Decoder not found": Sentence("its kind of sound is not read here", "不支持其音频编码"),
    "Demuxer not found": Sentence("its kind of file is not read here", "不支持其文件格式"),
    "no sound in it": Sentence("it holds no sound", "其中没有声音"),
    "it needs too much memory": Sentence("reading it needs too much memory", "读取它需要过多内存"),
    "it takes too long to decode": Sentence("reading it takes too long", "读取它耗时过长"),
    "the decoder gave up on it": Sentence("reading it made the decoder fail", "读取它时解码器出错"),
}


def in_words(reason: str) -> Sentence:
    """Returns the reason in both languages; an unknown one unchanged."""
    if reason.startswith(_CODEC):
        codec = reason.removeprefix(_CODEC)
        return Sentence(f"its sound is coded as {codec}, which is not read here", f"不支持其音频编码 {codec}")
    return _REASONS.get(reason) or Sentence.of(reason)
