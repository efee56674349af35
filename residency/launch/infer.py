"""``python -m gpu_manager infer``: clones or edits a recording with a running app, by the flags of tts_infer.py.

The flags are those of the Step-Audio-EditX checkouts of 2025 and 2026. The running app has the model: flags about it
are accepted, so that scripts need no change, and have no effect.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from ..sentences import in_locale
from .http_calls import failed
from .settings import ENGINE_FLAGS, Settings
from .speak import add_app, saved

_TASKS = ("clone", "emotion", "style", "vad", "denoise", "paralinguistic", "speed")
_OF_MODEL = ("model_path", "model_source", "tts_model_id", *ENGINE_FLAGS)


def main(argv: Sequence[str]) -> int:
    """Writes the results as WAV files; returns 0 once all are complete, else 1."""
    arguments = _parser().parse_args(argv)
    ignored = [flag for flag in _flags_of_model() if flag in {word.partition("=")[0] for word in argv}]
    if ignored:
        names = ", ".join(ignored)
        en, zh = f"No effect, the running app has the model: {names}", f"模型由运行中的应用决定，以下参数无效：{names}"
        print(in_locale(f"{en} / {zh}"), file=sys.stderr)
    recording = Path(arguments.prompt_audio)
    folder = Path(arguments.output_dir)
    try:
        audio = recording.read_bytes()
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        return failed(
            f"Give a recording that exists, and a folder for results ({error}) / 请指定存在的录音和结果目录（{error}）"
        )
    stem = recording.name.partition(".")[0]
    if arguments.edit_type == "clone":
        body = {"input": arguments.generated_text, "ref_text": arguments.prompt_text}
        return _save("speech", body, audio, folder / f"{stem}_cloned.wav", arguments)
    for number in range(1, arguments.n_edit_iter + 1):
        body = {
            "text": arguments.prompt_text, "task": arguments.edit_type, "sub_task": arguments.edit_info,
            "tagged_text": arguments.generated_text,
        }  # fmt: skip
        output = folder / f"{stem}_edited_iter{number}.wav"
        if code := _save("edits", body, audio, output, arguments):
            return code
        audio = output.read_bytes()
    return 0


def _save(call: str, fields: dict[str, str], audio: bytes, output: Path, arguments: argparse.Namespace) -> int:
    if code := saved(call, {**fields, "response_format": "wav"}, str(output), arguments, audio):
        return code
    print(f"[Saved] {output}")
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        "python -m gpu_manager infer",
        description="Clone or edit a recording with a running app.",
        epilog="Flags of tts_infer.py about the model are accepted and have no effect.",
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("--prompt-audio", "--prompt-audio-path", required=True, metavar="FILE", help="the recording")
    add("--prompt-text", default="", help="the words said in it")
    add("--generated-text", default="", help="the text to speak; for paralinguistic, the words with tags")
    add("--edit-type", choices=_TASKS, default="clone", help="default: clone")
    add("--edit-info", default="", help="the sub-task, such as happy")
    add("--n-edit-iter", type=int, default=1, metavar="N", help="edit the result again, N times in all (default: 1)")
    add("--output-dir", default="./output_dir", metavar="DIR", help="default: %(default)s")
    add_app(parser)
    for flag, is_switch in _flags_of_model().items():
        add(flag, action="store_true" if is_switch else "store", help=argparse.SUPPRESS)
    return parser


def _flags_of_model() -> dict[str, bool]:
    """Returns the flags of app.py about the model, and whether each takes no value."""
    defaults = {name: getattr(Settings, name) for name in _OF_MODEL}
    return {
        ("--no-" if default is True else "--") + name.replace("_", "-"): isinstance(default, bool)
        for name, default in defaults.items()
    }
