"""A TCP relay that spoils what the source sends, once, when it was told to; and a way to cut what takes no relay."""

from __future__ import annotations

import contextlib
import ctypes
import enum
import errno
import os
import socket
import struct
import threading
from pathlib import Path

PIDFD_GETFD = 438


class Fault(enum.Enum):
    RESET = "the connection is reset"
    STALL = "nothing comes any more"
    TRUNCATE = "the stream ends"
    FLIP = "one bit is flipped"
    SLOW = "bytes trickle"


class Relay:
    """Passes connections at `host`:`port` on to 127.0.0.1:`target`. After `arm`, one of them is struck."""

    def __init__(self, target: int, host: str = "127.0.0.1", port: int = 0) -> None:
        self._target = target
        self._listener = socket.create_server((host, port))
        self.port = self._listener.getsockname()[1]
        self._threads: list[threading.Thread] = []
        self._closed = threading.Event()
        self._sockets: list[socket.socket] = []
        self._fault: Fault | None = None
        self._left = 0
        self.struck = False
        # What stalls goes on.
        self.resumed = threading.Event()
        # Bytes from the source.
        self.passed = 0
        self._accepting = threading.Thread(target=self._accept, daemon=True)
        self._accepting.start()

    def arm(self, fault: Fault, after: int) -> None:
        """Strike when so many more bytes have come from the source."""
        self._left, self._fault = after, fault

    def cut(self) -> None:
        """End all connections that are open now."""
        for connection in self._sockets:
            _shut(connection)

    def close(self) -> None:
        self._closed.set()
        self.resumed.set()
        _shut(self._listener)
        # It may have a connection in its hands that is not in the list yet.
        self._accepting.join(30)
        self._listener.close()
        self.cut()
        for thread in self._threads:
            thread.join(5)
        for connection in self._sockets:
            connection.close()

    def _accept(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                reader, _ = self._listener.accept()
                try:
                    source = socket.create_connection(("127.0.0.1", self._target))
                except OSError:
                    reader.close()
                    continue
                self._sockets += [reader, source]
                for connection in (reader, source):
                    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                for job, pair in ((self._pass, (reader, source)), (self._spoil, (source, reader))):
                    self._threads.append(threading.Thread(target=job, args=pair, daemon=True))
                    self._threads[-1].start()

    def _pass(self, origin: socket.socket, target: socket.socket) -> None:
        with contextlib.suppress(OSError):
            while data := origin.recv(65536):
                target.sendall(data)
        _shut(target)

    def _spoil(self, origin: socket.socket, target: socket.socket) -> None:
        with contextlib.suppress(OSError):
            while data := origin.recv(16384):
                self.passed += len(data)
                if self._fault is not None:
                    self._left -= len(data)
                    if self._left < 0:
                        fault, self._fault, self.struck = self._fault, None, True
                        data = self._strike(fault, bytearray(data), target)
                target.sendall(data)
        _shut(target)

    def _strike(self, fault: Fault, data: bytearray, target: socket.socket) -> bytes:
        if fault is Fault.FLIP:
            data[len(data) // 2] ^= 4
        elif fault is Fault.RESET:
            target.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            target.close()
        elif fault is Fault.TRUNCATE:
            target.sendall(data[: len(data) // 2])
            _shut(target)
        elif fault is Fault.STALL:
            self.resumed.wait(30)
        else:
            while data and not self._closed.wait(0.2):
                target.sendall(data[:1])
                del data[:1]
        return bytes(data)


def _shut(connection: socket.socket) -> None:
    with contextlib.suppress(OSError):
        connection.shutdown(socket.SHUT_RDWR)


def cut_connections(pid: int, other: int) -> int:
    """Shut down the TCP connections that lead straight from one of our processes to another (or itself); how many.

    Raises OSError where the kernel does not hand out the sockets of children.
    """
    with contextlib.ExitStack() as stack:
        mine, theirs = ([stack.enter_context(found) for found in _sockets(whose)] for whose in (pid, other))
        there = {found.getsockname() for found in theirs}
        cut = [found for found in mine if _peer(found) in there]
        for connection in cut:
            _shut(connection)
    return len(cut)


def listens_at(pid: int) -> set[str]:
    """The addresses at which one of our processes accepts TCP connections. Raises as `cut_connections`."""
    with contextlib.ExitStack() as stack:
        found = [stack.enter_context(one) for one in _sockets(pid)]
        return {one.getsockname()[0] for one in found if one.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN)}


def _sockets(pid: int) -> list[socket.socket]:
    """Duplicates of a process's TCP sockets."""
    process = os.pidfd_open(pid)
    found = []
    for entry in list(Path(f"/proc/{pid}/fd").iterdir()):
        with contextlib.suppress(FileNotFoundError):
            if not os.readlink(entry).startswith("socket:"):
                continue
        copy = ctypes.CDLL(None, use_errno=True).syscall(PIDFD_GETFD, process, int(entry.name), 0)
        if copy < 0:
            if ctypes.get_errno() == errno.EBADF:
                continue
            raise OSError(ctypes.get_errno(), "pidfd_getfd")
        one = socket.socket(fileno=copy)
        if one.family in (socket.AF_INET, socket.AF_INET6) and one.type == socket.SOCK_STREAM:
            found.append(one)
        else:
            one.close()
    os.close(process)
    return found


def _peer(connection: socket.socket) -> tuple[str, int] | None:
    with contextlib.suppress(OSError):
        peer: tuple[str, int] = connection.getpeername()
        return peer
    return None
