"""A StepAudioTTS program that frees the GPU after each call; only the import and the constructor change.

    -from tokenizer import StepAudioTokenizer
    -from tts import StepAudioTTS
    +from tts_gpu_managed import GPUManagedTTS as StepAudioTTS
     ...
    -tts = StepAudioTTS(f"{models}/Step-Audio-EditX", StepAudioTokenizer(f"{models}/Step-Audio-Tokenizer"))
    +tts = StepAudioTTS(f"{models}/Step-Audio-EditX", make_tokenizer)  # a function, for lazy loading

    python examples/drop_in.py --out /tmp
    python examples/drop_in.py --out /tmp --model-path /models --step-audio-root /opt/Step-Audio-EditX \\
        --prompt me.wav --prompt-text "What I say in it."

The first command uses the small built-in English engine, without weights or a GPU; the second Step-Audio-EditX, in its
checkout's environment. Without ``--prompt``, the prompt is synthesized. Prints::

    before    released  device 0 B, host 0 B
    cloned    cpu       device 0 B, host ... B; gpu -> cpu ... B; ...clone.wav ... s
    edited    cpu       device 0 B, host ... B; gpu -> cpu ... B; ...faster.wav ... s
    released  released  device 0 B, host 0 B; cpu -> released ... B
    {
      "enabled": true,
      ...
    }
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import soundfile

from gpu_manager import SimulatedDevice, find_device, get_gpu_manager
from tts_gpu_managed import GPUManagedTTS as StepAudioTTS

PROMPT_TEXT = "This is my voice, and I am going to keep it for as long as I can."


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model-path", help="has Step-Audio-Tokenizer and Step-Audio-EditX in it")
    parser.add_argument("--step-audio-root", help="the Step-Audio-EditX checkout (or STEP_AUDIO_ROOT, or one nearby)")
    parser.add_argument("--prompt", type=Path, help="a recording of a voice, five seconds or more")
    parser.add_argument("--prompt-text", default=PROMPT_TEXT, help="what is said in it")
    parser.add_argument("--out", type=Path, default=Path(), help="the folder for the WAV files (this one)")
    arguments = parser.parse_args()
    if arguments.step_audio_root:
        os.environ["STEP_AUDIO_ROOT"] = arguments.step_audio_root
    if not find_device().separate:  # simulates a GPU, to show the moves without one
        get_gpu_manager(SimulatedDevice(capacity_bytes=48 << 30))

    tts = engine(arguments.model_path)
    prompt = str(arguments.prompt or speak(PROMPT_TEXT, arguments.out / "prompt.wav"))

    tell(tts, "before")
    cloned = save(arguments.out / "clone.wav", *tts.clone(prompt, arguments.prompt_text, "Nobody speaks, it is free."))
    tell(tts, "cloned", cloned)
    edited = tts.edit(str(arguments.out / "clone.wav"), "Nobody speaks, it is free.", "speed", "faster")
    tell(tts, "edited", save(arguments.out / "faster.wav", *edited))
    tts.force_release()  # otherwise done by the idle timeout
    tell(tts, "released")
    print(json.dumps(tts.get_gpu_status(), indent=2, ensure_ascii=False))
    return 0


def engine(models: str | None) -> StepAudioTTS:
    if models is None:
        return StepAudioTTS(None)

    def make_tokenizer() -> Any:
        from tokenizer import StepAudioTokenizer  # from the checkout; importable from the first load on

        return StepAudioTokenizer(os.path.join(models, "Step-Audio-Tokenizer"))

    return StepAudioTTS(os.path.join(models, "Step-Audio-EditX"), make_tokenizer, gpu_idle_timeout="10m")


def tell(tts: StepAudioTTS, when: str, *more: str) -> None:
    while (model := tts.get_gpu_status()["models"][tts.name])["state"] == "moving":
        time.sleep(0.01)  # a move goes on after its request
    held = f"{when:<9} {model['state']:<9} device {model['device_bytes']:,} B, host {model['host_bytes']:,} B"
    move = model["last_move"]
    print("; ".join([held, *([f"{move['from']} -> {move['to']} {move['bytes']:,} B"] if move else []), *more]))


def save(file: Path, audio: Any, sample_rate: int) -> str:
    soundfile.write(file, audio[0].numpy(), sample_rate)
    return f"{file} {audio.shape[1] / sample_rate:.1f} s"


def speak(text: str, file: Path) -> Path:
    os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")  # otherwise ONNX Runtime writes files
    from hibari import Hibari

    Hibari().save(text, str(file), seed=1)
    return file


if __name__ == "__main__":
    sys.exit(main())
