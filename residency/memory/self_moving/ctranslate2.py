"""CTranslate2: unloads a model to main memory and loads it back. A WhisperModel of faster-whisper contains one.

Source: https://opennmt.net/CTranslate2/python/ctranslate2.Translator.html
"""

from __future__ import annotations

from .moves import OwnMoves

_MODEL = OwnMoves(
    offload=lambda model: model.unload_model(to_cpu=True),
    restore=lambda model: model.load_model(),
    release=lambda model: model.unload_model(),
    on_gpu=lambda model: model.device == "cuda",
)

MOVES = {
    f"ctranslate2.{name}": _MODEL
    for name in ("Encoder", "Generator", "Translator", "Wav2Vec2", "Wav2Vec2Bert", "Whisper")
}
