"""Real checkouts of both generations, bare and managed: the newer one with vLLM on the CPU, and with a stand-in for it.

``STEP_AUDIO_ROOT=OLDER:NEWER python -m pytest tests/upstream -s``; either may be left out. vLLM on the CPU has no sleep
mode: there an offload ends with an error that says so, and the model stays. vLLM draws its random numbers from a
generator seeded when it is built, so the same sequence of calls is compared after each load.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from guide_edits import edited

_HELPERS = """
import psutil
from residency.errors import SelfMoveFreedNothing

SLEEPS = VLLM != "vLLM"

def model(tts):
    return tts.get_gpu_status()["models"]["tts"]

def offload(tts):
    try:
        return tts.manager.offload("tts")
    except SelfMoveFreedNothing as error:
        assert not SLEEPS and "enable_sleep_mode=True" in str(error), error
        return False

def calls(engine, rounds=2):
    return [audio for _ in range(rounds) for audio in spoken(engine)]

def same(some, others):
    return len(some) == len(others) and all(map(torch.equal, some, others))
"""


@pytest.mark.timeout(1800)
def test_speech_is_bit_identical_bare_and_managed(setting: Any, play: Callable[..., str], tmp_path: Path) -> None:
    heard = str(tmp_path / "bare.pt")
    script = f"""
expected = calls(bare(), 3)
assert all(audio.dtype is torch.float32 and audio.shape[0] == 1 and audio.abs().max() > 0 for audio in expected)
assert not torch.equal(*expected[:2])
torch.save(expected, {heard!r})
"""
    play(setting, _HELPERS + script)
    script = f"""
expected = torch.load({heard!r})
tts = managed()
with closing(tts.manager):
    assert state(tts) == "released" and tts.manager.device.ledger_bytes == 0
    assert not {{"tts", "tokenizer", "vllm"}} & set(sys.modules), "the first request imports them"
    assert psutil.Process().children(recursive=True) == []
    configure = tts.manager.configure
    for keep_warm in (-1, 0):
        assert same(calls(tts, 1), expected[:2]), keep_warm
        configure("tts", keep_warm=keep_warm)
        assert offload(tts) is (True if SLEEPS and keep_warm else False) or SLEEPS
        assert state(tts) == ("cpu" if SLEEPS else "gpu")
        assert SLEEPS or "enable_sleep_mode=True" in model(tts)["last_error"]
        assert same(calls(tts, 1), expected[2:4]), keep_warm
        configure("tts", keep_warm=60)
        assert same(calls(tts, 1), expected[4:6]), keep_warm
        assert state(tts) == "gpu"
        assert tts.force_release() is True
        assert state(tts) == "released"
    move = model(tts)["last_move"]
report("identical:", move)
left = [child for child in psutil.Process().children() if "resource_tracker" not in " ".join(child.cmdline())]
assert left == [], left
"""
    print(f"\n{setting.vllm or 'transformers'}:", play(setting, _HELPERS + script))


@pytest.mark.timeout(1800)
def test_sixteen_requests_from_eight_threads_under_random_moves(setting: Any, play: Callable[..., str]) -> None:
    script = """
import random
from concurrent.futures import ThreadPoolExecutor

tts = managed()
expected = tts.clone(*SAY)[0]
chance, done, releases, moves = random.Random(1), threading.Event(), 2 if SLEEPS else 1, []

def disturb():
    global releases
    while not done.wait(0.01):
        name = chance.choice(["offload", "warm", "release"] if releases else ["offload", "warm"])
        releases -= name == "release"
        moves.append(name)
        offload(tts) if name == "offload" else getattr(tts.manager, name)("tts")

other = threading.Thread(target=disturb)
other.start()
with ThreadPoolExecutor(8) as pool:
    answers = list(pool.map(lambda _: tts.clone(*SAY)[0], range(16)))
done.set()
other.join()
assert len(answers) == 16 and all(answer.abs().max() > 0 for answer in answers)
tts.manager.close()
report("requests:", len(answers), "of 16; moves:", {name: moves.count(name) for name in sorted(set(moves))})
"""
    print(f"\n{setting.vllm or 'transformers'}:", play(setting, _HELPERS + script))


@pytest.mark.timeout(1800)
def test_the_memory_of_the_process_tree_is_that_of_the_status(setting: Any, play: Callable[..., str]) -> None:
    script = """
def private(pid):
    with open(f"/proc/{pid}/smaps_rollup") as file:
        return sum(int(line.split()[1]) << 10 for line in file if line.startswith("Private_Dirty"))

def tree():
    gc.collect()
    alive = [each for each in psutil.Process().children(recursive=True) if each.status() != psutil.STATUS_ZOMBIE]
    return sum(private(each.pid) for each in [psutil.Process(), *alive])

def compared(what):
    held, there = tree() - base, model(tts)
    said = there["host_bytes"] + there["device_bytes"]
    report(f"{what:16} {there['state']:9} process tree {held / 1e6:9.1f} MB, status {said / 1e6:9.1f} MB "
          f"(GPU {there['device_bytes'] / 1e6:.1f}), outside {there['outside_bytes']}")
    return abs(held - said)

tts = managed(keep_warm=-1)
tts.clone(*SAY)
tts.force_release()
base = tree()  # with what imports, and functions that remember their results, keep
apart = []
for _ in range(2 if SLEEPS else 1):
    tts.clone(*SAY)
    compared("after a request")
    offload(tts)
    apart.append(compared("after offload"))
    assert state(tts) == ("cpu" if SLEEPS else "gpu")
    tts.force_release()
    apart.append(compared("after release"))
tts.manager.close()
assert max(apart) < 50e6, apart
"""
    print(f"\n{setting.vllm or 'transformers'}:", play(setting, _HELPERS + script))


def test_the_edits_of_the_guide_fit_its_app(setting: Any) -> None:
    compile(edited((setting.checkout / "app.py").read_text(encoding="utf-8")), "app.py", "exec")
