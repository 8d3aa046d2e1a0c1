"""The source side of the socket plane: gives blocks to whoever presents a secret; a thread a connection."""

from __future__ import annotations

import contextlib
import logging
import secrets
import socket
import threading

import grpc

from headway.runtime.errors import HeadwayError
from services.kvstore.memory import Memory
from services.kvstore.planes.frames import (
    SECRET_BYTES,
    VERDICT,
    WELCOME,
    FrameError,
    hang_up,
    read_request,
    send_all,
    set_timeouts,
)

log = logging.getLogger(__name__)

MOST_CONNECTIONS = 256
HANDSHAKE_S = 5.0
ACCEPT_PAUSE_S = 0.1


class SocketSource:
    """Listens from `start` to `close`; `port` is 0 before."""

    def __init__(self, memory: Memory, host: str, timeout_s: float) -> None:
        self._memory = memory
        self._host = host
        self._timeout_s = timeout_s
        self._listener = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
        # Secrets not yet presented: changed by the event loop, taken by threads.
        self._secrets: dict[bytes, object] = {}
        self._open: dict[socket.socket, object] = {}
        self._lock = threading.Lock()
        self._closed = threading.Event()
        self.port = 0

    def start(self, port: int) -> None:
        """Raises HeadwayError when the port is taken."""
        self._listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            self._listener.bind((self._host, port))
        except OSError as error:
            message = f"cannot listen for transfers on {self._host}:{port} ({error.strerror}); see --transfer-port"
            raise HeadwayError(grpc.StatusCode.UNAVAILABLE, message) from None
        self._listener.listen(64)
        self.port = self._listener.getsockname()[1]
        threading.Thread(target=self._accept, name="transfer-accept", daemon=True).start()

    def admit(self, owner: object) -> bytes:
        """A secret that opens one connection, which ends with `dismiss(owner)`."""
        secret = secrets.token_bytes(SECRET_BYTES)
        with self._lock:
            self._secrets[secret] = owner
        return secret

    def dismiss(self, owner: object) -> None:
        """End the owner's connections; secrets not yet used are void."""
        with self._lock:
            self._secrets = {secret: other for secret, other in self._secrets.items() if other is not owner}
            ended = [connection for connection, other in self._open.items() if other is owner]
        for connection in ended:
            hang_up(connection)

    def close(self) -> None:
        self._closed.set()
        hang_up(self._listener)
        self._listener.close()
        with self._lock:
            connections = list(self._open)
        for connection in connections:
            hang_up(connection)

    def _accept(self) -> None:
        while True:
            try:
                connection, _ = self._listener.accept()
            except OSError as error:
                if self._closed.is_set():
                    return
                # The connection is gone already, or there are no descriptors left just now.
                log.warning("event=transfer_accept_failed reason=%s", error)
                self._closed.wait(ACCEPT_PAUSE_S)
                continue
            with self._lock:
                room = len(self._open) < MOST_CONNECTIONS
                if room:
                    self._open[connection] = None
            if room:
                threading.Thread(target=self._serve, args=(connection,), name="transfer-out", daemon=True).start()
            else:
                log.warning("event=transfer_refused reason=too_many_connections")
                connection.close()

    def _serve(self, connection: socket.socket) -> None:
        try:
            with connection, contextlib.suppress(OSError):
                if self._is_welcome(connection):
                    connection.sendall(WELCOME)
                    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                    while self._answer(connection):
                        pass
        except FrameError as error:
            log.warning("event=transfer_ended reason=%s", error)
        finally:
            with self._lock:
                self._open.pop(connection, None)

    def _is_welcome(self, connection: socket.socket) -> bool:
        set_timeouts(connection, receive_s=HANDSHAKE_S, send_s=HANDSHAKE_S)
        secret = connection.recv(SECRET_BYTES, socket.MSG_WAITALL)
        with self._lock:
            owner = self._secrets.pop(secret, None)
            self._open[connection] = owner
        # Between requests a connection may be idle for long; a reader that takes nothing for so long is gone.
        set_timeouts(connection, receive_s=0, send_s=self._timeout_s)
        return owner is not None

    def _answer(self, connection: socket.socket) -> bool:
        """One request; False at the end of the stream."""
        memory = self._memory
        request = read_request(connection)
        if request is None:
            return False
        slots, checksum = request
        if not all(memory.has(slot) for slot, _ in slots):
            raise FrameError("a slot was asked for that this slab does not have")
        wanted = [slot for slot, _ in slots]
        sums = memory.checksums(wanted) if checksum else [0] * len(wanted)
        with contextlib.closing(memory.outgoing(wanted)) as pieces:
            for views in pieces:
                send_all(connection, views)
        # After the bytes were read: had a slot been given out anew before, its generation would tell.
        current = [memory.current(slot, generation) for slot, generation in slots]
        connection.sendall(b"".join(VERDICT.pack(*verdict) for verdict in zip(current, sums, strict=True)))
        return True
