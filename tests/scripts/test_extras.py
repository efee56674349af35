"""A bare install brings the library and what it needs, no app; what an extra brings is named where it is missing."""

from __future__ import annotations

import email
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
from packaging.requirements import Requirement

ROOT = Path(__file__).resolve().parents[2]

#: What an import of a package of an extra does in an environment that has none of them.
BARE = """
import sys, importlib.abc, importlib.machinery
sys.path.insert(0, {site!r})
EXTRAS = {extras!r}
class Without(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in EXTRAS:
            raise ModuleNotFoundError(f"No module named {{name!r}}", name=name)
sys.meta_path.insert(0, Without())
import importlib.util
find_spec = importlib.util.find_spec
importlib.util.find_spec = lambda name, package=None: None if name in EXTRAS else find_spec(name, package)
"""
EXTRAS = {"app", "builtin", "checkpoint", "asr", "step-audio", "ray", "all"}
MODULES = {
    "numpy", "gradio", "starlette", "fastapi", "fastapi_offline", "prometheus_client", "soundfile", "av", "soxr",
    "sentencex", "fsspec", "scipy", "socksio", "hibari", "pyworld", "silero_vad", "onnxruntime", "transformers",
    "packaging", "py3langid",
}  # fmt: skip


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The contents of the wheel, as they are installed."""
    folder = tmp_path_factory.mktemp("wheel")
    source = folder / "source"
    source.mkdir()
    for name in ("pyproject.toml", "README.md", "LICENSE", "gpu_manager.py", "tts_gpu_managed.py"):
        shutil.copy(ROOT / name, source)
    shutil.copytree(ROOT / "residency", source / "residency", ignore=shutil.ignore_patterns("__pycache__"))
    build = [sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "--quiet", "-w", folder, source]
    subprocess.run(build, check=True, capture_output=True)
    (file,) = folder.glob("*.whl")
    with zipfile.ZipFile(file) as archive:
        archive.extractall(folder / "site")
    return folder / "site"


def run_bare(wheel: Path, script: str, tmp_path: Path) -> subprocess.CompletedProcess[str]:
    prelude = BARE.format(site=str(wheel), extras=MODULES)
    return subprocess.run(
        [sys.executable, "-W", "ignore", "-c", prelude + script], cwd=tmp_path, capture_output=True, text=True
    )


def needs(wheel: Path, extra: str = "") -> set[str]:
    (metadata,) = wheel.glob("*.dist-info/METADATA")
    lines = email.message_from_string(metadata.read_text(encoding="utf-8")).get_all("Requires-Dist") or []
    found = map(Requirement, lines)
    return {each.name for each in found if each.marker is None or (extra and each.marker.evaluate({"extra": extra}))}


def test_a_bare_install_needs_few_packages_and_the_extras_bring_the_rest(wheel: Path) -> None:
    (metadata,) = wheel.glob("*.dist-info/METADATA")
    told = email.message_from_string(metadata.read_text(encoding="utf-8"))
    assert set(told.get_all("Provides-Extra") or []) == EXTRAS
    base = {"torch", "psutil", "nvidia-ml-py", "typing-extensions", "xxhash", "cloudpickle"}
    assert needs(wheel) == base
    assert {"gradio", "fastapi", "av"} <= needs(wheel, "app") - base
    assert needs(wheel, "checkpoint") - base == {"cuda-core", "cuda-bindings"}
    assert needs(wheel, "ray") - base == {"ray"}
    assert not {"cuda-core", "cuda-bindings", "ray"} & needs(wheel, "all")
    assert {"hibari-tts", "silero-vad", "onnxruntime"} <= needs(wheel, "builtin") - base
    assert "gradio" not in needs(wheel, "builtin") | needs(wheel, "asr") | needs(wheel, "step-audio")
    assert {path.name for path in (wheel / "residency" / "web" / "static").glob("*.js")} >= {
        "upload.js",
        "heartbeat.js",
    }


def test_the_library_works_without_what_the_extras_bring(wheel: Path, tmp_path: Path) -> None:
    script = """
import residency, gpu_manager, tts_gpu_managed, torch
assert residency.__file__.startswith(sys.path[0])
with gpu_manager.GPUResourceManager(gpu_manager.SimulatedDevice(1 << 30)) as manager:
    tts = tts_gpu_managed.GPUManagedTTS("model", manager=manager, load=lambda: torch.nn.Linear(8, 8))
    with tts.lease() as engine:
        assert engine(torch.ones(8)).shape == (8,)
    tts.force_offload()
    tts.force_release()
"""
    ended = run_bare(wheel, script, tmp_path)
    assert ended.returncode == 0, ended.stderr


@pytest.mark.parametrize(
    ("script", "extra"),
    [
        ("import residency.web.page", "app"),
        ("app.choose_engine(parse([]))[0]('cpu')", "builtin"),
        ("app.choose_engine(parse(['--model-path', 'weights', '--engine', 'step-audio']))", "step-audio"),
        ("app._recognizer(parse(['--enable-auto-transcribe']), None)", "asr"),
    ],
)
def test_what_is_missing_is_said_with_the_extra_that_brings_it(
    wheel: Path, tmp_path: Path, script: str, extra: str
) -> None:
    imports = f"sys.path.append({str(ROOT)!r})\nimport app\nfrom residency.launch.settings import parse\n"
    ended = run_bare(wheel, imports + script, tmp_path)
    assert ended.returncode != 0
    assert f"pip install 'gpu-managed-tts[{extra}]'" in ended.stderr
    assert "缺少" in ended.stderr


def test_the_app_says_it_too(tmp_path: Path) -> None:
    script = f"import runpy; sys.argv[1:] = ['--tmp-dir', {str(tmp_path / 'recordings')!r}]\n"
    ended = run_bare(ROOT, script + f"runpy.run_path({str(ROOT / 'app.py')!r}, run_name='__main__')", tmp_path)
    assert ended.returncode == 1
    assert "Traceback" not in ended.stderr
    assert "pip install 'gpu-managed-tts[app]'" in ended.stderr
