"""4-bit weights in llmcompressor's format."""

from __future__ import annotations

from pathlib import Path
from typing import Any


def save_packed(model: Any, folder: Path, group_size: int) -> None:
    """Quantizes the linear layers of a language model of transformers, except its head, and saves it."""
    from compressed_tensors import compressors, quantization

    weights = quantization.QuantizationArgs(num_bits=4, type="int", strategy="group", group_size=group_size)
    config = quantization.QuantizationConfig(
        config_groups={"group_0": quantization.QuantizationScheme(targets=["Linear"], weights=weights)},
        format="pack-quantized", ignore=["lm_head"], quantization_status="frozen",
    )  # fmt: skip
    quantization.apply_quantization_config(model, config)
    for module in model.modules():
        if hasattr(module, "weight_scale"):
            groups = module.weight.detach().reshape(len(module.weight), -1, group_size)
            module.weight_scale.data.copy_(groups.abs().amax(-1) / 7)
    compressor = compressors.ModelCompressor.from_pretrained_model(model, quantization_format="pack-quantized")
    compressor.compress_model(model)
    model.save_pretrained(folder)
    compressor.update_config(folder)
