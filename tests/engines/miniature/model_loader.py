"""Finds weights, which here are only a configuration: a language model is built from it."""

import json
import os

import torch
from transformers import LlamaConfig, LlamaForCausalLM


class ModelSource:
    MODELSCOPE = "modelscope"
    HUGGINGFACE = "huggingface"
    LOCAL = "local"
    AUTO = "auto"


class Bytes:
    """A tokenizer that needs no vocabulary."""

    def encode(self, text):
        return list(text.encode())


def load_language_model(model_id, source, quantization_config, torch_dtype, device_map):
    assert source in vars(ModelSource).values(), source
    with open(os.path.join(model_id, "config.json")) as file:
        config = LlamaConfig(**json.load(file))
    torch.manual_seed(0)
    return LlamaForCausalLM(config).to(torch_dtype).to(device_map).eval(), Bytes()
