"""A real Step-Audio-EditX checkout, unmodified, with tiny random weights: nothing is lost, nothing is overlooked.

``STEP_AUDIO_ROOT=DIR python -m pytest tests/upstream -s``, in the environment of that checkout and with ``onnx``.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest


@pytest.mark.timeout(600)
@pytest.mark.parametrize(
    ("dtype", "quantization"),
    [("bfloat16", None), ("float32", None), ("bfloat16", "int8"), ("bfloat16", "int4"), ("bfloat16", "awq-4bit")],
)
def test_speech_is_bit_identical_wherever_the_model_has_been(
    scenario: Callable[..., str], tmp_path: Path, dtype: str, quantization: str | None
) -> None:
    if quantization:
        pytest.importorskip("compressed_tensors" if quantization == "awq-4bit" else "bitsandbytes")
    heard = str(tmp_path / "bare.pt")
    script = f"""
expected = spoken(bare())
assert all(audio.dtype is torch.float32 and audio.shape[0] == 1 and audio.abs().max() > 0 for audio in expected)
assert not torch.equal(*expected)
torch.save(expected, {heard!r})
"""
    scenario(script, dtype, quantization)
    script = f"""
from pathlib import Path
from residency.memory.discovery import discover

expected = torch.load({heard!r})
builds, build_one = [], build

def build():
    builds.append(state(tts))
    return build_one()

def nbytes(tensors):
    return sum({{t.untyped_storage()._cdata: t.untyped_storage().nbytes() for t in tensors}}.values())

for snapshots in (None, Path({str(tmp_path / "snapshots")!r})):
    builds.clear()
    tts = managed(snapshot_dir=snapshots)
    with closing(tts.manager):
        assert not builds and state(tts) == "released" and tts.manager.device.ledger_bytes == 0
        assert snapshots or not {{"tts", "tokenizer"}} & set(sys.modules), "the first request imports them"
        for leave in (tts.force_offload, tts.force_release, tts.force_offload):
            assert all(map(torch.equal, spoken(tts), expected)), (snapshots, leave)
            with tts.lease() as engine:
                tensors = [t for t in discover(engine).tensors.values() if tts.manager.device.holds_tensor(t)]
                assert nbytes(tensors) > 2e9
            del engine
            assert leave() is True
            assert tts.manager.device.ledger_bytes == 0
            assert nbytes(tensors) == 0, "the books are right"
            del tensors
        assert len(builds) == (1 if snapshots else 2), "a snapshot is read, without one the engine is built anew"
        kept_bytes = [file.stat().st_size for file in snapshots.iterdir()] if snapshots else []
        assert bool(kept_bytes) == bool(snapshots)
        move = tts.get_gpu_status()["models"]["tts"]["last_move"]
        report({dtype!r}, {quantization!r}, f"snapshots: {{kept_bytes}}", move)
"""
    print(scenario(script, dtype, quantization))


@pytest.mark.timeout(600)
def test_a_drop_in_with_a_ready_tokenizer_sounds_as_what_it_stands_for(scenario: Callable[..., str]) -> None:
    """Its tokenizer seeds nothing in a load, and the vocoder draws a noise that it keeps."""
    script = """
sys.path.insert(0, CHECKOUT)
import tokenizer, tts as theirs

def ready():
    return tokenizer.StepAudioTokenizer(MODELS + "/Step-Audio-Tokenizer", funasr_model_id=FUNASR)

def heard(listener):
    return listener(torch.sin(torch.arange(16000.0) / 9)[None], 16000)

expected = spoken(theirs.StepAudioTTS(engine_folder(), ready(), device_map=WHERE))
manager = GPUResourceManager(SimulatedDevice(48 << 30))
given = ready()
tts = GPUManagedTTS(engine_folder(), given, device_map=WHERE, manager=manager)
for seed in range(2):
    assert manager.device.ledger_bytes == 0 and given.ort_session._sess is None
    assert state(tts) == "released" and tts.get_gpu_status()["models"]["tts"]["host_bytes"] > 0
    torch.manual_seed(seed)
    tts.detect_instruction_name("whoever loads it")
    assert all(map(torch.equal, spoken(tts), expected)), seed
    assert tts.force_release() is True
