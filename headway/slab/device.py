"""Device memory for a slab: one allocation on a GPU, exported to the other processes of the host and opened by them.

All device code goes through `ArrayModule`. Two modules implement it: CuPy on a GPU, and NumPy, where a "device" is
shared host memory, so that the same tests run where no GPU is.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from headway.slab.host import SlabError

HANDLE_BYTES = 64
CPU = "cpu"
NAME = re.compile(r"(cuda|numpy):(\d{1,3})")
KINDS = "cpu, or cuda:N for GPU N (numpy:N: the GPU's way through host memory, for tests)"

# uint8, one- or two-dimensional, exported by DLPack: a cupy.ndarray or a numpy.ndarray.
DeviceArray = Any


class DeviceError(SlabError):
    """There is no such device, or what it takes to use it is not installed; one sentence with what to do."""


class CopyStream(Protocol):
    """Copies in order, on their own: they need not be over before `wait` has returned."""

    def copy(self, target: int, source: int, size: int) -> None:
        """`size` bytes from address to address; each may lie on any device, or in pinned host memory."""

    def wait(self) -> None:
        """Until all copies are done."""


class ArrayModule(Protocol):
    """What is asked of an array library and its runtime. Addresses are integers, sizes bytes.

    Everything may be called from any thread. Where the runtime refuses: DeviceError.
    """

    kind: str

    def count(self) -> int:
        """Devices that this process sees."""

    def name(self, device: int) -> str:
        """What the maker calls it."""

    def bus_id(self, device: int) -> str:
        """The same in every process of this host, whatever number the device has there."""

    def memory(self, device: int) -> tuple[int, int]:
        """Bytes (free, in all)."""

    def allocate(self, device: int, size: int) -> int:
        """One allocation of its own, which can be exported."""

    def free(self, device: int, address: int) -> None: ...

    def export(self, device: int, address: int) -> bytes:
        """HANDLE_BYTES that lead another process to the base of the allocation."""

    def open(self, device: int, handle: bytes, size: int) -> int:
        """The base of another process's allocation. A process cannot open what it exported itself."""

    def close(self, device: int, address: int) -> None:
        """End what `open` began; nothing may use the memory any more."""

    def array(self, device: int, address: int, size: int) -> DeviceArray:
        """uint8 [size] over memory that was allocated or opened here; it owns nothing."""

    def pinned(self, size: int) -> npt.NDArray[np.uint8]:
        """uint8 [size] in host memory that the device copies from and to by itself."""

    def stream(self, device: int) -> CopyStream: ...

    def reaches(self, device: int, peer: int) -> bool:
        """Copies between the two devices go directly, not by way of the host."""


@dataclass(frozen=True)
class Device:
    """One device of a module."""

    module: ArrayModule
    index: int

    def __str__(self) -> str:
        return f"{self.module.kind}:{self.index}"

    @property
    def bus_id(self) -> str:
        return self.module.bus_id(self.index)


def valid_name(name: str) -> bool:
    return name == CPU or NAME.fullmatch(name) is not None


def open_device(name: str) -> Device | None:
    """The device of this name, None for "cpu". Raises DeviceError."""
    match = NAME.fullmatch(name)
    if name == CPU:
        return None
    if match is None:
        raise DeviceError(f"device is {name}; it must be {KINDS}")
    device = Device(_module(match[1]), int(match[2]))
    count = device.module.count()
    if device.index >= count:
        raise DeviceError(f"there is no {name}: this process sees {count} such devices, counted from 0")
    return device


def _module(kind: str) -> ArrayModule:
    if kind == "numpy":
        from headway.slab.numpy_device import NumpyModule

        return NumpyModule()
    try:
        from headway.slab.cupy_device import CupyModule
    except ImportError as error:
        raise DeviceError(
            f"a slab on a GPU needs CuPy ({error}): pip install 'headway[cuda13]', or 'headway[cuda12]' on CUDA 12"
        ) from None
    return CupyModule()


class DeviceSegment:
    """The owner's side of a slab: `size` bytes on a device. `handle` leads other processes there.

    The memory goes when this process ends, whoever still has it open: what they read then is undefined.
    """

    def __init__(self, device: Device, size: int) -> None:
        """Raises SlabError when the device has not so much memory free."""
        self.device = device
        self.size = size
        module, index = device.module, device.index
        free, total = module.memory(index)
        if size > free:
            raise SlabError(
                f"the slab of {size} bytes does not fit: {device} has {free} of {total} bytes free; "
                "make slab_bytes smaller"
            )
        try:
            self.address = module.allocate(index, size)
        except DeviceError as error:
            raise SlabError(f"the slab of {size} bytes does not fit on {device} ({error})") from None
        self.handle = module.export(index, self.address)

    @property
    def left(self) -> int:
        """Bytes free on the device beside the slab: for weights, activations and the runtime."""
        return self.device.module.memory(self.device.index)[0]

    def remove(self) -> None:
        """Nobody may have it open any more."""
        self.device.module.free(self.device.index, self.address)


class DeviceMapping:
    """A worker's side of a slab: the allocation behind a handle, open until `close`."""

    def __init__(self, device: Device, handle: bytes, size: int) -> None:
        """Raises DeviceError when the handle leads nowhere, e.g. because its owner is gone."""
        if len(handle) != HANDLE_BYTES:
            raise DeviceError(f"a handle has {HANDLE_BYTES} bytes, this one has {len(handle)}")
        self.device = device
        self.size = size
        self.address = device.module.open(device.index, handle, size)

    def view(self, slots: int, stride: int) -> DeviceArray:
        """uint8 [slots, stride] from the base on, without a copy; not to be used after `close`."""
        array = self.device.module.array(self.device.index, self.address, slots * stride)
        return array.reshape(slots, stride)

    def close(self) -> None:
        self.device.module.close(self.device.index, self.address)
