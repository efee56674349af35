"""Speech recognition in miniature: it hears how long a recording is."""

import soundfile
import torch


class WhisperWrapper:
    def __init__(self, model_id="openai/whisper-large-v3"):
        self.model = torch.nn.Linear(64, 64)

    def __call__(self, audio_input):
        audio, _ = soundfile.read(audio_input)
        assert self.model.weight.numel() == 4096
        return f"{len(audio)} samples"
