"""A --model-path for a real Step-Audio-EditX checkout, in which every part is there, tiny and random."""

from __future__ import annotations

import importlib.util
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import torch
from packed_weights import save_packed

FUNASR = "dengcunqin/speech_paraformer-large_asr_nat-zh-cantonese-en-16k-vocab8501-online"
_AUDIO_TOKENS_FROM = 65536
_CODES = 1024 + 4096


def make(folder: Path) -> Path:
    """Needs the packages of the checkout, and ``onnx``."""
    tokenizer, model = folder / "Step-Audio-Tokenizer", folder / "Step-Audio-EditX"
    vocoder = model / "CosyVoice-300M-25Hz"
    for each in (tokenizer / FUNASR, vocoder):
        each.mkdir(parents=True)
    torch.manual_seed(0)
    _acoustic_model(tokenizer / FUNASR)
    np.save(tokenizer / "linguistic_tokenizer.npy", np.random.default_rng(0).normal(size=(1024, 32)).astype(np.float32))
    _speech_tokenizer(tokenizer / "speech_tokenizer_v1.onnx")
    _language_model(model)
    _speaker_model(vocoder / "campplus.onnx")
    _vocoder(vocoder)
    if importlib.util.find_spec("compressed_tensors"):
        _packed(model, folder / "Step-Audio-EditX-AWQ-4bit")
    return folder


def _acoustic_model(folder: Path) -> None:
    config = {
        "model": "ParaformerStreaming",
        "model_conf": {"ctc_weight": 0.0, "predictor_weight": 1.0},
        "encoder": "SANMEncoderChunkOpt",
        "encoder_conf": {
            "output_size": 32, "attention_heads": 2, "linear_units": 32, "num_blocks": 2, "input_layer": "pe_online",
            "pos_enc_class": "SinusoidalPositionEncoder", "kernel_size": 11, "selfattention_layer_type": "sanm",
            "chunk_size": [12, 15], "stride": [8, 10], "pad_left": [0, 0],
            "encoder_att_look_back_factor": [4, 4], "decoder_att_look_back_factor": [1, 1],
        },
        "frontend": "WavFrontendOnline",
        "frontend_conf": {"fs": 16000, "n_mels": 80, "lfr_m": 7, "lfr_n": 6, "dither": 0.0},
    }  # fmt: skip
    (folder / "config.yaml").write_text(json.dumps(config))  # which is YAML
    (folder / "configuration.json").write_text(json.dumps({"file_path_metas": {"config": "config.yaml"}}))
    from funasr_detach import AutoModel

    torch.save(AutoModel(model=str(folder), model_hub="local").model.state_dict(), folder / "model.pt")
    metas = {"config": "config.yaml", "init_param": "model.pt"}
    (folder / "configuration.json").write_text(json.dumps({"file_path_metas": metas}))


