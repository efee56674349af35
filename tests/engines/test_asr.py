"""Speech recognition: pipelines of transformers with tiny random models, which hear nonsense, always the same."""

from __future__ import annotations

import json
import runpy
import sys
import types
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch
import transformers
from miniature_checkout import CHECKOUT
from tokenizers import pre_tokenizers

from gpu_manager import GPUResourceManager, SimulatedDevice
from residency.engines import step_audio
from residency.engines.asr import Recognizer
from residency.errors import EngineUnavailable, InvalidInput
from tts_gpu_managed import ask


@pytest.fixture(scope="module")
def wav2vec2(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("wav2vec2")
    letters = ["<pad>", "<s>", "</s>", "<unk>", "|", *"abcdefghijklmnopqrstuvwxyz"]
    (folder / "vocab.json").write_text(json.dumps({letter: number for number, letter in enumerate(letters)}))
    config = transformers.Wav2Vec2Config(
        vocab_size=len(letters), hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32,
        conv_dim=(16, 16), conv_stride=(80, 4), conv_kernel=(80, 4), num_feat_extract_layers=2, pad_token_id=0,
        num_conv_pos_embeddings=16, num_conv_pos_embedding_groups=2,
    )  # fmt: skip
    torch.manual_seed(0)
    transformers.Wav2Vec2ForCTC(config).save_pretrained(folder)
    transformers.Wav2Vec2CTCTokenizer(str(folder / "vocab.json")).save_pretrained(folder)
    transformers.Wav2Vec2FeatureExtractor().save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def whisper(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("whisper")
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = transformers.WhisperTokenizer(
        vocab={letter: number for number, letter in enumerate(alphabet)}, merges=[]
    )
    marks = ["startoftranscript", "en", "transcribe", "startofprev", "nospeech", "notimestamps"]
    tokenizer.add_special_tokens({"additional_special_tokens": [f"<|{mark}|>" for mark in marks]})
    tokenizer.add_tokens([f"<|{step * 0.02:.2f}|>" for step in range(1501)])
    end, start, english, transcribe, previous, _, plain = tokenizer.convert_tokens_to_ids(
        [f"<|{mark}|>" for mark in ("endoftext", *marks)]
    )
    ends = {"pad_token_id": end, "bos_token_id": end, "eos_token_id": end, "decoder_start_token_id": start}
    config = transformers.WhisperConfig(
        vocab_size=len(tokenizer), num_mel_bins=16, d_model=32, encoder_layers=1, decoder_layers=1,
        encoder_attention_heads=2, decoder_attention_heads=2, encoder_ffn_dim=32, decoder_ffn_dim=32,
        max_target_positions=64, **ends,
    )  # fmt: skip
    torch.manual_seed(1)
    model = transformers.WhisperForConditionalGeneration(config)
    model.generation_config = transformers.GenerationConfig(
        **ends, no_timestamps_token_id=plain, is_multilingual=True, lang_to_id={"<|en|>": english},
        task_to_id={"transcribe": transcribe}, max_length=20, max_initial_timestamp_index=50,
        prev_sot_token_id=previous,
    )  # fmt: skip
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    transformers.WhisperFeatureExtractor(feature_size=16).save_pretrained(folder)
    return folder


def tone(file: Path, seconds: float, sample_rate: int = 16000) -> str:
    samples = 0.3 * np.sin(np.arange(int(seconds * sample_rate)) * 2000 / sample_rate)
    soundfile.write(file, samples, sample_rate)
    return str(file)


@pytest.mark.parametrize("model", ["wav2vec2", "whisper"])
def test_recordings_of_any_length_and_rate_are_heard(
    model: str, request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    recognize = Recognizer.load(str(request.getfixturevalue(model)), "cpu")
    heard = [recognize(tone(tmp_path / f"{seconds}.flac", seconds, 44100)) for seconds in (3, 45)]
    assert all(isinstance(text, str) for text in heard)
    assert len(heard[0]) < len(heard[1]), "a long recording is heard to its end"


def test_it_is_a_model_like_others_to_the_manager(wav2vec2: Path, tmp_path: Path, isolation: str) -> None:
    recording = tone(tmp_path / "a.wav", 2)
    expected = Recognizer.load(str(wav2vec2), "cpu")(recording)
    assert expected
    snapshot_dir = tmp_path / "snapshots" if isolation == "none" else None
    with GPUResourceManager(SimulatedDevice(1 << 30), snapshot_dir=snapshot_dir) as manager:
        manager.register("asr", lambda: Recognizer.load(str(wav2vec2), "cpu"))
        for leave in (manager.offload, manager.release, manager.offload):
            assert ask(manager, "asr", lambda recognize: recognize(recording)) == expected
            leave("asr")
            assert manager.device.ledger_bytes == 0


def test_a_model_that_cannot_be_loaded_says_what_to_give_instead(tmp_path: Path) -> None:
    with pytest.raises(EngineUnavailable, match="--asr-model, or write the words"):
        Recognizer.load(str(tmp_path), "cpu")


def test_a_recording_with_nothing_in_it_is_refused_in_words(wav2vec2: Path, tmp_path: Path) -> None:
    soundfile.write(tmp_path / "silence.wav", np.zeros(16000), 16000)
    with pytest.raises(InvalidInput, match="silent"):
        Recognizer.load(str(wav2vec2), "cpu")(str(tmp_path / "silence.wav"))


def test_the_checkouts_own_recognizer_hides_no_error_and_hears_to_the_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its wrapper answers nothing where its model fails: too long a recording, or a device that is full."""
    wrapper = runpy.run_path(str(CHECKOUT / "whisper_wrapper.py"))["WhisperWrapper"]
    module = types.SimpleNamespace(WhisperWrapper=wrapper)
    monkeypatch.setattr(step_audio, "import_from", lambda checkout, name: [module])
    recording = tone(tmp_path / "long.wav", 45)
    assert wrapper()(recording) == ""
    recognize = step_audio.build_recognizer(str(CHECKOUT))
    assert recognize(recording) == f"{45 * 16000} samples"

    class Full(type(recognize.pipeline)):
        calls = 0

        def __call__(self, audio: object, **keywords: object) -> object:
            self.calls += 1
            if self.calls == 1:
                raise torch.OutOfMemoryError("CUDA out of memory")
            return super().__call__(audio, **keywords)

    recognize.pipeline = Full()
    with GPUResourceManager(SimulatedDevice(1 << 30)) as manager:
        manager.register("asr", lambda: recognize)
        assert ask(manager, "asr", lambda recognize: recognize(tone(tmp_path / "a.wav", 1))) == "16000 samples"
        with manager.lease("asr") as engine:
            assert engine.pipeline.calls == 2, "once more, after others had left"


@pytest.mark.parametrize("module", ["transformers", "soxr"])
def test_a_package_that_it_needs_is_named_when_it_is_loaded(
    module: str, wav2vec2: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(EngineUnavailable, match=f"'{module}'.*gpu-managed-tts.asr."):
        Recognizer.load(str(wav2vec2), "cpu")
