"""A managed transformers model: on the device only during generation.

    python examples/transformers_model.py
    python examples/transformers_model.py --model Qwen/Qwen2.5-0.5B-Instruct --prompt "Once upon a time"

Without ``--model`` (a folder or a hub id), uses a tiny Llama with random weights, without a download. Uses the GPU,
or a simulated one if there is none. Prints::

    device: ...
    registered       released  device 0 B, host 0 B
    while it writes  gpu       device ... B, host 0 B
    after the lease  cpu       device 0 B, host ... B
    writes again     gpu       device ... B, host ... B
    after release    released  device 0 B, host 0 B
    loaded anew      gpu       device ... B, host 0 B
    closed           released  device 0 B, host 0 B
    the same 24 tokens all three times: True
    what this process still holds of the device: ... B

The last value is 0 on a simulated GPU; on a real one, CUDA keeps a few hundred MB until the process ends.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

from gpu_manager import GPUResourceManager, SimulatedDevice, find_device


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="a folder or the id of a causal language model (default: a tiny random one)")
    parser.add_argument("--prompt", default="The graphics card is free whenever nobody is speaking.")
    arguments = parser.parse_args()

    device = find_device()
    if not device.separate:  # simulates a GPU if there is none
        device = SimulatedDevice(capacity_bytes=48 << 30)
    print("device:", device.name)
    manager = GPUResourceManager(device)
    prompt = tokens(arguments.model, arguments.prompt)

    def load() -> Any:
        model = AutoModelForCausalLM.from_pretrained(arguments.model) if arguments.model else tiny()
        return model.eval().to(device.torch_device)

    def tell(when: str) -> None:
        llm = manager.status()["models"]["llm"]
        print(f"{when:<16} {llm['state']:<9} device {llm['device_bytes']:,} B, host {llm['host_bytes']:,} B")

    def write(when: str) -> torch.Tensor:
        with manager.lease("llm") as model:
            tell(when)
            written: torch.Tensor = model.generate(
                prompt.to(model.device), max_new_tokens=24, min_new_tokens=24, do_sample=False
            )
            return written.cpu()  # results must not stay on the device after the lease

    manager.register("llm", load)
    tell("registered")
    first = write("while it writes")
    tell("after the lease")
    second = write("writes again")
    manager.release("llm")
    tell("after release")
    third = write("loaded anew")
    manager.close()
    tell("closed")
    same = torch.equal(first, second) and torch.equal(first, third)
    print("the same 24 tokens all three times:", same)
    print("what this process still holds of the device:", device.memory().process_bytes, "B")
    return 0 if same else 1


def tiny() -> Any:
    torch.manual_seed(0)  # the same weights at every load; the manager preserves the request's random state
    return LlamaForCausalLM(
        LlamaConfig(vocab_size=512, hidden_size=128, intermediate_size=256, num_hidden_layers=4, num_attention_heads=4)
    )


def tokens(model: str | None, prompt: str) -> torch.Tensor:
    if model is None:
        return torch.tensor([[ord(letter) % 512 for letter in prompt]])
    ids: torch.Tensor = AutoTokenizer.from_pretrained(model)(prompt, return_tensors="pt").input_ids
    return ids


if __name__ == "__main__":
    sys.exit(main())
