"""The array module without a GPU: a "device" is shared host memory, and a handle is a way to another process's memfd.

It is as strict as a GPU may be: memory goes with the process that allocated it, a process cannot open its own handle,
and a copy takes place only when its stream is waited for, so that a missing wait shows as wrong bytes.
"""

from __future__ import annotations

import ctypes
import mmap
import os
import threading

import numpy as np
import numpy.typing as npt

from headway.slab.device import HANDLE_BYTES, CopyStream, DeviceArray, DeviceError
from headway.slab.host import available_memory, total_memory

DEVICES = 2


class NumpyModule:
    """See `headway.slab.device.ArrayModule`."""

    kind = "numpy"

    def __init__(self) -> None:
        # By address: the mapped bytes, and the memfd where it was allocated here.
        self._mapped: dict[int, tuple[npt.NDArray[np.uint8], int | None]] = {}

    def count(self) -> int:
        return DEVICES

    def name(self, device: int) -> str:
        return "host memory"

    def bus_id(self, device: int) -> str:
        return f"host:{device}"

    def memory(self, device: int) -> tuple[int, int]:
        return available_memory(), total_memory()

    def allocate(self, device: int, size: int) -> int:
        descriptor = os.memfd_create("headway-device", os.MFD_CLOEXEC)
        try:
            os.posix_fallocate(descriptor, 0, size)
        except OSError as error:
            os.close(descriptor)
            raise DeviceError(f"{size} bytes cannot be allocated: {error.strerror}") from None
        return self._map(descriptor, size, descriptor)

    def free(self, device: int, address: int) -> None:
        _, descriptor = self._mapped.pop(address)
        if descriptor is not None:
            os.close(descriptor)

    def export(self, device: int, address: int) -> bytes:
        return f"{os.getpid()}/{self._mapped[address][1]}".encode().ljust(HANDLE_BYTES, b"\0")

    def open(self, device: int, handle: bytes, size: int) -> int:
        pid, _, number = handle.rstrip(b"\0").decode().partition("/")
        if pid == str(os.getpid()):
            raise DeviceError("the slab's handle cannot be opened: this process exported it itself")
        try:
            descriptor = os.open(f"/proc/{pid}/fd/{number}", os.O_RDWR | os.O_CLOEXEC)
        except OSError as error:
            raise DeviceError(f"the slab's handle cannot be opened: {error.strerror}") from None
        try:
            return self._map(descriptor, size, None)
        finally:
            os.close(descriptor)

    def close(self, device: int, address: int) -> None:
        del self._mapped[address]

    def array(self, device: int, address: int, size: int) -> DeviceArray:
        return self._mapped[address][0][:size]

    def pinned(self, size: int) -> npt.NDArray[np.uint8]:
        return np.zeros(size, np.uint8)

    def stream(self, device: int) -> CopyStream:
        return LateStream()

    def reaches(self, device: int, peer: int) -> bool:
        return True

    def _map(self, descriptor: int, size: int, kept: int | None) -> int:
        memory = np.frombuffer(mmap.mmap(descriptor, size), np.uint8)
        address: int = memory.ctypes.data
        self._mapped[address] = (memory, kept)
        return address


class LateStream:
    """Copies as late as a GPU may make them: in `wait`."""

    def __init__(self) -> None:
        self._copies: list[tuple[int, int, int]] = []
        self._lock = threading.Lock()

    def copy(self, target: int, source: int, size: int) -> None:
        with self._lock:
            self._copies.append((target, source, size))

    def wait(self) -> None:
        with self._lock:
            copies, self._copies = self._copies, []
        for copy in copies:
            ctypes.memmove(*copy)
