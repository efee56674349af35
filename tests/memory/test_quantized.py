"""Language models, quantized like Step-Audio-EditX, compute the same bits after every move."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from packed_weights import save_packed

from gpu_manager import GPUResourceManager, SimulatedDevice
from residency.memory.discovery import discover

pytest.importorskip("accelerate")
transformers = pytest.importorskip("transformers")

PROMPT = torch.arange(20)[None]


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("plain")
    tiny().save_pretrained(folder)
    return folder


def tiny() -> Any:
    config = transformers.LlamaConfig(
        vocab_size=256, hidden_size=256, intermediate_size=512, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, tie_word_embeddings=True,
    )  # fmt: skip
    torch.manual_seed(0)
    return transformers.LlamaForCausalLM(config).to(torch.bfloat16)


def from_pretrained(folder: Path, **keywords: Any) -> Any:
    return transformers.AutoModelForCausalLM.from_pretrained(folder, device_map="cpu", **keywords)


@torch.no_grad()
def logits(model: Any) -> torch.Tensor:
    return model(PROMPT).logits


def survives_every_move(load: Callable[[], Any], snapshots: Path) -> list[str]:
    """Moves the model through all states; returns what was found in it."""
    bare = load()
    paths = list(discover(bare).tensors)
    expected = [logits(bare), logits(bare)]
    with GPUResourceManager(SimulatedDevice(1 << 30), snapshot_dir=snapshots) as manager:
        manager.register("llm", load)
        for leave in (manager.offload, manager.release, manager.offload, manager.release):
            with manager.lease("llm") as model:
                assert [torch.equal(logits(model), each) for each in expected] == [True, True]
            leave("llm")
            assert manager.device.ledger_bytes == 0
            assert not any(tensor.untyped_storage().nbytes() for tensor in discover(model).tensors.values())
    return paths


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.in_process("snapshots are refused with worker processes")
def test_bitsandbytes(bits: int, plain: Path, tmp_path: Path) -> None:
    pytest.importorskip("bitsandbytes")
    quantized = transformers.BitsAndBytesConfig(
        load_in_8bit=bits == 8, load_in_4bit=bits == 4, bnb_4bit_quant_type="nf4",
        bnb_4bit_compute_dtype=torch.bfloat16, bnb_4bit_use_double_quant=True,
    )  # fmt: skip
    paths = survives_every_move(lambda: from_pretrained(plain, quantization_config=quantized), tmp_path)
    states = [".quant_state.state2.absmax", ".quant_state.offset"] if bits == 4 else [".SCB"]
    assert all(any(path.endswith(state) for path in paths) for state in states), "what is beside the weights is found"


@pytest.mark.in_process("snapshots are refused with worker processes")
def test_four_bit_weights_packed_as_llmcompressor_packs_them(tmp_path: Path) -> None:
    pytest.importorskip("compressed_tensors")
    save_packed(tiny(), tmp_path / "packed", group_size=128)
    survives_every_move(lambda: from_pretrained(tmp_path / "packed", dtype=torch.bfloat16), tmp_path / "snapshots")
