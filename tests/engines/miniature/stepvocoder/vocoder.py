"""A vocoder with what makes vocoders hard to move."""

import threading
from collections import defaultdict
from functools import cached_property

import torch
from torch.nn.utils import weight_norm


class Flow(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.embedding = torch.nn.Embedding(256, 32)
        self.register_buffer("rand_noise", torch.randn(1, 32, 600), persistent=False)
        self.register_buffer("att_cache_buffer", torch.zeros(16, 1 << 16), persistent=False)
        self.graph_chunk = {}

    @torch.inference_mode()
    def inference(self, token):
        hidden = self.embedding(token).transpose(1, 2)
        return hidden + self.rand_noise[:, :, : hidden.shape[2]] + self.att_cache_buffer.sum()


class Hift(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = weight_norm(torch.nn.Conv1d(32, 240, 3, padding=1))
        self.stft_window = torch.hann_window(240).to("cuda")
        self.f0 = torch.jit.script(torch.nn.Sequential(torch.nn.Linear(32, 1), torch.nn.Sigmoid()))

    def inference(self, mel):
        wave = self.conv(mel).transpose(1, 2) * self.stft_window
        return torch.tanh(wave * self.f0(mel.transpose(1, 2))).reshape(1, -1)


class Stream(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.flow, self.hift = Flow(), Hift()
        self.speech_token_dict = defaultdict(list)
        self.hift_cache_dict = {}
        self.setup_lock = threading.Lock()

    @cached_property
    def device(self):
        return next(self.hift.parameters()).device

    @cached_property
    def dtype(self):
        return next(self.hift.parameters()).dtype


class CosyVoice:
    def __init__(self, model_dir, dtype=torch.float32, enable_cuda_graph=False):
        self.enable_cuda_graph = enable_cuda_graph
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self.cosy_impl = Stream().to(self.device, dtype).eval()
        with open(f"{model_dir}/cosyvoice.yaml") as file:
            self.configuration = file.read()

    def token2wav_nonstream(self, token, prompt_token):
        stream = self.cosy_impl
        token = torch.cat([prompt_token.to(stream.device), token.to(stream.device)], 1) % 256
        mel = stream.flow.inference(token).to(stream.dtype)
        with torch.no_grad():
            speech = stream.hift.inference(mel)
        stream.hift_cache_dict["latest"] = {"mel": mel, "speech": speech}
        return speech.cpu().to(torch.float32)

    def token2wav_stream(self, token, prompt_token):
        yield from self.token2wav_nonstream(token, prompt_token).split(240, 1)

    def clean_up(self, session_id):
        self.cosy_impl.hift_cache_dict.pop(session_id, None)
