"""Engines of both generations under management: same speech, no request lost, memory as the status says."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from miniature_checkout import CHECKOUT, run, run_newer

_TREE = """
import psutil
from app_process import wait_until

def children():
    return [child for child in psutil.Process().children(recursive=True) if child.status() != psutil.STATUS_ZOMBIE]

def tree():
    def private(pid):
        with open(f"/proc/{pid}/smaps_rollup") as file:
            return sum(int(line.split()[1]) << 10 for line in file if line.startswith("Private_Dirty"))
    gc.collect()
    return sum(private(each.pid) for each in [psutil.Process(), *children()])

def model(tts):
    return tts.get_gpu_status()["models"]["tts"]
"""

Play = Callable[[str], str]


@pytest.fixture(params=["transformers", "vllm"])
def play(request: pytest.FixtureRequest, newer: Path, models: Path, voice: Path) -> Play:
    """Runs a scenario with a miniature of either generation."""
    if request.param == "transformers":
        return lambda script: run(_TREE + script, models, voice)
    return lambda script: run_newer(_TREE + script, models, voice, newer)


def test_speech_is_the_same_across_offload_release_and_keep_warm(play: Play) -> None:
    script = """
tts = managed()
assert not {"tts", "tokenizer", "onnxruntime"} & set(sys.modules) and state(tts) == "released"
assert children() == [], "nothing is built before the first request"
bare = build(managed=False)
expected = spoken(bare)
if hasattr(bare.llm, "llm_engine"):
    bare.llm.llm_engine.engine_core.shutdown()
assert not torch.equal(*expected)
assert state(tts) == "released"
with closing(tts):
    configure = tts.manager.configure
    for change, left in (
        (lambda: None, "cpu"), (tts.force_offload, "cpu"), (tts.force_release, "cpu"),
        (lambda: configure("tts", keep_warm=60), "gpu"), (tts.force_offload, "gpu"), (tts.force_release, "gpu"),
        (lambda: configure("tts", keep_warm=-1), "gpu"), (lambda: configure("tts", keep_warm=0), "cpu"),
    ):
        change()
        assert all(map(torch.equal, spoken(tts), expected))
        assert wait_until(lambda: state(tts) == left), model(tts)
tts.manager.close()
assert children() == []
"""
    play(script)


def test_the_memory_of_the_process_tree_is_that_of_the_status(play: Play, models: Path) -> None:
    config = models / "Step-Audio-EditX" / "config.json"
    config.write_text(json.dumps({"vocab_size": 200_000, "hidden_size": 256}))  # 100 MB
    script = """
def compared():
    there = model(tts)
    held, said = tree() - base, there["host_bytes"] + there["device_bytes"]
    assert there["outside_bytes"] == 0 and there["outside_processes"] == []
    assert abs(held - said) < 50 << 20, (held, there)
    return there

tts = managed(keep_warm=-1)
tts.clone(*SAY)
tts.force_release()
base = tree()  # with what imports keep
for _ in range(2):
    tts.clone(*SAY)
    there = compared()
    assert there["state"] == "gpu" and there["device_bytes"] > 90 << 20, there
    tts.force_offload()
    away = compared()
    assert (away["state"], away["device_bytes"]) == ("cpu", 0) and away["host_bytes"] > 90 << 20
    tts.force_release()
    gone = compared()
    assert gone["host_bytes"] == gone["device_bytes"] == 0 and children() == []
tts.manager.close()
"""
    play(script)


def test_sixteen_requests_from_eight_threads_under_random_moves_lose_nothing(play: Play) -> None:
    script = """
import random
from concurrent.futures import ThreadPoolExecutor
torch.multinomial = lambda chances, _: chances.argmax(-1, keepdim=True)  # threads draw from one generator
tts = managed()
expected = tts.clone(*SAY)[0]
done, moves = threading.Event(), {"offload": 0, "release": 0, "warm": 0}

def disturb():
    chance = random.Random(1)
    while not done.is_set():
        name = chance.choice(list(moves))
        getattr(tts.manager, name)("tts")
        moves[name] += 1

other = threading.Thread(target=disturb)
other.start()
with ThreadPoolExecutor(8) as pool:
    answers = list(pool.map(lambda _: tts.clone(*SAY)[0], range(16)))
done.set()
other.join()
assert len(answers) == 16 and all(torch.equal(answer, expected) for answer in answers)
assert min(moves.values()) > 0, moves
tts.manager.close()
assert children() == []
"""
    play(script)


def test_a_worker_of_an_unknown_library_is_shown_as_held(newer: Path, models: Path, voice: Path) -> None:
    """An offload that leaves 144 MB in a child must not claim an empty GPU."""
    script = """
from residency.memory import self_moving
self_moving._by_name.clear()
tts = managed(keep_warm=-1)
tts.clone(*SAY)
tts.force_offload()
(child,), away = children(), model(tts)
assert away["outside_bytes"] > 140 << 20, away
assert [held["pid"] for held in away["outside_processes"]] == [child.pid]
assert tts.get_gpu_status()["device"]["outside_bytes"] + tts.get_gpu_status()["host"]["outside_bytes"] > 140 << 20
tts.force_release()
gone = model(tts)
assert children() == [] and gone["outside_bytes"] == 0 and gone["outside_processes"] == [], gone
"""
    run_newer(_TREE + script, models, voice, newer)


@pytest.mark.parametrize("first", ["older", "newer"])
def test_a_second_generation_in_one_process_is_refused_and_the_first_goes_on(
    newer: Path, models: Path, voice: Path, tmp_path: Path, first: str
) -> None:
    older = Path(shutil.copytree(CHECKOUT, tmp_path / "older", ignore=shutil.ignore_patterns("__pycache__")))
    roots = {"older": str(older), "newer": str(newer)}
    second = roots["newer" if first == "older" else "older"]
    script = f"""
from residency.errors import EngineUnavailable
FIRST, SECOND = {roots[first]!r}, {second!r}
folder = lambda root: MODELS if root == {roots["older"]!r} else MODELS + "/Step-Audio-EditX"

def listener():
    import tokenizer
    return tokenizer.StepAudioTokenizer(MODELS + "/Step-Audio-Tokenizer")

def drop_in(root):
    os.environ["STEP_AUDIO_ROOT"] = root
    return GPUManagedTTS(MODELS + "/Step-Audio-EditX", listener, manager=manager, name=root)

import os
manager = GPUResourceManager(SimulatedDevice(4 << 30))
one, two = drop_in(FIRST), drop_in(SECOND)
said = spoken(one)
assert sys.modules["tts"].__file__.startswith(FIRST), "the checkout at the start of each"
for ask in (lambda: two.clone(*SAY), lambda: step_audio.build(folder(SECOND), root=SECOND)):
    try:
        ask()
    except EngineUnavailable as error:
        print(error)
assert all(map(torch.equal, spoken(one), said))
assert manager.status()["models"][SECOND]["state"] == "released"
manager.close()
"""
    told = run(script, models, voice, older)
    assert told.count(f"This process has loaded the Step-Audio-EditX in {roots[first]}, and that in {second} has") == 2


def test_a_checkout_that_changes_its_generation_after_its_import_needs_a_restart(
    newer: Path, models: Path, voice: Path
) -> None:
    script = f"""
import shutil
from residency.errors import EngineUnavailable
build().llm.llm_engine.engine_core.shutdown()
shutil.copy({str(CHECKOUT / "tts.py")!r}, {str(newer / "tts.py")!r})
try:
    step_audio.build(MODELS)
except EngineUnavailable as error:
    print(error)
"""
    assert "restart the program" in run_newer(script, models, voice, newer)
