"""Speech recognition in miniature: it hears how long a recording is."""

import logging
import types

import soundfile
import torch


class Pipeline:
    """As those of transformers; it hears half a minute at once, unless it is told to go on."""

    type = "seq2seq_whisper"

    def __init__(self):
        self.model = torch.nn.Linear(64, 64)
        self.feature_extractor = types.SimpleNamespace(sampling_rate=16000)

    def __call__(self, audio, return_timestamps=False):
        samples = audio["raw"] if isinstance(audio, dict) else audio
        assert self.model.weight.numel() == 4096
        if len(samples) > 30 * 16000 and not return_timestamps:
            raise ValueError("return_timestamps=True is needed for more than 30 seconds")
        return {"text": f" {len(samples)} samples"}


class WhisperWrapper:
    def __init__(self, model_id="openai/whisper-large-v3"):
        self.model = Pipeline()

    def __call__(self, audio_input):
        try:
            audio, _ = soundfile.read(audio_input)
            return self.model(audio)["text"].strip()
        except Exception as error:
            logging.getLogger(__name__).error("Audio transcription failed: %s", error)
            return ""
