"""An owner of a slab and the processes that have it open, as kvstore and workers are; they talk over a pipe."""

from __future__ import annotations

import contextlib
import multiprocessing
import traceback
from collections.abc import Callable, Iterator
from multiprocessing.connection import Connection
from typing import Any

from headway.slab.device import Device, DeviceMapping, DeviceSegment, open_device

WAIT_S = 300.0
Work = Callable[..., None]


class ChildError(Exception):
    """The other process failed; its traceback."""


class Child:
    """The owner's end of the pipe."""

    def __init__(self, connection: Connection) -> None:
        self._connection = connection

    def tell(self, message: object) -> None:
        self._connection.send(message)

    def hear(self) -> Any:
        """Raises ChildError when the other process failed, ended or says nothing for WAIT_S."""
        try:
            if not self._connection.poll(WAIT_S):
                raise ChildError(f"no answer in {WAIT_S:g} s")
            kind, value = self._connection.recv()
        except (EOFError, ConnectionError):
            raise ChildError("the process ended without an answer") from None
        if kind == "error":
            raise ChildError(value)
        return value


def device_of(name: str) -> Device:
    """Raises DeviceError."""
    device = open_device(name)
    assert device is not None
    return device


def torch_name(device: Device) -> str:
    """What torch calls it; the stand-in's memory is the CPU's."""
    return str(device) if device.module.kind == "cuda" else "cpu"


@contextlib.contextmanager
def child(work: Work, segment: DeviceSegment, *arguments: object) -> Iterator[Child]:
    """A process that runs work(talk, mapping, *arguments), where `talk` is its end of the pipe."""
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    known = (str(segment.device), segment.handle, segment.size)
    process = context.Process(target=_run, args=(work, theirs, known, arguments), daemon=True)
    process.start()
    theirs.close()
    try:
        yield Child(ours)
    finally:
        ours.close()
        process.join(10)
        process.kill()
        process.join()


class Talk:
    """The child's end of the pipe."""

    def __init__(self, connection: Connection) -> None:
        self._connection = connection

    def answer(self, value: object) -> None:
        self._connection.send(("answer", value))

    def asked(self) -> Any:
        """EOFError when the owner is done."""
        return self._connection.recv()


def _run(work: Work, connection: Connection, known: tuple[str, bytes, int], arguments: tuple[object, ...]) -> None:
    try:
        name, handle, size = known
        mapping = DeviceMapping(device_of(name), handle, size)
        work(Talk(connection), mapping, *arguments)
        mapping.close()
    except EOFError:
        return
    except BaseException:
        with contextlib.suppress(OSError):
            connection.send(("error", traceback.format_exc(limit=-6)))
