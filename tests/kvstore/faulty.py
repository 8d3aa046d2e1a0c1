"""A TCP proxy that spoils what the source sends, from a given byte on."""

from __future__ import annotations

import contextlib
import enum
import socket
import threading
import time


class Fault(enum.Enum):
    RESET = "the connection is reset"
    STALL = "nothing comes any more"
    TRUNCATE = "the stream ends"
    FLIP = "one bit is flipped"
    SLOW = "bytes trickle"


class FaultyProxy:
    """Listens on `port`; the first connection is spoiled once `after` bytes have passed, later ones are not."""

    def __init__(self, target: int, fault: Fault, after: int) -> None:
        self._target, self._fault, self._after = target, fault, after
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port = self._listener.getsockname()[1]
        self._sockets: list[socket.socket] = [self._listener]
        self.spoiled = False
        threading.Thread(target=self._accept, daemon=True).start()

    def close(self) -> None:
        for connection in self._sockets:
            with contextlib.suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)
            connection.close()

    def _accept(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                reader, _ = self._listener.accept()
                source = socket.create_connection(("127.0.0.1", self._target))
                self._sockets += [reader, source]
                threading.Thread(target=self._pass, args=(reader, source), daemon=True).start()
                threading.Thread(target=self._spoil, args=(source, reader), daemon=True).start()

    def _pass(self, origin: socket.socket, target: socket.socket) -> None:
        with contextlib.suppress(OSError):
            while data := origin.recv(65536):
                target.sendall(data)
            target.shutdown(socket.SHUT_WR)

    def _spoil(self, origin: socket.socket, target: socket.socket) -> None:
        passed = 0
        with contextlib.suppress(OSError):
            while data := origin.recv(4096):
                if passed + len(data) > self._after and not self.spoiled:
                    self.spoiled = True
                    data = self._strike(bytearray(data), target)
                target.sendall(data)
                passed += len(data)
            target.shutdown(socket.SHUT_WR)

    def _strike(self, data: bytearray, target: socket.socket) -> bytes:
        if self._fault is Fault.FLIP:
            data[len(data) // 2] ^= 4
        elif self._fault is Fault.RESET:
            target.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\x01\0\0\0\0\0\0\0")
            target.close()
        elif self._fault is Fault.TRUNCATE:
            target.sendall(data[:100])
            target.shutdown(socket.SHUT_RDWR)
        elif self._fault is Fault.STALL:
            time.sleep(30)
        else:
            while data:
                target.sendall(data[:1])
                del data[:1]
                time.sleep(0.2)
        return bytes(data)
