"""Replaces the part of torchaudio that the checkout uses, where torchaudio cannot be imported (PyTorch for CPUs)."""

from __future__ import annotations

import sys
import types
from importlib.machinery import ModuleSpec
from typing import Any

import numpy as np
import soundfile
import soxr
import torch


def pretend_torchaudio() -> None:
    """Makes ``import torchaudio`` work in this process."""
    try:
        import torchaudio  # noqa: F401
    except (ImportError, OSError):
        for name in [name for name in sys.modules if name.split(".")[0] == "torchaudio"]:
            del sys.modules[name]
    else:
        return
    parts = ("", ".functional", ".transforms", ".compliance", ".compliance.kaldi")
    names = [f"torchaudio{part}" for part in parts]
    whole, functional, transforms, compliance, kaldi = modules = [types.ModuleType(name) for name in names]
    for name, module in zip(names, modules, strict=True):
        module.__spec__ = ModuleSpec(name, None)
    whole.load, whole.save, functional.resample, kaldi.fbank = _load, _save, _resample, _fbank
    transforms.Resample = lambda orig_freq, new_freq: lambda audio: _resample(audio, orig_freq, new_freq)
    whole.functional, whole.transforms, whole.compliance = functional, transforms, compliance
    compliance.kaldi = kaldi
    sys.modules.update(zip(names, modules, strict=True))


def _load(file: Any) -> tuple[torch.Tensor, int]:
    samples, sample_rate = soundfile.read(file, dtype="float32", always_2d=True)
    return torch.from_numpy(np.ascontiguousarray(samples.T)), sample_rate


def _save(file: Any, audio: torch.Tensor, sample_rate: int, format: str | None = None) -> None:
    soundfile.write(file, audio.numpy().T, sample_rate, format=format.upper() if format else None)


def _resample(audio: torch.Tensor, orig_freq: int, new_freq: int) -> torch.Tensor:
    return torch.from_numpy(np.ascontiguousarray(soxr.resample(audio.numpy().T, orig_freq, new_freq).T))


def _fbank(
    audio: torch.Tensor, num_mel_bins: int = 23, sample_frequency: float = 16000.0, frame_length: float = 25.0,
    frame_shift: float = 10.0, **_: Any,
) -> torch.Tensor:  # fmt: skip
    """Returns values in the shape of Kaldi's features: [frames, num_mel_bins]."""
    length, shift = int(sample_frequency * frame_length / 1000), int(sample_frequency * frame_shift / 1000)
    frames = audio[0].unfold(0, length, shift)
    spectra = torch.fft.rfft(frames * torch.hann_window(length), n=512).abs()
    bands = torch.nn.functional.adaptive_avg_pool1d(spectra[:, None, :256], num_mel_bins)
    return bands[:, 0].clamp_min(1e-6).log()
