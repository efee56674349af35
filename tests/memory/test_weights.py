"""Weights are restored bit for bit, with everything attached to them."""

from __future__ import annotations

import os
import tempfile
from collections import Counter

import pytest
import torch
from engine_strategies import DTYPES, HOMES, OWNERS, VIEWS, Base, Graph, Step, engines, lives, raw_of, small_layout
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

from gpu_manager import CpuDevice, DeviceOutOfMemory, SimulatedDevice
from residency.memory import SnapshotFolder
from residency.memory.mirror import HostMirror, MirrorSpan
from residency.memory.weights import Weights

EVERY_DTYPE = [
    torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.float8_e4m3fn, torch.float8_e5m2,
    torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.bool, torch.complex64,
]  # fmt: skip


def raw(tensor: torch.Tensor) -> bytes:
    """Returns the bytes of a tensor's whole storage, for any dtype."""
    storage = tensor.untyped_storage()
    return bytes(torch.empty(0, dtype=torch.uint8).set_(storage).numpy())


def round_trip(tensors: dict[str, torch.Tensor], device: SimulatedDevice) -> None:
    weights = Weights(tensors, device)
    weights.offload()
    assert all(tensor.untyped_storage().nbytes() == 0 for tensor in tensors.values())
    weights.restore()


@pytest.mark.parametrize("dtype", EVERY_DTYPE)
def test_every_dtype_survives(dtype: torch.dtype, device: SimulatedDevice) -> None:
    tensor = torch.randint(0, 255, (33, 8), dtype=torch.uint8)
    tensor = (tensor % 2).bool() if dtype is torch.bool else tensor.view(dtype)
    before = raw(tensor)
    round_trip({"t": tensor}, device)
    assert raw(tensor) == before
    assert tensor.dtype is dtype


def test_ties_views_strides_and_identity_survive(device: SimulatedDevice) -> None:
    module = torch.nn.Linear(8, 8)
    transposed, window = module.weight.detach().t(), module.weight.detach()[2:4, 1:]
    weight, before = module.weight, module.weight.detach().clone()
    round_trip({"weight": module.weight, "t": transposed, "window": window, "bias": module.bias}, device)
    assert module.weight is weight
    assert weight.requires_grad
    assert torch.equal(weight, before)
    assert transposed.stride() == (1, 8)
    assert torch.equal(window, before[2:4, 1:])
    with torch.no_grad():
        weight[2, 1] = 7.0
    assert window[0, 0] == 7.0 == transposed[1, 2]


def test_shared_bytes_are_counted_and_moved_once(device: SimulatedDevice) -> None:
    tensor = torch.zeros(1000)
    weights = Weights({"a": tensor, "b": tensor[10:], "c": tensor.view(10, 100)}, device)
    assert device.ledger_bytes == weights.device_bytes == 4000
    assert weights.offload() == 4000


def test_changes_made_on_the_device_are_kept(device: SimulatedDevice) -> None:
    tensor = torch.zeros(10)
    weights = Weights({"t": tensor}, device)
    for value in (1.0, 2.0):
        tensor.fill_(value)
        weights.offload()
        weights.restore()
        assert torch.equal(tensor, torch.full((10,), value))


def test_moves_are_idempotent_and_the_books_are_right(device: SimulatedDevice) -> None:
    weights = Weights({"t": torch.zeros(250)}, device)
    assert (weights.device_bytes, weights.host_bytes, device.ledger_bytes) == (1000, 0, 1000)
    assert [weights.offload(), weights.offload()] == [1000, 0]
    assert (weights.device_bytes, weights.host_bytes, device.ledger_bytes) == (0, 1000, 0)
    assert [weights.restore(), weights.restore()] == [1000, 0]
    assert (weights.device_bytes, weights.host_bytes, device.ledger_bytes) == (1000, 1000, 1000), "the mirror is kept"
    weights.release()
    assert (weights.device_bytes, weights.host_bytes, device.ledger_bytes) == (0, 0, 0)


def test_release_from_the_host_frees_the_mirrors(device: SimulatedDevice) -> None:
    weights = Weights({"t": torch.zeros(250)}, device)
    weights.offload()
    assert weights.release() == 1000
    assert weights.host_bytes == 0


