"""Sessions are destroyed and rebuilt inside the same Python object."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import numpy as np
import onnxruntime
import pytest

from gpu_manager import CpuDevice, DeviceOutOfMemory, SimulatedDevice
from residency.errors import SnapshotUnusable
from residency.memory import SnapshotFolder
from residency.memory.discovery import discover
from residency.memory.onnx_sessions import OnnxSessions

MODEL = Path(str(importlib.util.find_spec("hibari").origin)).parent / "assets" / "oov.onnx"
FEED = {"chars": np.array([[1, 2, 3]], np.int64)}


@pytest.fixture(params=["path", "bytes"])
def session(request: pytest.FixtureRequest) -> onnxruntime.InferenceSession:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    source = str(MODEL) if request.param == "path" else MODEL.read_bytes()
    return onnxruntime.InferenceSession(source, options, providers=["CPUExecutionProvider"])


def test_a_session_is_destroyed_and_rebuilt_in_place(
    session: onnxruntime.InferenceSession, device: SimulatedDevice
) -> None:
    size = MODEL.stat().st_size
    before = session.run(None, FEED)
    sessions = OnnxSessions(discover({"model": session}).sessions, device)
    assert sessions.device_bytes == device.ledger_bytes == size
    assert sessions.offload() == size
    assert session._sess is None
    assert sessions.device_bytes == device.ledger_bytes == 0
    assert sessions.host_bytes == len(session._model_bytes or b"")
    assert sessions.restore() == size
    assert session.get_session_options().intra_op_num_threads == 1
    assert session.get_providers() == ["CPUExecutionProvider"]
    assert [np.array_equal(a, b) for a, b in zip(before, session.run(None, FEED), strict=True)] == [True]
    assert [sessions.restore(), sessions.offload(), sessions.offload()] == [0, size, 0]


def test_release_destroys_what_is_left(session: onnxruntime.InferenceSession, device: SimulatedDevice) -> None:
    sessions = OnnxSessions({"model": session}, device)
    sessions.release()
    assert session._sess is None
    assert (device.ledger_bytes, sessions.device_bytes, sessions.host_bytes) == (0, 0, 0)


def test_a_session_that_cannot_be_rebuilt_leaves_all_of_them_destroyed(
    session: onnxruntime.InferenceSession, device: SimulatedDevice, tmp_path: Path
) -> None:
    copy = tmp_path / "gone.onnx"
    copy.write_bytes(MODEL.read_bytes())
    gone = onnxruntime.InferenceSession(str(copy), providers=["CPUExecutionProvider"])
    sessions = OnnxSessions({"a": session, "b": gone}, device)
    sessions.offload()
    copy.unlink()
    with pytest.raises(Exception, match=r"gone\.onnx"):
        sessions.restore()
    assert session._sess is None
    assert device.ledger_bytes == 0
    copy.write_bytes(MODEL.read_bytes())
    sessions.restore()
    assert session.run(None, FEED)


def test_a_card_that_is_too_small_refuses(session: onnxruntime.InferenceSession) -> None:
    with pytest.raises(DeviceOutOfMemory):
        OnnxSessions({"model": session}, SimulatedDevice(1000))


def test_sessions_in_main_memory_live_until_release(session: onnxruntime.InferenceSession) -> None:
    sessions = OnnxSessions({"model": session}, CpuDevice())
    assert sessions.offload() == 0
    assert session.run(None, FEED)
    assert sessions.host_bytes >= MODEL.stat().st_size
    sessions.release()
    assert session._sess is None


class Resting(SimulatedDevice):
    """A card not used by ONNX Runtime: sessions stay in main memory."""

    def holds_session(self, providers: object) -> bool:
        return False


def test_sessions_in_main_memory_are_given_up_for_a_snapshot_and_built_again(
    session: onnxruntime.InferenceSession, tmp_path: Path
) -> None:
    before = session.run(None, FEED)
    sessions = OnnxSessions({"model": session}, Resting(1 << 30))
    store = SnapshotFolder(tmp_path)
    assert sessions.offload() == 0
    assert session.run(None, FEED)
    assert sessions.save(store, "tts") >= MODEL.stat().st_size
    assert session._sess is None
    assert list(tmp_path.iterdir()) == []
    sessions.load(store, "tts")
    assert [np.array_equal(a, b) for a, b in zip(before, session.run(None, FEED), strict=True)] == [True]


def test_a_session_that_came_from_neither_path_nor_bytes_forbids_a_snapshot(
    session: onnxruntime.InferenceSession, tmp_path: Path, device: SimulatedDevice
) -> None:
    session._model_path = session._model_bytes = None
    sessions = OnnxSessions({"model": session}, device)
    with pytest.raises(SnapshotUnusable, match="built again"):
        sessions.save(SnapshotFolder(tmp_path), "tts")
    assert sessions.offload() == 0
    assert session.run(None, FEED), "it stays where it is"


def test_a_session_whose_file_has_gone_is_named_when_it_cannot_come_back(tmp_path: Path) -> None:
    copy = tmp_path / "gone.onnx"
    copy.write_bytes(MODEL.read_bytes())
    session = onnxruntime.InferenceSession(str(copy), providers=["CPUExecutionProvider"])
    sessions = OnnxSessions({"model": session}, Resting(1 << 30))
    store = SnapshotFolder(tmp_path / "snapshots")
    sessions.save(store, "tts")
    copy.unlink()
    with pytest.raises(Exception, match=r"gone\.onnx"):
        sessions.load(store, "tts")
    assert sessions.host_bytes == 0


def test_sessions_survive_many_moves_with_the_same_answer(
    session: onnxruntime.InferenceSession, device: SimulatedDevice
) -> None:
    before = session.run(None, FEED)
    bound = session.run
    sessions = OnnxSessions({"model": session}, device)
    for _ in range(3):
        sessions.offload()
        sessions.restore()
        assert [np.array_equal(a, b) for a, b in zip(before, bound(None, FEED), strict=True)] == [True]
        assert [one.name for one in session.get_inputs()] == ["chars"]
    assert device.ledger_bytes == MODEL.stat().st_size
