from __future__ import annotations

import pickle

import pytest

from residency import errors
from residency.launch.terminal import LaunchError
from residency.sentences import Sentence

EXAMPLES = [
    errors.UnknownModel("llm", ("tts", "asr")),
    errors.ModelExists("tts"),
    errors.ManagerClosed(),
    errors.NotReady(),
    errors.TooManyListeners(100),
    errors.RequestTimeout("tts", 30.0, 2, "loading"),
    errors.ModelBusy("tts", 3, "device"),
    errors.RequestCancelled("tts"),
    errors.RequestStopped(),
    errors.LeaseDeadlock("tts", ("asr",)),
    errors.EventLoopBlocked("tts", "close()", errors.Holder("app.py:3 in work", "MainThread", 5.0, None)),
    errors.LeaseDeadlock("tts", ("asr",), errors.Holder("app.py:3 in work", "MainThread", 5.0, "pool-0")),
    errors.LoadTimeout("tts", 60.0),
    errors.SettingsConflict("idle_timeout", 600, 300),
    errors.DeviceOutOfMemory(10, 5, "card"),
    errors.DeviceOutOfMemory(10, None, "card", ((1234, 5), (1235, None))),
    errors.OverBudget(10, 5, 8, "card"),
    errors.DeviceUnavailable("driver too old"),
    errors.DeviceLost("illegal memory access"),
    errors.CaptureUnderWay("card"),
    errors.SharedWeights((".llm.weight",)),
    errors.WeightsGone((".llm.weight",)),
    errors.NotHandedOut("generator"),
    errors.NotHandedOut("Words", "an_engine"),
    errors.PartGone("Sequential"),
    errors.TensorAway(".llm.weight", False),
    errors.TensorAway(".llm.weight", True),
    errors.CapturedGraphs((".flow.graph",)),
    errors.WorkerEnded(".llm"),
    errors.WorkerDied("tts", Sentence("it crashed in native code (SIGSEGV)", "它在原生代码中崩溃（SIGSEGV）")),
    errors.CheckpointFailed(4711, "lock", Sentence("no answer within 10 s", "10 秒内没有响应")),
    errors.RemoteError("EngineError", "no such voice"),
    errors.SelfMoveFreedNothing(".llm", 5),
    errors.SelfMoveFreedNothing(".llm", 5, ("build it anew", "请重新构建")),
    errors.SelfMoveFailed(".llm", "it is busy"),
    errors.OnAnotherDevice("cuda:1", "cuda:0"),
    errors.SnapshotUnusable("tts", "it is damaged"),
    errors.InvalidInput("give text", "请输入文本"),
    errors.InvalidInput("give text", "请输入文本", "prompt_text"),
    errors.NeighborUnreachable("ollama", "http://127.0.0.1:11434", Sentence("it is off", "它没有运行")),
    errors.NeighborRefused("vllm", "http://127.0.0.1:8000", "error 500"),
    errors.NotAllowed(),
    errors.EngineUnavailable("clone it", "请下载"),
    errors.ExtraMissing("app", "gradio"),
    LaunchError("give a port", "请指定端口"),
]


@pytest.mark.parametrize("error", EXAMPLES, ids=lambda error: type(error).__name__)
def test_errors_pickle_with_their_fields_and_words(error: errors.ResidencyError) -> None:
    copy = pickle.loads(pickle.dumps(error))
    assert type(copy) is type(error)
    assert str(copy) == str(error)
    assert vars(copy) == vars(error)


@pytest.mark.parametrize("error", EXAMPLES, ids=lambda error: type(error).__name__)
def test_errors_say_it_in_english_and_in_chinese(error: errors.ResidencyError) -> None:
    assert str(error) == f"{error.en} / {error.zh}"
    assert error.en.isascii()
    assert not error.zh.isascii()
    assert " / " not in error.en + error.zh


def test_every_error_has_an_example_here() -> None:
    defined = {kind for kind in vars(errors).values() if isinstance(kind, type) and issubclass(kind, Exception)}
    assert defined - {errors.ResidencyError} | {LaunchError} == {type(error) for error in EXAMPLES}


def test_errors_are_of_the_kinds_that_programs_already_catch() -> None:
    assert issubclass(errors.DeviceOutOfMemory, MemoryError)
    assert issubclass(errors.InvalidInput, ValueError)
    assert issubclass(errors.UnknownModel, KeyError)