def test_inference_tensors_and_storages_that_cannot_be_resized_move_too(device: SimulatedDevice) -> None:
    with torch.inference_mode():
        cache = torch.arange(6.0)
    numpy_owned = torch.from_numpy(torch.arange(5.0).numpy().copy())
    view = numpy_owned[1:3]
    with torch.inference_mode():
        frozen = torch.frombuffer(bytearray(torch.arange(4.0).numpy().tobytes()), dtype=torch.float32)
    assert not numpy_owned.untyped_storage().resizable()
    round_trip({"cache": cache, "numpy": numpy_owned, "view": view, "frozen": frozen}, device)
    assert cache.tolist() == [0, 1, 2, 3, 4, 5]
    assert numpy_owned.tolist() == [0, 1, 2, 3, 4]
    assert view.tolist() == [1, 2]
    assert view.untyped_storage()._cdata == numpy_owned.untyped_storage()._cdata
    assert frozen.tolist() == [0, 1, 2, 3]


def test_a_weight_that_numpy_looks_at_moves_all_the_same(device: SimulatedDevice) -> None:
    tensor = torch.arange(5.0)
    weights = Weights({"t": tensor}, device)
    looking = tensor.numpy()  # from now on torch refuses to resize this storage
    weights.offload()
    assert looking.tolist() == [0, 1, 2, 3, 4], "numpy keeps its own bytes"
    weights.restore()
    assert tensor.tolist() == [0, 1, 2, 3, 4]
    assert device.ledger_bytes == 20


def test_a_script_module_from_a_file_computes_the_same_afterwards(device: SimulatedDevice, tmp_path) -> None:
    torch.jit.script(torch.nn.Linear(4, 4)).save(str(tmp_path / "linear.pt"))
    module = torch.jit.load(str(tmp_path / "linear.pt"))
    x = torch.randn(2, 4)
    before = module(x)
    round_trip(dict(module.named_parameters()), device)
    assert torch.equal(module(x), before)


def test_empty_and_meta_tensors_are_no_trouble(device: SimulatedDevice) -> None:
    scalar = torch.tensor(3.0)
    round_trip({"scalar": scalar}, device)
    weights = Weights({"empty": torch.empty(0, 3), "meta": torch.empty(5, device="meta"), "scalar": scalar}, device)
    assert weights.device_bytes == 4
    weights.offload()
    weights.restore()
    assert scalar.item() == 3.0


def test_a_card_that_is_too_small_refuses_at_once_and_keeps_clean_books() -> None:
    device = SimulatedDevice(capacity_bytes=999)
    with pytest.raises(DeviceOutOfMemory) as error:
        Weights({"t": torch.zeros(250)}, device)
    assert (error.value.needed_bytes, error.value.free_bytes) == (1000, 999)
    assert device.ledger_bytes == 0


def test_running_out_of_memory_half_way_through_a_restore_leaves_the_host_copy_whole() -> None:
    device = SimulatedDevice(capacity_bytes=1000)
    tensors = {str(i): torch.full((50,), float(i)) for i in range(5)}
    weights = Weights(tensors, device)
    weights.offload()
    device.charge(500)  # another user occupies half of the card
    with pytest.raises(DeviceOutOfMemory) as error:
        weights.restore()
    assert (error.value.needed_bytes, error.value.free_bytes) == (1000, 500)
    assert (weights.device_bytes, weights.host_bytes, device.ledger_bytes) == (0, 1000, 500)
    device.refund(500)
    weights.restore()
    assert all(torch.equal(tensor, torch.full((50,), float(name))) for name, tensor in tensors.items())


def test_an_error_during_an_offload_leaves_the_device_copy_whole(
    device: SimulatedDevice, monkeypatch: pytest.MonkeyPatch
) -> None:
    tensors = {"a": torch.ones(10), "b": torch.ones(20)}
    weights = Weights(tensors, device)

    def no_room(*_: object) -> None:
        raise MemoryError

    monkeypatch.setattr(HostMirror, "span", no_room)
    with pytest.raises(MemoryError):
        weights.offload()
    assert weights.device_bytes == 120
    assert tensors["a"].sum() == 10
    monkeypatch.undo()
    weights.offload()
    weights.restore()
    assert (tensors["a"].sum(), tensors["b"].sum()) == (10, 20)


