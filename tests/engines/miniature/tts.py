"""The engine in miniature, with the outward shape of the real one."""

import logging
import os
import re

import soundfile
import torch
from model_loader import ModelSource, load_language_model
from stepvocoder.vocoder import CosyVoice

logger = logging.getLogger(__name__)


class HTTPException(Exception):
    def __init__(self, status_code, detail):
        self.status_code = status_code
        self.detail = detail
        super().__init__(detail)


class StepAudioTTS:
    def __init__(
        self,
        model_path,
        audio_tokenizer,
        model_source=ModelSource.AUTO,
        tts_model_id=None,
        quantization_config=None,
        torch_dtype=torch.bfloat16,
        device_map="cuda",
    ):
        self.arguments = {name: value for name, value in locals().items() if name not in ("self", "audio_tokenizer")}
        self.audio_tokenizer = audio_tokenizer
        self.llm, self.tokenizer = load_language_model(
            tts_model_id or model_path, model_source, quantization_config, torch_dtype, device_map
        )
        self.cosy_model = CosyVoice(os.path.join(model_path, "CosyVoice-300M-25Hz"))
        self.edit_sys_prompt = "Edit the speech."

    def clone(self, prompt_wav_path, prompt_text, target_text):
        try:
            return self._speak(prompt_wav_path, f"{prompt_text}\n{target_text}")
        except Exception as error:
            logger.error("Clone failed: %s", error)
            raise

    def edit(self, input_audio_path, audio_text, edit_type, edit_info=None, text=None):
        try:
            if edit_type not in {"speed", "paralinguistic"}:
                raise HTTPException(400, f"Unsupported edit_type: {edit_type}")
            return self._speak(
                input_audio_path, f"{self.edit_sys_prompt} {edit_type} {edit_info}\n{text or audio_text}"
            )
        except Exception as error:
            logger.error("Edit failed: %s", error)
            raise

    def detect_instruction_name(self, text):
        match = re.match(r"^\(([^()]*)\)", text)
        return match.group(1) if match else ""

    def process_audio_file(self, audio_path):
        return soundfile.read(audio_path, dtype="float32")

    def preprocess_prompt_wav(self, prompt_wav_path):
        audio, sample_rate = self.process_audio_file(prompt_wav_path)
        codes = self.audio_tokenizer.wav2token(torch.from_numpy(audio), sample_rate)
        return codes, self.cosy_model.cosy_impl.hift.stft_window

    def _speak(self, path, prompt):
        codes, _ = self.preprocess_prompt_wav(path)
        ids = self.tokenizer.encode(prompt)[-64:]
        prompt_ids = torch.tensor([ids]).to(torch.long).to("cuda")
        spoken = self.llm.generate(prompt_ids, max_length=len(ids) + 24, temperature=0.7)
        return self.cosy_model.token2wav_nonstream(spoken[:, len(ids) :], torch.tensor([codes])), 24000
