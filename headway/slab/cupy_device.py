"""The array module of a GPU: CuPy, and through it the CUDA runtime. The only file that imports CuPy.

Memory is one `cudaMalloc` of its own: what CuPy's pools, managed memory or cudaMallocAsync give cannot be exported.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import cupy
import numpy as np
import numpy.typing as npt
from cupy.cuda import runtime

from headway.slab.device import CopyStream, DeviceArray, DeviceError


class CupyModule:
    """See `headway.slab.device.ArrayModule`."""

    kind = "cuda"

    def count(self) -> int:
        with _refused("no GPU can be used"):
            return int(runtime.getDeviceCount())

    def name(self, device: int) -> str:
        with _refused(f"cuda:{device} cannot be asked"):
            return str(runtime.getDeviceProperties(device)["name"].decode())

    def bus_id(self, device: int) -> str:
        with _refused(f"cuda:{device} cannot be asked"):
            return str(runtime.deviceGetPCIBusId(device))

    def memory(self, device: int) -> tuple[int, int]:
        with _refused(f"cuda:{device} cannot be asked"), cupy.cuda.Device(device):
            free, total = runtime.memGetInfo()
        return int(free), int(total)

    def allocate(self, device: int, size: int) -> int:
        with _refused(f"{size} bytes cannot be allocated"), cupy.cuda.Device(device):
            return int(runtime.malloc(size))

    def free(self, device: int, address: int) -> None:
        with _refused("memory cannot be freed"), cupy.cuda.Device(device):
            runtime.free(address)

    def export(self, device: int, address: int) -> bytes:
        with _refused("memory cannot be exported"), cupy.cuda.Device(device):
            return bytes(runtime.ipcGetMemHandle(address))

    def open(self, device: int, handle: bytes, size: int) -> int:
        with _refused("the slab's handle cannot be opened"), cupy.cuda.Device(device):
            return int(runtime.ipcOpenMemHandle(handle))

    def close(self, device: int, address: int) -> None:
        with _refused("the slab's handle cannot be closed"), cupy.cuda.Device(device):
            runtime.ipcCloseMemHandle(address)

    def array(self, device: int, address: int, size: int) -> DeviceArray:
        memory = cupy.cuda.UnownedMemory(address, size, self, device)
        with cupy.cuda.Device(device):
            return cupy.ndarray((size,), np.uint8, memptr=cupy.cuda.MemoryPointer(memory, 0))

    def pinned(self, size: int) -> npt.NDArray[np.uint8]:
        with _refused(f"{size} bytes of host memory cannot be pinned"):
            return np.frombuffer(cupy.cuda.alloc_pinned_memory(size), np.uint8, size)

    def stream(self, device: int) -> CopyStream:
        with _refused("a stream cannot be made"), cupy.cuda.Device(device):
            return CupyStream(device)

    def reaches(self, device: int, peer: int) -> bool:
        with _refused(f"cuda:{device} cannot be asked"):
            return device == peer or bool(runtime.deviceCanAccessPeer(device, peer))


class CupyStream:
    """A stream that does not wait for the default one. memcpyDefault: the addresses tell which way a copy goes."""

    def __init__(self, device: int) -> None:
        self._device = device
        self._stream = cupy.cuda.Stream(non_blocking=True)

    def copy(self, target: int, source: int, size: int) -> None:
        with _refused("a copy cannot be started"), cupy.cuda.Device(self._device):
            runtime.memcpyAsync(target, source, size, runtime.memcpyDefault, self._stream.ptr)

    def wait(self) -> None:
        with _refused("a copy failed"):
            self._stream.synchronize()


@contextmanager
def _refused(what: str) -> Iterator[None]:
    """What the CUDA runtime refuses, as DeviceError."""
    try:
        yield
    except runtime.CUDARuntimeError as error:
        raise DeviceError(f"{what}: {error}") from None