def test_where_device_and_host_are_one_memory_nothing_moves() -> None:
    tensor = torch.ones(10)
    weights = Weights({"t": tensor}, CpuDevice())
    assert (weights.device_bytes, weights.host_bytes) == (0, 40)
    assert weights.offload() == 0
    assert tensor.sum() == 10
    weights.release()
    assert tensor.sum() == 10, "somebody may still hold it"
    assert weights.host_bytes == 0


@st.composite
def tensor_families(draw: st.DrawFn) -> dict[str, torch.Tensor]:
    """Draws bases of random dtypes with overlapping, strided and reinterpreted views."""
    tensors: dict[str, torch.Tensor] = {}
    for number in range(draw(st.integers(1, 4))):
        size = draw(st.integers(0, 8)) * 16
        base = torch.randint(0, 256, (size,), dtype=torch.uint8)
        if draw(st.booleans()):
            base = torch.from_numpy(base.numpy().copy())
        tensors[f"{number}"] = base
        for view in range(draw(st.integers(0, 3))):
            kind = draw(st.sampled_from(["slice", "stride", "dtype", "same"]))
            start = draw(st.integers(0, max(size - 1, 0)))
            step = draw(st.integers(1, 5))
            tensors[f"{number}.{view}"] = {
                "slice": lambda b=base, s=start: b[s:],
                "stride": lambda b=base, s=step: b[::s],
                "dtype": lambda b=base: b.view(torch.bfloat16) if b.numel() else b,
                "same": lambda b=base: b,
            }[kind]()
    return tensors


@settings(max_examples=100, deadline=None)
@given(tensor_families(), st.lists(st.sampled_from(["offload", "restore", "edit"]), max_size=8))
def test_any_sequence_of_moves_and_edits_keeps_every_bit(tensors: dict[str, torch.Tensor], steps: list[str]) -> None:
    device = SimulatedDevice(capacity_bytes=1 << 20)
    expected = {name: raw(tensor) for name, tensor in tensors.items()}
    weights = Weights(tensors, device)
    total = weights.device_bytes
    for step in steps:
        if step == "edit":
            weights.restore()
            for tensor in tensors.values():
                if tensor.dtype is torch.uint8:
                    tensor.add_(1)
            expected = {name: raw(tensor) for name, tensor in tensors.items()}
        else:
            getattr(weights, step)()
        assert weights.device_bytes in (0, total)
        assert weights.host_bytes in ((0, total) if weights.device_bytes else (total,))
        assert device.ledger_bytes == weights.device_bytes
    weights.restore()
    assert {name: raw(tensor) for name, tensor in tensors.items()} == expected


def test_release_frees_a_weight_that_numpy_looks_at_too(device: SimulatedDevice) -> None:
    tensor = torch.arange(5.0)
    weights = Weights({"t": tensor, "u": torch.ones(3)}, device)
    looking = tensor.numpy()
    assert weights.release() == 32
    assert device.ledger_bytes == 0
    assert looking.tolist() == [0, 1, 2, 3, 4], "numpy keeps its own bytes"


def test_a_tensor_that_grew_in_place_keeps_all_of_its_bytes(device: SimulatedDevice) -> None:
    tensor = torch.zeros(10)
    weights = Weights({"t": tensor}, device)
    tensor.resize_(20).fill_(3.0)  # like a cache, or any op with out=
    weights.offload()
    assert device.ledger_bytes == 0
    weights.restore()
    assert tensor.untyped_storage().nbytes() == 80
    assert tensor.sum() == 60


@pytest.mark.parametrize("change", [1.0, -0.0, float("nan")])
def test_a_field_of_one_value_that_is_written_into_is_copied_from_then_on(
    device: SimulatedDevice, change: float
) -> None:
    field, other = torch.zeros(1 << 19), torch.randn(100)
    before = raw(other)
    weights = Weights({"field": field, "other": other}, device)
    weights.offload()
    assert weights.host_bytes == 400, "zeros take no memory"
    weights.restore()
    assert not field.any()
    for place in (0, 300_000, (1 << 19) - 1):
        field.data[place] = change
        expected = raw(field)
        weights.offload()
        assert weights.host_bytes == (2 << 20) + 400
        weights.restore()
        assert raw(field) == expected
        assert raw(other) == before


def test_a_field_that_changes_to_another_value_from_end_to_end_stays_a_field(device: SimulatedDevice) -> None:
    field = torch.zeros(1 << 19)
    weights = Weights({"field": field}, device)
    for value in (3.0, -0.0, float("nan")):
        weights.offload()
        weights.restore()
        field.fill_(value)
        expected = raw(field)
        weights.offload()
        assert weights.host_bytes == 0
        weights.restore()
        assert raw(field) == expected


