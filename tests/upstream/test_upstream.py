"""A real Step-Audio-EditX checkout, unmodified, with tiny random weights: nothing is lost, nothing is overlooked.

``STEP_AUDIO_ROOT=DIR python -m pytest tests/upstream -s``, in the environment of that checkout and with ``onnx``.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from edits import edited


@pytest.mark.timeout(600)
@pytest.mark.parametrize(
    ("dtype", "quantization"), [("bfloat16", None), ("float32", None), ("bfloat16", "int8"), ("bfloat16", "int4")]
)
def test_speech_is_bit_identical_wherever_the_model_has_been(
    scenario: Callable[..., str], tmp_path: Path, dtype: str, quantization: str | None
) -> None:
    if quantization:
        pytest.importorskip("bitsandbytes")
    script = f"""
bare = build()
expected = spoken(bare)
assert all(audio.dtype is torch.float32 and audio.shape[0] == 1 and audio.abs().max() > 0 for audio in expected)
assert not torch.equal(*spoken(bare))
del bare
for settings in ({{}}, {{"snapshot_dir": {str(tmp_path)!r}}}):
    tts = managed(**settings)
    with closing(tts.manager):
        assert state(tts) == "released" and tts.manager.device.ledger_bytes == 0
        for leave in (tts.force_offload, tts.force_release, tts.force_offload):
            assert all(map(torch.equal, spoken(tts), expected)), (settings, leave)
            assert leave() is True
            assert tts.manager.device.ledger_bytes == 0
        move = tts.get_gpu_status()["models"]["tts"]["last_move"]
        print({dtype!r}, {quantization!r}, f"snapshots: {{bool(settings)}}", move)
"""
    print(scenario(script, dtype, quantization))


@pytest.mark.timeout(600)
def test_everything_that_lives_because_of_the_engine_is_found_but_what_modules_keep(
    scenario: Callable[..., str],
) -> None:
    script = """
import time
import onnxruntime
from residency.residents.discovery import discover

def alive():
    gc.collect()
    things = gc.get_objects()
    tensors = [t for t in things if issubclass(type(t), torch.Tensor) and t.untyped_storage().nbytes()]
    return {t.untyped_storage()._cdata: t for t in tensors}, {
        id(s): s for s in things if type(s) is onnxruntime.InferenceSession
    }

def gb(tensors):
    return sum(t.untyped_storage().nbytes() for t in tensors) / 1e9

step_audio.import_from(step_audio.find_checkout(), "tts", "tokenizer")
before, sessions_before = alive()
engine = build()
spoken(engine)
began_s = time.perf_counter()
found = discover(engine)
took_s = time.perf_counter() - began_s
reached = {t.untyped_storage()._cdata: t for t in found.tensors.values()}
tensors, sessions = alive()
new = {key: t for key, t in tensors.items() if key not in before}
missed = {key: t for key, t in new.items() if key not in reached}
print(f"found: {len(found.tensors)} tensors in {len(reached)} storages, {gb(reached.values()):.3f} GB, "
      f"{len(found.sessions)} sessions, in {took_s:.3f} s")
print(f"alive by brute force: {len(new)} storages, {gb(new.values()):.3f} GB")

of_the_checkout = [vars(module) for name, module in sys.modules.items() if name.split(".")[0] == "stepvocoder"]
for tensor in missed.values():
    kept = [name for names in of_the_checkout for name, value in names.items()
            if isinstance(value, dict) and any(thing is tensor for thing in value.values())]
    print(f"beside it: {tuple(tensor.shape)}, {tensor.untyped_storage().nbytes():,} bytes, "
          f"{kept or 'in caches of libraries'}")
assert gb(missed.values()) < 0.004, "module globals and caches of functions only"
assert {id(s) for s in sessions.values()} - set(sessions_before) == set(map(id, found.sessions.values()))
assert len(found.sessions) == 2
assert not any(t.untyped_storage()._cdata in missed for part in (engine.llm, engine.cosy_model.cosy_impl,
               engine.audio_tokenizer.funasr_model.model) for t in [*part.parameters(), *part.buffers()])
"""
    print(scenario(script))


def test_the_edits_of_the_guide_fit_its_app(checkout: Path) -> None:
    compile(edited((checkout / "app.py").read_text(encoding="utf-8")), "app.py", "exec")