tts.close()
assert manager.device.ledger_bytes == 0
assert heard(given) == heard(ready())
manager.close()
"""
    scenario(script)


@pytest.mark.timeout(600)
def test_everything_that_lives_because_of_the_engine_is_found_but_what_modules_keep(
    scenario: Callable[..., str],
) -> None:
    script = r"""
import collections, functools, re, time
import onnxruntime
from residency.memory.discovery import discover

def alive():
    gc.collect()
    things = gc.get_objects()
    tensors = [t for t in things if issubclass(type(t), torch.Tensor) and t.untyped_storage().nbytes()]
    return {t.untyped_storage()._cdata: t for t in tensors}, {
        id(s): s for s in things if type(s) is onnxruntime.InferenceSession
    }

def gb(tensors):
    return sum(t.untyped_storage().nbytes() for t in tensors) / 1e9

def kept(thing, depth=3):
    # Tensors in a dictionary, or in what a function remembers of its calls.
    for child in gc.get_referents(thing):
        if issubclass(type(child), torch.Tensor):
            yield child.untyped_storage()._cdata
        elif depth and (type(child) in (dict, list, tuple) or type(child).__name__ == "_lru_list_elem"):
            yield from kept(child, depth - 1)

def not_of_the_engine():
    # By storage, where it is kept instead: globals of the vocoder's modules, caches of functions.
    where = {}
    for module in [module for name, module in sys.modules.items() if name.split(".")[0] == "stepvocoder"]:
        for name, value in vars(module).items():
            if isinstance(value, dict) and not name.startswith("__"):
                where.update(dict.fromkeys(kept(value), f"{module.__name__}.{name}"))
    for function in [thing for thing in gc.get_objects() if type(thing) is functools._lru_cache_wrapper]:
        where.update(dict.fromkeys(kept(function), f"{function.__module__}.{function.__qualname__}()"))
    return where

step_audio.import_from(step_audio.find_checkout(None), "tts", "tokenizer")
before, sessions_before = alive()
engine = build()
spoken(engine)
began_s = time.perf_counter()
found = discover(engine)
took_s = time.perf_counter() - began_s
reached = {t.untyped_storage()._cdata: t for t in found.tensors.values() if t.untyped_storage().nbytes()}
tensors, sessions = alive()
new = {key: t for key, t in tensors.items() if key not in before}
missed = {key: t for key, t in new.items() if key not in reached}
report(f"found: {len(found.tensors)} tensors in {len(reached)} storages with something in them, "
      f"{gb(reached.values()):.3f} GB, {len(found.sessions)} sessions, in {took_s:.3f} s")
parts = collections.defaultdict(dict)
for path, tensor in found.tensors.items():
    steps = re.findall(r"[A-Za-z]\w*", path.replace("_modules", "").replace("_parameters", "").replace("_buffers", ""))
    parts[".".join(steps[:4] if "kwargs" in steps else steps[:3])][tensor.untyped_storage()._cdata] = tensor
for part, of_part in sorted(parts.items()):
    report(f"  {part:48} {len(of_part):4} storages, {gb(of_part.values()) * 1e9:14,.0f} bytes")
for path, session in found.sessions.items():
    report(f"  {path[1:]:48} a session on {session.get_providers()[0]}")
report(f"alive by brute force: {len(new)} storages, {gb(new.values()):.3f} GB")
elsewhere = not_of_the_engine()
for key, tensor in missed.items():
    report(f"beside it: {tuple(tensor.shape)}, {tensor.untyped_storage().nbytes():,} bytes, in {elsewhere.get(key)}")
# The weights are tiny: a bound in bytes alone would let whole models through.
assert all(key in elsewhere for key in missed), "module globals and caches of functions only"
assert gb(missed.values()) < 0.004
assert reached.keys() <= new.keys()
assert {id(s) for s in sessions.values()} - set(sessions_before) == set(map(id, found.sessions.values()))
assert len(found.sessions) == 2
assert not any(t.untyped_storage()._cdata in missed for part in (engine.llm, engine.cosy_model.cosy_impl,
               engine.audio_tokenizer.funasr_model.model) for t in [*part.parameters(), *part.buffers()])
"""
    print(scenario(script))
