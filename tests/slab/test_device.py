"""The device slab over the array-module seam: on NumPy everywhere, on CuPy where a GPU is (marked gpu)."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import closing

import numpy as np
import pytest

from headway.slab import device as device_module
from headway.slab.device import HANDLE_BYTES, Device, DeviceError, DeviceMapping, DeviceSegment, open_device
from headway.slab.host import PAGE, SlabError
from headway.slab.staging import BUFFER_BYTES, Staging
from tests.slab.device_rig import opener

SLOTS, STRIDE = 40, 65 * PAGE
USED = STRIDE - 100


@pytest.fixture(params=["numpy:0", pytest.param("cuda:0", marks=pytest.mark.gpu)])
def device(request: pytest.FixtureRequest) -> Device:
    try:
        device = open_device(request.param)
    except DeviceError as error:
        pytest.skip(str(error))
    assert device is not None
    return device


@pytest.fixture
def segment(device: Device) -> Iterator[DeviceSegment]:
    segment = DeviceSegment(device, SLOTS * STRIDE)
    yield segment
    segment.remove()


def fill(segment: DeviceSegment) -> np.ndarray:
    """Random bytes into the whole slab; what was put there."""
    content = np.random.default_rng(1).integers(0, 256, segment.size, np.uint8)
    transfer(segment, segment.address, content.ctypes.data)
    return content.reshape(SLOTS, STRIDE)


def whole(segment: DeviceSegment) -> np.ndarray:
    """What lies in the slab now."""
    found = np.empty(segment.size, np.uint8)
    transfer(segment, found.ctypes.data, segment.address)
    return found.reshape(SLOTS, STRIDE)


def transfer(segment: DeviceSegment, target: int, source: int) -> None:
    stream = segment.device.module.stream(segment.device.index)
    stream.copy(target, source, segment.size)
    stream.wait()


def staging(segment: DeviceSegment) -> Staging:
    return Staging(segment.device, segment.address, USED, STRIDE)


# ---------------------------------------------------------------------- one allocation, two processes


def test_what_one_process_writes_the_other_one_reads(segment: DeviceSegment) -> None:
    content = fill(segment)
    assert len(segment.handle) == HANDLE_BYTES
    with opener(segment, SLOTS, STRIDE) as other:
        other.run(f"assert slab.shape == ({SLOTS}, {STRIDE}) and slab.dtype == 'uint8'")
        other.run(f"assert int(slab[7, 11]) == {content[7, 11]} and int(slab[-1, -1]) == {content[-1, -1]}")
        other.run("slab[3] = 99")
        # On a GPU assignments are asynchronous; reading one back waits for them.
        other.run("assert int(slab[3, 0]) == 99")
        assert (whole(segment)[3] == 99).all()
        content[3] = 99
        assert (whole(segment) == content).all()


def test_a_mapping_can_be_closed_and_the_owner_goes_on(segment: DeviceSegment) -> None:
    with opener(segment, SLOTS, STRIDE) as other:
        other.run("slab[0] = 5; assert int(slab[0, 0]) == 5")
        other.run("del slab; mapping.close()")
        other.run("mapping = DeviceMapping(mapping.device, bytes.fromhex(handle), int(size))")
        other.run(f"slab = mapping.view({SLOTS}, {STRIDE}); assert int(slab[0, 1]) == 5")
    assert (whole(segment)[0] == 5).all()


def test_torch_sees_the_slab_where_it_lies(segment: DeviceSegment) -> None:
    pytest.importorskip("torch")
    with opener(segment, SLOTS, STRIDE) as other:
        other.run("import torch; tensor = torch.from_dlpack(slab)")
        other.run(f"assert tensor.dtype == torch.uint8 and tuple(tensor.shape) == ({SLOTS}, {STRIDE})")
        other.run(
            f"assert tensor.data_ptr() == mapping.address and tensor.is_cuda == {segment.device.module.kind == 'cuda'}"
        )
        other.run("tensor[2].view(torch.bfloat16).fill_(1.0)")
        other.run("assert int(slab[2, 0]) == 0x80 and int(slab[2, 1]) == 0x3F")


def test_a_process_cannot_open_its_own_handle(segment: DeviceSegment) -> None:
    with pytest.raises(DeviceError, match="handle cannot be opened"):
        DeviceMapping(segment.device, segment.handle, segment.size)


def test_a_handle_of_the_wrong_length_is_refused(device: Device) -> None:
    with pytest.raises(DeviceError, match="a handle has 64 bytes, this one has 3"):
        DeviceMapping(device, b"abc", PAGE)


# ---------------------------------------------------------------------- refusals


def test_a_slab_larger_than_the_device_is_refused_with_what_is_free(device: Device) -> None:
    with pytest.raises(SlabError, match=rf"{device} has \d+ of \d+ bytes free; make slab_bytes smaller"):
        DeviceSegment(device, 1 << 50)


def test_an_allocation_that_fails_says_which_setting_to_change(monkeypatch: pytest.MonkeyPatch) -> None:
    device = open_device("numpy:0")
    assert device is not None

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.posix_fallocate", full)
    with pytest.raises(SlabError, match="the slab of 4096 bytes does not fit on numpy:0"):
        DeviceSegment(device, PAGE)


@pytest.mark.parametrize("name", ["gpu", "cuda", "cuda:", "cuda:-1", "cuda:x", "cpu:0", ""])
def test_a_name_that_is_none_is_refused(name: str) -> None:
    assert not device_module.valid_name(name)
    with pytest.raises(DeviceError, match="it must be cpu, or cuda:N"):
        open_device(name)


def test_a_device_that_is_not_there_is_refused() -> None:
    with pytest.raises(DeviceError, match="there is no numpy:7: this process sees 2"):
        open_device("numpy:7")


def test_cpu_is_no_device() -> None:
    assert open_device("cpu") is None


def test_without_cupy_the_extras_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "headway.slab.cupy_device", None)
    with pytest.raises(DeviceError, match=r"needs CuPy .*headway\[cuda13\].*headway\[cuda12\]"):
        open_device("cuda:0")


# ---------------------------------------------------------------------- staging


@pytest.mark.parametrize("count", [1, BUFFER_BYTES // USED, BUFFER_BYTES // USED + 1, SLOTS])
def test_scattered_slots_come_out_as_they_lie(segment: DeviceSegment, count: int) -> None:
    content = fill(segment)
    slots = [(at * 27 + 5) % SLOTS for at in range(count)]
    found: list[bytes] = []
    for views in staging(segment).outgoing(slots):
        found += [bytes(view) for view in views]
    assert found == [content[slot, :USED].tobytes() for slot in slots]


@pytest.mark.parametrize("count", [1, BUFFER_BYTES // USED, BUFFER_BYTES // USED + 1, SLOTS])
def test_what_comes_in_lies_in_its_slots_and_nowhere_else(segment: DeviceSegment, count: int) -> None:
    content = fill(segment)
    slots = [(at * 27 + 5) % SLOTS for at in range(count)]
    number = 0
    for views in staging(segment).incoming(slots):
        for view in views:
            view[:] = bytes([number % 251]) * USED
            content[slots[number], :USED] = number % 251
            number += 1
    assert number == count
    assert (whole(segment) == content).all()


def test_nothing_is_written_once_an_incoming_transfer_was_given_up(segment: DeviceSegment) -> None:
    content = fill(segment)
    buffers = staging(segment)
    with closing(buffers.incoming(range(SLOTS))) as pieces:
        for _ in range(2):
            for view in next(pieces):
                view[:] = bytes(USED)
    first = BUFFER_BYTES // USED
    content[:first, :USED] = 0
    assert (whole(segment) == content).all()
    # The buffers are free of it as well.
    for views in buffers.outgoing([first]):
        assert bytes(views[0]) == content[first, :USED].tobytes()
    assert (whole(segment) == content).all()


def test_while_one_buffer_is_sent_the_next_is_copied(monkeypatch: pytest.MonkeyPatch) -> None:
    """The order of copies (slot), waits and uses over two buffers, one slot each."""
    device = open_device("numpy:0")
    assert device is not None
    segment = DeviceSegment(device, 4 * STRIDE)
    monkeypatch.setattr("headway.slab.staging.BUFFER_BYTES", USED)
    events: list[str] = []
    made = device.module.stream
    names = iter("AB")

    class Told:
        def __init__(self) -> None:
            self.name, self.stream = next(names), made(0)

        def copy(self, target: int, source: int, size: int) -> None:
            events.append(f"copy {self.name}")
            self.stream.copy(target, source, size)

        def wait(self) -> None:
            events.append(f"wait {self.name}")
            self.stream.wait()

    monkeypatch.setattr(device.module, "stream", lambda _: Told())
    for _ in staging(segment).outgoing(range(3)):
        events.append("send")
    sent = ["copy A", "copy B", "wait A", "send", "copy A", "wait B", "send", "wait A", "send"]
    assert events == [*sent, "wait A", "wait B"]
    segment.remove()


def test_transfers_at_the_same_time_have_buffers_of_their_own(segment: DeviceSegment) -> None:
    content, buffers = fill(segment), staging(segment)
    wrong: list[int] = []

    def read(start: int) -> None:
        slots = [(start + at) % SLOTS for at in range(SLOTS)]
        for _ in range(5):
            at = 0
            for views in buffers.outgoing(slots):
                for view in views:
                    if bytes(view) != content[slots[at], :USED].tobytes():
                        wrong.append(slots[at])
                    at += 1

    threads = [threading.Thread(target=read, args=(start,)) for start in (0, 11, 23)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
    assert 1 <= len(buffers._idle) <= 3
