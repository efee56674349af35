"""Chooses the GPU for the app, and checks its driver version for torch."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from collections.abc import Mapping
from dataclasses import dataclass, field
from operator import itemgetter
from pathlib import Path

from .environment import environment_state
from .options import LaunchSettings
from .terminal import fail, say

OLDEST_DRIVER = {11: 450, 12: 525, 13: 580}
"""Major CUDA version of a torch build -> oldest driver for it (NVIDIA, CUDA Compatibility)."""
CUDA_OF_PINS = 13
"""CUDA of torch 2.13 from PyPI, pinned in requirements.txt."""
NVIDIA_SMI_S = 30
"""Timeout: a broken driver can block nvidia-smi uninterruptibly."""


@dataclass(frozen=True)
class Gpu:
    """``index`` is the value for CUDA_VISIBLE_DEVICES, empty for the CPU; ``driver`` is empty if unknown."""

    index: str = ""
    driver: str = ""
    variables: Mapping[str, str] = field(default_factory=dict)
    """Environment variables for the app."""


def choose_gpu(settings: LaunchSettings) -> Gpu:
    """Chooses GPU_ID, else CUDA_VISIBLE_DEVICES, else the one with the most free memory; prints the choice."""
    cpu, gpu_id, named = Gpu(variables={"CUDA_VISIBLE_DEVICES": ""}), settings.gpu_id, settings.named("GPU_ID")
    if gpu_id == "none":
        say("GPU: none, as in GPU_ID; the CPU is used", "GPU：按 GPU_ID 的设置不使用，使用 CPU")
        return cpu
    output, en, zh = _ask_nvidia_smi()
    # Index, free memory, driver, name. A broken GPU adds lines of other forms.
    rows = [re.split(" *, *", row.strip(), maxsplit=3) for row in output.splitlines() if re.match(r" *\d+,", row)]
    driver = rows[0][2] if rows else ""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if not gpu_id and visible is not None:
        say(f"GPU: from CUDA_VISIBLE_DEVICES='{visible}'", f"GPU：按 CUDA_VISIBLE_DEVICES='{visible}'")
        return Gpu("" if visible.startswith("-") else visible, driver)  # -1: no GPU
    if not rows:
        if gpu_id:
            fail(f"{named} cannot be used: {en}. Give GPU_ID=none to use the CPU",
                 f"无法使用 {named}：{zh}。使用 CPU 请设 GPU_ID=none")  # fmt: skip
        say(f"GPU: none ({en}); the CPU is used", f"GPU：无（{zh}），使用 CPU")
        # PyTorch would fail alike, or hang. Some containers have a GPU without nvidia-smi.
        return cpu if shutil.which("nvidia-smi") else Gpu()
    known = " ".join(row[0] for row in rows)
    # "[N/A]" if GPU and host share one memory.
    sized = [(int(re.sub(r"\D", "", free) or 0), index, name) for index, free, _, name in rows if gpu_id in ("", index)]
    if not sized:
        fail(f"There is no {named}; nvidia-smi lists: {known}", f"没有 {named}；nvidia-smi 列出：{known}")
    free_mb, index, name = max(sized, key=itemgetter(0))
    en, zh = (
        ("as in GPU_ID", "按 GPU_ID 的设置") if gpu_id else (f"most free memory of: {known}", f"空闲显存最多：{known}")
    )
    say(f"GPU: {index} ({name}), {free_mb} MiB free; {en}", f"GPU：{index}（{name}），空闲 {free_mb} MiB；{zh}")
    # Numbers in the order of nvidia-smi.
    return Gpu(index, driver, {"CUDA_DEVICE_ORDER": "PCI_BUS_ID", "CUDA_VISIBLE_DEVICES": index})


def _ask_nvidia_smi() -> tuple[str, str, str]:
    """Returns the output, and why it may list no GPU, in English and Chinese."""
    query = ["nvidia-smi", "--query-gpu=index,memory.free,driver_version,name", "--format=csv,noheader,nounits"]
    try:
        process = subprocess.Popen(query, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, errors="replace")
    except OSError:
        return "", "nvidia-smi is not installed", "找不到 nvidia-smi"
    try:
        output = process.communicate(timeout=NVIDIA_SMI_S)[0]
    except subprocess.TimeoutExpired:
        process.kill()  # without waiting for its end
        return "", f"nvidia-smi does not respond within {NVIDIA_SMI_S} s", f"nvidia-smi 在 {NVIDIA_SMI_S} 秒内没有响应"
    if not output.strip():
        return "", "nvidia-smi lists none", "nvidia-smi 没有列出 GPU"
    line = output.strip().splitlines()[0]
    return output, f"nvidia-smi fails: {line}", f"nvidia-smi 执行失败：{line}"


def check_driver(gpu: Gpu, version_py: str, place: str) -> None:
    """Raises `LaunchError` if the driver is too old for the torch in ``place``.

    ``version_py`` is the text of its version.py, since importing torch takes seconds; empty if missing or unknown.
    """
    if not gpu.index or not gpu.driver[:1].isdigit() or not version_py:
        return
    state = environment_state(Path(place), [])
    en, zh = "set or unset TORCH_INDEX_URL", "设置或取消 TORCH_INDEX_URL"
    if state == "foreign":
        en, zh = f"install another torch into {place}", f"在 {place} 中安装其他 torch"
    elif state == "ready":
        en, zh = f"remove {place} and {en}", f"删除 {place} 并{zh}"
    found = re.search(r"^cuda[^=]*= *'(\d+)", version_py, re.MULTILINE)
    if not found:
        say(f"⚠️  The torch in {place} is built without CUDA, so the GPU is not used. To use it, {en}",
            f"⚠️  {place} 中的 torch 不含 CUDA，不会使用 GPU。如需 GPU，请{zh}")  # fmt: skip
        return
    cuda, oldest = found[1], OLDEST_DRIVER.get(int(found[1]), 0)
    if int(gpu.driver.partition(".")[0]) < oldest:
        fail(
            f"Driver {gpu.driver} is too old for torch with CUDA {cuda}, which needs {oldest} or newer. Update the "
            f"driver, use another build of torch ({en}; see pytorch.org), or give GPU_ID=none",
            f"驱动 {gpu.driver} 过旧：CUDA {cuda} 的 torch 需要 {oldest} 或更高版本。请更新驱动，"
            f"或换用其他 torch（{zh}，参见 pytorch.org），或设 GPU_ID=none",
        )


def torch_of_environment(settings: LaunchSettings) -> str:
    """Returns the text of version.py of the environment's torch; empty if there is none."""
    for file in Path(settings.venv_dir).glob("lib/python3*/site-packages/torch/version.py"):
        return file.read_text(encoding="utf-8")
    return ""


def torch_of_pins(settings: LaunchSettings) -> str:
    """Returns the CUDA line of version.py after an install of the pins; empty if TORCH_INDEX_URL sets another build."""
    requirements = Path(settings.project_dir, "requirements.txt").read_text(encoding="utf-8")
    pinned = re.search("^torch==", requirements, re.MULTILINE) and not os.environ.get("TORCH_INDEX_URL")
    return f"cuda = '{CUDA_OF_PINS}'" if pinned else ""
