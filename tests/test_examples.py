"""The programs do and print what they say at their top; the other examples name metrics and calls that there are."""

from __future__ import annotations

import ast
import doctest
import itertools
import json
import os
import re
import signal
import subprocess
import sys
import threading
from pathlib import Path
from textwrap import dedent
from typing import Any

import pytest
import soundfile
from app_process import free_port
from fork_server import default_signals
from miniature_checkout import CHECKOUT, make_recording, make_weights
from prometheus_client.parser import text_string_to_metric_families

from gpu_manager import GPUResourceManager, SimulatedDevice
from residency.contracts import Telemetry
from residency.web.api.metrics import exposition

EXAMPLES = Path(__file__).parent.parent / "examples"


class Card(SimulatedDevice):
    def telemetry(self) -> Telemetry:
        return Telemetry(0, 60.0)


@pytest.fixture(scope="module")
def metrics() -> dict[str, set[str]]:
    """The labels of each metric of an app that has been used."""
    with GPUResourceManager(Card(1 << 30)) as manager:
        manager.register("tts", lambda: [])
        with manager.lease("tts"):
            pass
        families = text_string_to_metric_families(exposition(manager).decode())
        return {sample.name: set(sample.labels) | {"instance"} for family in families for sample in family.samples}


def used(text: str) -> set[str]:
    return set(re.findall(r"gpu_manager_\w+", text))


@pytest.mark.parametrize("name", ["grafana-dashboard.json", "prometheus-rules.yml"])
def test_every_metric_that_is_asked_for_is_there(metrics: dict[str, set[str]], name: str) -> None:
    text = (EXAMPLES / name).read_text(encoding="utf-8")
    assert used(text)
    assert used(text) <= set(metrics)
    for metric, labels in re.findall(r"(gpu_manager_\w+)\{([^}]*)\}", text):
        assert set(re.findall(r"(\w+)=", labels)) <= metrics[metric], metric


def test_a_busy_instance_does_not_hide_an_idle_one() -> None:
    text = (EXAMPLES / "prometheus-rules.yml").read_text(encoding="utf-8")
    for labels in re.findall(r"\b(?:on|by) \(([^)]*)\)", text):
        assert "instance" in labels


def test_states_of_several_apps_are_not_added_up() -> None:
    """They are drawn as numbers: two models on the GPU would be one in main memory."""
    board: Any = json.loads((EXAMPLES / "grafana-dashboard.json").read_text(encoding="utf-8"))
    states = [each for panel in board["panels"] for each in panel["targets"] if "model_state" in each["expr"]]
    assert states
    for target in states:
        assert all("instance" in labels for labels in re.findall(r"by \(([^)]*)\)", target["expr"]))
        assert "{{instance}}" in target["legendFormat"]


def test_the_dashboard_is_one_and_its_panels_do_not_overlap() -> None:
    board: Any = json.loads((EXAMPLES / "grafana-dashboard.json").read_text(encoding="utf-8"))
    cells = [
        (x, y)
        for panel in board["panels"]
        for place in [panel["gridPos"]]
        for x in range(place["x"], place["x"] + place["w"])
        for y in range(place["y"], place["y"] + place["h"])
    ]
    assert len(cells) == len(set(cells))
    assert max(x for x, _ in cells) < 24
    assert len({panel["id"] for panel in board["panels"]}) == len(board["panels"])
    assert {variable["name"] for variable in board["templating"]["list"]} == {"source", "instance"}


def test_the_scrape_asks_where_the_metrics_are() -> None:
    text = (EXAMPLES / "prometheus.yml").read_text(encoding="utf-8")
    assert "metrics_path: /metrics" in text
    assert (EXAMPLES / re.findall(r"- (\S+rules\.yml)", text)[0]).is_file()


# -- programs, each in a process of its own, started in another folder -----------------------------------------------


def run(command: list[str], folder: Path, **environment: str) -> str:
    """What a program prints; it must succeed."""
    done = subprocess.run(
        [sys.executable, "-W", "ignore", *command],
        cwd=folder, env={**os.environ, **environment}, capture_output=True, encoding="utf-8", timeout=200, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def run_example(name: str, folder: Path, *arguments: str) -> str:
    """What an example prints, which must be what its docstring says."""
    printed = run([str(EXAMPLES / name), *arguments], folder, PYTHONIOENCODING="utf-8")
    docstring = ast.get_docstring(ast.parse((EXAMPLES / name).read_text(encoding="utf-8")))
    assert docstring is not None
    promised = re.findall(r"Prints[^.]*::\n\n((?:    .*\n?)+)", docstring)
    assert len(promised) == 1, f"{name} does not say what it prints"
    assert doctest.OutputChecker().check_output(
        dedent(promised[0]).rstrip() + "\n", printed, doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE
    ), f"{name} prints\n{printed}and not\n{promised[0]}"
    return printed


def simulated(printed: str) -> bool:
    return "Simulated GPU" in printed


def assert_moves_change_nothing(printed: str, weights_bytes: int) -> None:
    on_device = re.findall(r" gpu +device ([\d,]+) B", printed)
    assert len(on_device) == 3
    assert all(int(nbytes.replace(",", "")) >= weights_bytes for nbytes in on_device)
    assert re.search(r"^after the lease .* host [1-9]", printed, re.MULTILINE)
    assert not simulated(printed) or printed.endswith("of the device: 0 B\n")


def test_a_model_of_transformers_is_on_the_device_only_while_it_writes(tmp_path: Path) -> None:
    printed = run_example("transformers_model.py", tmp_path)
    assert_moves_change_nothing(printed, 4 * (2 * 512 * 128 + 4 * (4 * 128 * 128 + 3 * 128 * 256)))


def test_a_model_of_transformers_may_come_from_a_folder(tmp_path: Path) -> None:
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import Whitespace
    from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

    GPT2LMHeadModel(GPT2Config(vocab_size=64, n_positions=64, n_embd=32, n_layer=2, n_head=2)).save_pretrained(tmp_path)
    words = Tokenizer(WordLevel({"[UNK]": 0, "once": 1, "upon": 2, "a": 3, "time": 4}, unk_token="[UNK]"))
    words.pre_tokenizer = Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=words, unk_token="[UNK]").save_pretrained(tmp_path)
    printed = run_example("transformers_model.py", tmp_path, "--model", str(tmp_path), "--prompt", "once upon a time")
    assert_moves_change_nothing(printed, 4 * (64 + 64) * 32)


