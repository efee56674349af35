"""Turns audio into codes: an acoustic model that remembers its device, a session of ONNX Runtime, and centroids."""

import os
import threading

import numpy as np
import onnxruntime
import torch


class AutoModel:
    """As FunASR's: not a module, seeds everything when it is built, moves inputs to the device it remembers."""

    def __init__(self, model, device="cuda"):
        torch.manual_seed(0)
        np.random.seed(0)
        self.kwargs = {"device": device, "model_path": model}
        self.model = torch.nn.Sequential(torch.nn.Linear(33, 16), torch.nn.Tanh()).to(device)
        self.model.register_buffer("cmvn", torch.randn(33).to(device))

    def infer_encoder(self, feats, device=0):
        self.kwargs["device"] = device
        with torch.no_grad():
            return self.model(feats.to("cuda") + self.model.cmvn)


class StepAudioTokenizer:
    def __init__(self, encoder_path, model_source="auto", funasr_model_id="paraformer"):
        self.arguments = {
            "encoder_path": encoder_path,
            "model_source": model_source,
            "funasr_model_id": funasr_model_id,
        }
        self.funasr_model = AutoModel(os.path.join(encoder_path, funasr_model_id))
        self.kms = torch.tensor(np.load(os.path.join(encoder_path, "linguistic_tokenizer.npy")))
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = 1
        self.ort_session = onnxruntime.InferenceSession(
            os.path.join(encoder_path, "speech_tokenizer_v1.onnx"), sess_options=options,
            providers=["CUDAExecutionProvider"] if torch.cuda.is_available() else ["CPUExecutionProvider"],
        )  # fmt: skip
        self.vq02_sessions = {}
        self.vq02_lock = threading.Lock()

    def __call__(self, audio, sr):
        return self.wav2token(audio, sr)

    def wav2token(self, audio, sample_rate):
        with self.vq02_lock:
            from utils import spectrum

            encoded = self.funasr_model.infer_encoder(spectrum(audio)).cpu()
            self.vq02_sessions["latest"] = {"cache": encoded}
            nearest = torch.cdist(encoded, self.kms).argmin(-1)
            feed = {self.ort_session.get_inputs()[0].name: nearest.numpy()[None] % 30 + 1}
            other = self.ort_session.run(None, feed)[0]
        return [int(code) for code in nearest] + [int(abs(value) * 100) % 256 for value in other.ravel()[:8]]