def _language_model(folder: Path) -> None:
    import transformers
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    alphabet = {letter: number for number, letter in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    tokenizer = Tokenizer(models.BPE(alphabet, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    fast = transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer)
    fast.chat_template = "{% for message in messages %}{{ message['role'] }}: {{ message['content'] }}\n{% endfor %}"
    fast.save_pretrained(folder)
    config = transformers.LlamaConfig(
        vocab_size=_AUDIO_TOKENS_FROM + _CODES, hidden_size=64, intermediate_size=128, num_hidden_layers=2,
        num_attention_heads=2, num_key_value_heads=2,  # vLLM on the CPU needs 32 numbers a head
 tie_word_embeddings=True, max_position_embeddings=8192,
    )  # fmt: skip
    model = transformers.LlamaForCausalLM(config)
    # Each token may be the last, but for the first ones.
    model.generation_config = transformers.GenerationConfig(
        eos_token_id=list(range(0, config.vocab_size, 8)), pad_token_id=0, min_new_tokens=12
    )
    model.save_pretrained(folder)


def _packed(plain: Path, folder: Path) -> None:
    import transformers

    shutil.copytree(plain, folder)
    (folder / "model.safetensors").unlink()
    model = transformers.AutoModelForCausalLM.from_pretrained(plain, torch_dtype=torch.bfloat16)
    save_packed(model, folder, group_size=32)


def _vocoder(folder: Path) -> None:
    (folder / "cosyvoice.yaml").write_text(_VOCODER)
    from hyperpyyaml import load_hyperpyyaml

    parts: dict[str, Any] = load_hyperpyyaml(_VOCODER)
    for name in ("flow", "hift"):
        for parameter in parts[name].parameters():
            if not parameter.any():
                torch.nn.init.normal_(parameter, std=0.02)  # what starts as nothing would hide what is before it
        torch.save(parts[name].state_dict(), folder / f"{name}.pt")


_VOCODER = """
mel_conf:
  {n_fft: 1920, num_mels: 80, sampling_rate: 24000, hop_size: 480, win_size: 1920, fmin: 0, fmax: 8000, center: false}
flow: !new:stepvocoder.cosyvoice2.flow.flow.CausalMaskedDiffWithXvec
  input_size: 32
  output_size: 80
  spk_embed_dim: 192
  vocab_size: 5121
  encoder: !new:stepvocoder.cosyvoice2.transformer.upsample_encoder_v2.UpsampleConformerEncoderV2
    input_size: 32
    output_size: 32
    num_blocks: 1
    num_up_blocks: 1
    attention_heads: 2
    linear_units: 32
  decoder: !new:stepvocoder.cosyvoice2.flow.flow_matching.CausalConditionalCFM
    estimator: !new:stepvocoder.cosyvoice2.flow.decoder_dit.DiT
      in_channels: 320
      out_channels: 80
      depth: 2
      num_heads: 2
      head_dim: 16
      hidden_size: 32
  input_embedding: !new:stepvocoder.cosyvoice2.embedding.dual_codebook.DualCodebookEmbedding
    vocab_size: 5121
    input_size: 32
hift: !new:stepvocoder.cosyvoice2.hifigan.generator.HiFTGenerator
  in_channels: 80
  base_channels: 32
  sampling_rate: 24000
  upsample_rates: [8, 5, 3]
  upsample_kernel_sizes: [16, 11, 7]
  istft_params: {n_fft: 16, hop_len: 4}
  source_resblock_kernel_sizes: [7, 7, 11]
  source_resblock_dilation_sizes: [[1, 3, 5], [1, 3, 5], [1, 3, 5]]
  f0_predictor: !new:stepvocoder.cosyvoice2.hifigan.f0_predictor.ConvRNNF0Predictor
    in_channels: 80
    cond_channels: 32
"""


def _speech_tokenizer(file: Path) -> None:
    """25 codes a second of a spectrum with 100 frames: [1, 128, frames] -> [1, frames / 4]."""
    from onnx import TensorProto, helper

    _save(
        [
            helper.make_node("Slice", ["feats", "from", "to", "axes", "steps"], ["some"]),
            helper.make_node("ReduceMean", ["some", "channels"], ["level"], keepdims=0),
            helper.make_node("Mul", ["level", "scale"], ["scaled"]),
            helper.make_node("Abs", ["scaled"], ["positive"]),
            helper.make_node("Cast", ["positive"], ["whole"], to=TensorProto.INT64),
            helper.make_node("Mod", ["whole", "codes"], ["indices"]),
        ],
        {"feats": [1, 128, "T"], "feats_length": [1]},
        {"indices": [1, "S"]},
        {"from": [0], "to": [1 << 30], "axes": [2], "steps": [4], "channels": [1], "scale": 9999.0, "codes": 4096},
        file,
    )  # fmt: skip


def _speaker_model(file: Path) -> None:
    """[1, frames, 80] -> [1, 192]."""
    from onnx import helper

    weights = np.random.default_rng(1).normal(size=(80, 192)).astype(np.float32)
    _save(
        [helper.make_node("ReduceMean", ["input", "frames"], ["mean"], keepdims=0),
         helper.make_node("MatMul", ["mean", "weights"], ["output"])],
        {"input": [1, "T", 80]}, {"output": [1, 192]}, {"frames": [1], "weights": weights}, file,
    )  # fmt: skip


def _save(
    nodes: list[Any], inputs: dict[str, Any], outputs: dict[str, Any], constants: dict[str, Any], file: Path
) -> None:
    import onnx
    from onnx import TensorProto, helper, numpy_helper

    kinds = {"feats_length": TensorProto.INT32, "indices": TensorProto.INT64}

    def described(values: dict[str, Any]) -> list[Any]:
        return [helper.make_tensor_value_info(name, kinds.get(name, TensorProto.FLOAT), shape)
                for name, shape in values.items()]  # fmt: skip

    def array(value: Any) -> np.ndarray:
        given = np.asarray(value)
        return given.astype(np.float32 if given.dtype.kind == "f" else np.int64)

    tensors = [numpy_helper.from_array(array(value), name) for name, value in constants.items()]
    graph = helper.make_graph(nodes, "tiny", described(inputs), described(outputs), tensors)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=9)
    onnx.save(model, file)
