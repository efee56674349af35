"""Finds weights, which here are only a configuration: a language model is built from it."""

import json
import os

import torch


class ModelSource:
    MODELSCOPE = "modelscope"
    HUGGINGFACE = "huggingface"
    LOCAL = "local"
    AUTO = "auto"


class Bytes:
    """A tokenizer that needs no vocabulary."""

    def encode(self, text):
        return list(text.encode())


class LanguageModel(torch.nn.Module):
    def __init__(self, vocab_size, hidden_size):
        super().__init__()
        self.embed_tokens = torch.nn.Embedding(vocab_size, hidden_size)
        self.layer = torch.nn.TransformerEncoderLayer(hidden_size, 4, 2 * hidden_size, batch_first=True)
        self.lm_head = torch.nn.Linear(hidden_size, vocab_size, bias=False)
        self.lm_head.weight = self.embed_tokens.weight

    def forward(self, ids):
        return self.lm_head(self.layer(self.embed_tokens(ids))[:, -1]).float()

    @torch.no_grad()
    def generate(self, ids, max_length, temperature):
        while ids.shape[1] < max_length:
            logits = self(ids)
            ids = torch.cat([ids, torch.multinomial((logits / temperature).softmax(-1), 1)], 1)
        return ids


def load_language_model(model_id, source, quantization_config, torch_dtype, device_map):
    assert source in vars(ModelSource).values(), source
    with open(os.path.join(model_id, "config.json")) as file:
        config = json.load(file)
    return LanguageModel(**config).to(torch_dtype).to(device_map).eval(), Bytes()