def test_two_models_share_a_budget_that_holds_one_and_every_request_is_served(tmp_path: Path) -> None:
    printed = run_example("two_models_one_budget.py", tmp_path)
    moves = re.findall(r"^(tts|asr): (\w+) -> (\w+)$", printed, re.MULTILINE)
    there: set[str] = set()
    for model, source, target in moves:
        assert (source == "gpu") == (model in there)
        there ^= {model} if "gpu" in (source, target) else set()
        assert len(there) <= 1, "one has left before the other comes"
    assert not there
    made_room = int(re.findall(r"made room for the other model: (\d+) times", printed)[0])
    assert made_room == sum(move[1:] == ("gpu", "cpu") for move in moves) >= 1


def test_a_program_for_step_audio_runs_with_the_builtin_engine(tmp_path: Path) -> None:
    printed = run_example("drop_in.py", tmp_path)
    clone, faster = (soundfile.info(tmp_path / name) for name in ("clone.wav", "faster.wav"))
    assert clone.samplerate == faster.samplerate == 24000
    assert 0.7 * clone.frames < faster.frames < 0.95 * clone.frames
    assert_released(printed)


def test_a_program_for_step_audio_runs_with_a_checkout(tmp_path: Path) -> None:
    models, voice = make_weights(tmp_path / "models"), make_recording(tmp_path / "voice.wav")
    script = "import runpy, sys\nfrom cuda_on_cpu import pretend_cuda\npretend_cuda()\ndel sys.argv[0]\n"
    printed = run(
        ["-c", script + "runpy.run_path(sys.argv[0], run_name='__main__')", str(EXAMPLES / "drop_in.py"),
         "--model-path", str(models), "--step-audio-root", str(CHECKOUT), "--prompt", str(voice)],
        tmp_path, PYTHONPATH=str(Path(__file__).parent / "support"), CUDA_VISIBLE_DEVICES="",
    )  # fmt: skip
    assert re.findall(r"^(\w+) +(gpu|cpu|released) +device 0 B", printed, re.MULTILINE) == [
        ("before", "released"), ("cloned", "cpu"), ("edited", "cpu"), ("released", "released"),
    ]  # fmt: skip
    assert all(soundfile.info(tmp_path / name).frames > 0 for name in ("clone.wav", "faster.wav"))
    assert_released(printed)


def assert_released(printed: str) -> None:
    status: Any = json.loads(printed[printed.index("{") :])
    assert status["models"]["tts"]["state"] == "released"
    assert status["models"]["tts"]["device_bytes"] == status["models"]["tts"]["host_bytes"] == 0
    assert not simulated(printed) or status["device"]["process_bytes"] == 0


def test_a_policy_of_ones_own_keeps_the_model_while_people_converse(tmp_path: Path) -> None:
    run_example("own_policy.py", tmp_path)


@pytest.mark.skipif(sys.platform != "linux", reason="needs a card shared by processes (Linux)")
def test_a_service_leaves_for_a_stranger_and_all_end_with_ctrl_c(tmp_path: Path) -> None:
    script = tmp_path / "script"
    script.write_text("take 8MB\nwait 1s\ngive 8MB\nwait 1s", encoding="utf-8")
    ports, card = [str(free_port()) for _ in range(3)], f"test-{os.getpid()}"
    example = subprocess.Popen(
        [sys.executable, str(EXAMPLES / "neighbors" / "run.py"), "--ports", *ports, "--script", str(script),
         "--card", f"18MB,shared={card}", "--every", "0.2"],
        cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, start_new_session=True,
        preexec_fn=default_signals,
    )  # fmt: skip
    too_late = threading.Timer(200, os.killpg, (example.pid, signal.SIGKILL))
    too_late.start()
    assert example.stdout is not None
    with example.stdout:
        panels = [line.split()[-1] for line in itertools.islice(example.stdout, 3)]
        assert panels == [f"http://127.0.0.1:{port}" for port in ports]
        assert any(re.search("left for the stranger: [1-9]", line) for line in example.stdout)
        example.send_signal(signal.SIGINT)
        assert "ended" in example.stdout.read()
    assert example.wait() == 0
    too_late.cancel()
    assert not Path(f"/dev/shm/simulated-card-{os.getuid()}-{card}").exists()


def test_the_readme_names_every_example_in_english_and_chinese() -> None:
    rows = re.findall(r"^\| (\[.*)$", (EXAMPLES / "README.md").read_text(encoding="utf-8"), re.MULTILINE)
    named = [name for row in rows for name in re.findall(r"\]\(([^)]+)\)", row)]
    there = {file.name for file in EXAMPLES.iterdir() if not file.name.startswith("__")} - {"README.md"}
    assert sorted(named) == sorted(there)
    assert all(re.search(r"[a-z] .*<br>.*[一-鿿]", row) for row in rows)
