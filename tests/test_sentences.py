"""Two languages that are kept apart from where they are written to where they are read."""

from __future__ import annotations

import copy
import json
import pickle
import re
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, strategies

from gpu_manager import GPUResourceManager, SimulatedDevice
from residency.engines import checkout, step_audio_weights
from residency.errors import EngineUnavailable, InvalidInput, SnapshotUnusable
from residency.observability.error_classification import in_words, message_of
from residency.sentences import Sentence
from residency.web.shared.language import en, translated, zh
from residency.web.speech.service import explain
from residency.web.ui import status_text

ROOT = Path(__file__).resolve().parent.parent
PIECES = [" / ", "/", "\n", ": ", "a / b / c", "没有文件", "模型 / tts", "Error: x / 错误：x", "no file", "。", "{}"]
HALVES = strategies.lists(strategies.sampled_from(PIECES), min_size=1).map("".join)


def quoting(english: str, chinese: str, inner: InvalidInput) -> InvalidInput:
    return InvalidInput(f"{english} ({message_of(inner).en})", f"{chinese}（{message_of(inner).zh}）")


ERRORS = strategies.recursive(
    strategies.builds(InvalidInput, HALVES, HALVES), lambda inner: strategies.builds(quoting, HALVES, HALVES, inner)
)


@given(ERRORS)
def test_each_language_comes_out_as_it_went_in_whatever_it_quotes(error: InvalidInput) -> None:
    kept = in_words(error)
    for said in (error, kept, explain(error), message_of(error), pickle.loads(pickle.dumps(error)), *_copies(kept)):
        assert translated(said, en) == error.en
        assert translated(said, zh) == error.zh
    outer = SnapshotUnusable("tts", message_of(error))
    assert error.en in outer.en
    assert error.zh in outer.zh
    assert kept == f"InvalidInput: {error.en} / {error.zh}"


def _copies(sentence: Sentence) -> list[Sentence]:
    return [copy.copy(sentence), copy.deepcopy(sentence), pickle.loads(pickle.dumps(sentence))]


def test_a_failed_load_is_told_in_each_language_by_the_status() -> None:
    error = InvalidInput("no file a / b / c, /models / x: give one", "没有文件 a / b / c：请指定")

    def load() -> Any:
        raise error

    with GPUResourceManager(SimulatedDevice(1 << 30)) as manager:
        manager.register("tts", load)
        with pytest.raises(InvalidInput), manager.lease("tts"):
            pass
        status = manager.status()
        model = status["models"]["tts"]
        assert status_text.remarks(model, en) == [f"Last error: {error.en}"]
        assert status_text.remarks(model, zh) == [f"上次错误：{error.zh}"]
        assert json.loads(json.dumps(status))["models"]["tts"]["last_error"] == f"InvalidInput: {error}"


def test_what_is_missing_is_said_in_the_language_of_the_rest(tmp_path: Path) -> None:
    (tmp_path / "requirements.txt").write_text("no-such-package==1\ntorch==0.1\n")
    found = checkout.unmet_advice(tmp_path, checkout.unmet(tmp_path))
    assert found is not None
    assert "no-such-package==1 (missing); torch==0.1 (2" in found.en
    assert found.en.isascii()
    assert "no-such-package==1（未安装）；torch==0.1（2" in found.zh
    with pytest.raises(EngineUnavailable) as whole:
        step_audio_weights.check_weights(str(tmp_path), model_source="local")
    assert "the whole folder" in whole.value.en
    assert "整个目录" in whole.value.zh
    assert whole.value.en.isascii()
    assert "whole" not in whole.value.zh
    for name in ("linguistic_tokenizer.npy", "speech_tokenizer_v1.onnx"):
        (tmp_path / "Step-Audio-Tokenizer").mkdir(exist_ok=True)
        (tmp_path / "Step-Audio-Tokenizer" / name).touch()
    with pytest.raises(EngineUnavailable) as flag:
        step_audio_weights.check_weights(str(tmp_path), model_source="local", tokenizer_model_id="mine")
    assert flag.value.en.isascii()
    assert "put it there" in flag.value.en
    assert "或去掉 --tokenizer-model-id" in flag.value.zh
    assert "put it there" not in flag.value.zh


def test_nobody_looks_for_the_languages_in_a_string() -> None:
    sources = (".py", ".js", ".sh", "")
    folders = ("residency", "scripts", "benchmarks", "examples")
    files = [
        path for folder in folders for path in (ROOT / folder).rglob("*") if path.is_file() and path.suffix in sources
    ]
    cut = re.compile(r"(partition|split|index|find|indexOf|search|match)\(\s*r?[\"'`/][^\"'`]{0,6} / |[%#]\*? / \*?")
    for path in [*files, *ROOT.glob("*.py"), *ROOT.glob("*.sh")]:
        assert not cut.search(path.read_text(encoding="utf-8")), path