# -- any engine, any life ---------------------------------------------------------------------------------------

MOVES = ["offload", "restore", "save", "load", "rebuild", "full card", "numpy looks"]


@settings(max_examples=max(300, settings().max_examples), deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(engines(), lives(MOVES), st.sampled_from([64, 1000]), st.sampled_from([100, 4096]), st.booleans())
def test_any_engine_survives_any_life_bit_for_bit(
    drawn: tuple[Base, ...], steps: list[Step], span_bytes: int, group_bytes: int, multilinear: bool
) -> None:
    """300 lives; for the 10,000 of a nightly run:

    HYPOTHESIS_PROFILE=nightly python -m pytest -p no:cacheprovider --timeout=7200 tests/memory -k any_life
    """
    if any(base.nbytes > 10_000 for base in drawn):
        span_bytes, group_bytes = span_bytes << 10, group_bytes << 10
    fast = "/dev/shm" if os.path.isdir("/dev/shm") else None
    with small_layout(span_bytes, group_bytes, multilinear), tempfile.TemporaryDirectory(dir=fast) as folder:
        Life(drawn, SnapshotFolder(folder)).live(steps)


class Life:
    """An engine whose bytes are recorded after each edit, and compared whenever they are on the device."""

    def __init__(self, drawn: tuple[Base, ...], store: SnapshotFolder) -> None:
        self.drawn, self.store = drawn, store
        self.device = SimulatedDevice(1 << 30)
        self.build()

    def build(self) -> None:
        self.graph = Graph(self.drawn)
        self.expected = self.graph.contents()
        self.weights = Weights(self.graph.tensors, self.device)
        self.total_bytes = self.device.ledger_bytes
        self.place = "device"
        unique = {tensor.untyped_storage()._cdata: tensor for tensor in self.graph.tensors.values()}
        assert self.total_bytes == sum(tensor.untyped_storage().nbytes() for tensor in unique.values())

    def live(self, steps: list[Step]) -> None:
        self.check()
        for step in steps:
            self.take(step)
            self.check()
        if self.place == "disk":
            self.weights.load(self.store, "engine")
        self.weights.restore()
        self.place = "device"
        self.check()
        self.release()

    def take(self, step: Step) -> None:
        if step.what == "rebuild":
            expected = self.expected
            self.release()
            self.build()
            self.graph.write(expected)
            self.expected = expected
        elif step.what == "load" and self.place == "disk":
            self.weights.load(self.store, "engine")
            self.place = "host"
        elif self.place == "disk":
            return
        elif step.what == "save":
            self.weights.save(self.store, "engine")
            self.place = "disk"
        elif step.what == "offload":
            assert self.weights.offload() == (self.total_bytes if self.place == "device" else 0)
            self.place = "host"
        elif step.what == "restore":
            assert self.weights.restore() == (self.total_bytes if self.place == "host" else 0)
            self.place = "device"
        elif step.what == "full card":
            if self.place == "host" and self.total_bytes:
                self.restore_on_a_card_with_only(step.where % self.total_bytes)
        elif self.place == "device":
            if step.what == "numpy looks":
                for tensor in list(self.graph.tensors.values())[step.which % 3 :: 3]:
                    raw_of(tensor).numpy()  # from now on torch refuses to resize this storage
            else:
                self.graph.edit(step)
            self.expected = self.graph.contents()

    def release(self) -> None:
        self.weights.release()
        assert (self.device.ledger_bytes, self.device.pinned_bytes, self.weights.host_bytes) == (0, 0, 0)

    def restore_on_a_card_with_only(self, free_bytes: int) -> None:
        others_bytes = self.device.capacity_bytes - free_bytes
        self.device.charge(others_bytes)
        with pytest.raises(DeviceOutOfMemory):
            self.weights.restore()
        assert self.device.ledger_bytes == others_bytes
        self.device.refund(others_bytes)

    def check(self) -> None:
        here_bytes = self.total_bytes if self.place == "device" else 0
        assert self.weights.device_bytes == self.device.ledger_bytes == here_bytes
        assert self.weights.host_bytes <= (0 if self.place == "disk" else self.total_bytes * 1.02 + 4096 * 1000)
        if self.place == "device":
            self.graph.check_unchanged()
            assert self.graph.contents() == self.expected
        else:
            assert all(tensor.untyped_storage().nbytes() == 0 for tensor in self.graph.tensors.values())


def test_the_engines_that_are_drawn_really_are_of_every_kind() -> None:
    """The strategy draws every promised kind; otherwise the test above could pass without interesting cases."""
    kinds: set[object] = set()

    @settings(max_examples=200, deadline=None, database=None, derandomize=True)
    @given(engines())
    def draw(drawn: tuple[Base, ...]) -> None:
        for base in drawn:
            kinds.update({base.dtype, base.owner, *(view.kind for view in base.views)})
            kinds.update(view.home for view in base.views)
            kinds.update({"large", "constant" if base.odd_byte is None else "odd"} if base.nbytes >= 1 << 20 else ())
            kinds.update({"nothing"} if not base.nbytes else ())

    draw()
    assert kinds >= {*DTYPES, *OWNERS, *VIEWS, *HOMES, "large", "odd", "constant", "nothing"}


# -- many tensors -----------------------------------------------------------------------------------------------


class CountingCalls(TorchDispatchMode):
    """Counts the calls that reach torch, by name."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: Counter[str] = Counter()

    def __torch_dispatch__(self, function, types, arguments=(), options=None):  # type: ignore[no-untyped-def]
        self.calls[function.overloadpacket.__name__] += 1
        return function(*arguments, **(options or {}))


def test_fifty_thousand_small_tensors_cross_together(device: SimulatedDevice) -> None:
    """A few calls per span, at most a view or two per tensor: no copy, sum or comparison for each."""
    count = 50_000
    owner = torch.randn(count, 256)
    tensors = {str(number): row.clone() for number, row in enumerate(owner)}
    weights = Weights(tensors, device)
    spans = count * 1024 // (8 << 20) + 1
    for move in (weights.offload, weights.restore, weights.offload, weights.restore):
        with CountingCalls() as counting:
            move()
        windows = counting.calls.pop("slice", 0)
        assert windows <= 2 * count + 10 * spans
        assert sum(counting.calls.values()) <= 12 * spans, counting.calls
    assert torch.equal(torch.stack([*tensors.values()]), owner)


def test_an_offload_of_what_did_not_change_copies_nothing(
    device: SimulatedDevice, monkeypatch: pytest.MonkeyPatch
) -> None:
    tensors = {str(number): torch.randn(1000) for number in range(10)}
    copied: list[int] = []
    span_of = HostMirror.span

    def span(mirror: HostMirror, span: MirrorSpan) -> torch.Tensor:
        copied.append(span.nbytes)
        return span_of(mirror, span)

    monkeypatch.setattr(HostMirror, "span", span)
    with small_layout(4000, 1 << 20):
        weights = Weights(tensors, device)
        weights.offload()
        weights.restore()
        copied.clear()
        weights.offload()
        assert copied == []
        weights.restore()
        copied.clear()
        tensors["3"].data[[5, 6]] = tensors["3"][[6, 5]]
        weights.offload()
        assert copied == [4000], "and of what did, only the span that did"


@pytest.mark.parametrize("shared_from", ["the load", "the first request", "the second request"])
def test_storages_shared_with_other_processes_stay_and_everything_else_leaves(
    shared_from: str, device: SimulatedDevice, caplog: pytest.LogCaptureFixture
) -> None:
    shared, own = torch.arange(100.0), torch.arange(50.0)
    if shared_from == "the load":
        shared.share_memory_()
    weights = Weights({".shared": shared, ".own": own}, device)
    for turn in range(3):
        if (shared_from, turn) in {("the first request", 0), ("the second request", 1)}:
            shared.share_memory_()
        weights.offload()
        stays = turn > 0 or shared_from != "the second request"
        assert (device.ledger_bytes, weights.device_bytes) == (0, 0)
        assert own.untyped_storage().nbytes() == 0
        if stays:
            assert shared.tolist() == list(range(100))
            assert weights.host_bytes == 400 + 200, "the shared bytes, and the mirror of the others"
        weights.restore()
        assert device.ledger_bytes == 200 + (0 if stays else 400)
        assert own.tolist() == list(range(50))
    assert caplog.text.count(".shared is shared with other processes") == 1, "named once"
    weights.release()
    assert device.ledger_bytes == 0
