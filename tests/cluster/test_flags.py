"""Flags of deploy/ray_serve.yaml: those that have no effect on Ray Serve are refused."""

from __future__ import annotations

import pytest

from residency.cluster.flags import API, ENGINE, MODEL, check, parsed
from residency.errors import InvalidInput


@pytest.mark.parametrize(
    ("line", "effective"),
    [
        ("--api-key 0123456789abcdef --voices-dir s3://voices/x --max-requests 5 --allowed-host a.example", API),
        ("--gpu-keep-warm 30s --gpu-idle-timeout 2h --simulate-gpu 48GB --tmp-dir /tmp/x", ENGINE),
        ("--model-path /models/not-here --step-audio-root /models/code --quantization awq", MODEL),
        ("--model-path=/models/not-here --no-cosyvoice-cuda-graph", MODEL),
    ],
)
def test_flags_that_have_an_effect_are_accepted(line: str, effective: frozenset[str]) -> None:
    check("there", line, effective, files_here=False)


@pytest.mark.parametrize(
    ("line", "effective", "named"),
    [
        ("--auth me:secret-word", API, "--auth"),
        ("--gpu-keep-warm 30s", API, "--gpu-keep-warm"),
        ("--api-key 0123456789abcdef", ENGINE, "--api-key"),
        ("--engine ray", MODEL, "--engine ray"),
        ("--api-kye=0123456789abcdef --max-text 5", API, "--api-kye"),
        ("--api-kye 0123456789abcdef", API, "--api-kye"),
        ("--max-text many", API, "--max-text"),
        ("--api-key '0123456789abcdef", API, "No closing quotation"),
    ],
)
def test_others_are_named_without_their_values(line: str, effective: frozenset[str], named: str) -> None:
    with pytest.raises(InvalidInput) as caught:
        check("models: tts", line, effective)
    assert named in caught.value.en
    assert "models: tts" in caught.value.en
    assert not [secret for secret in ("secret-word", "0123456789abcdef") if secret in str(caught.value)]


def test_a_login_of_the_environment_is_refused_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GRADIO_AUTH", "me:secret-word")
    check("engine", "", ENGINE)
    with pytest.raises(InvalidInput, match="GRADIO_AUTH"):
        check("api", "", API)


def test_files_of_models_are_not_looked_for_where_they_are_not() -> None:
    assert parsed("--model-path /not-here", files_here=False).engine == "step-audio"
    with pytest.raises(InvalidInput, match="/not-here"):
        parsed("--model-path /not-here")
