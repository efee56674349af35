"""The engine in miniature, with the outward shape of the newer real one."""

import logging
import os
import re

import soundfile
import torch
from model_loader import ModelSource, model_loader
from stepvocoder.vocoder import CosyVoice
from vllm import SamplingParams

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
        quantization=None,
        tensor_parallel_size=1,
        gpu_memory_utilization=0.5,
        max_model_len=8192,
        enforce_eager=False,
        dtype="bfloat16",
        kv_cache_dtype=None,
        max_num_seqs=None,
        max_num_batched_tokens=None,
        cosyvoice_dtype="float32",
        cosyvoice_cuda_graph=True,
    ):
        self.arguments = {name: value for name, value in locals().items() if name not in ("self", "audio_tokenizer")}
        self.audio_tokenizer = audio_tokenizer
        self.llm, self.tokenizer, resolved_path = model_loader.load_model(
            tts_model_id or model_path, source=model_source, quantization=quantization, max_model_len=max_model_len
        )
        self.cosy_model = CosyVoice(
            os.path.join(resolved_path, "CosyVoice-300M-25Hz"),
            dtype=getattr(torch, cosyvoice_dtype),
            enable_cuda_graph=cosyvoice_cuda_graph,
        )
        self.edit_sys_prompt = "Edit the speech."

    def clone(self, prompt_wav_path, prompt_text, target_text):
        try:
            return self._speak(prompt_wav_path, f"{prompt_text}\n{target_text}")
        except Exception as error:
            logger.error("Clone failed: %s", error)
            raise

    def edit(self, prompt_wav_path, prompt_text, edit_type, edit_info=None, target_text=None):
        try:
            if edit_type not in {"speed", "paralinguistic"}:
                raise HTTPException(400, f"Unsupported edit_type: {edit_type}")
            return self._speak(
                prompt_wav_path, f"{self.edit_sys_prompt} {edit_type} {edit_info}\n{target_text or prompt_text}"
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
        parameters = SamplingParams(temperature=0.7, max_tokens=8192 - len(ids), skip_special_tokens=False)
        answers = self.llm.generate([{"prompt_token_ids": ids}], parameters, use_tqdm=False)
        spoken = torch.tensor([answers[0].outputs[0].token_ids], dtype=torch.long) - 65536
        return self.cosy_model.token2wav_nonstream(spoken, torch.tensor([codes])), 24000
