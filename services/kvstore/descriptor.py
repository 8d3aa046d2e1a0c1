"""The unix socket that hands out the way to the slab against a session's one-time secret.

For memory on a device too: who writes to the slab must be a process that the kernel named, so that its death is seen.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import socket
import struct
from pathlib import Path

import grpc

from headway.runtime.errors import HeadwayError
from headway.slab.device import DeviceSegment
from services.kvstore.node import Node
from services.kvstore.session import Session

log = logging.getLogger(__name__)

SECRET_BYTES = 32
TIMEOUT_S = 5.0
ACCEPT_PAUSE_S = 0.1


class DescriptorSocket:
    """Protocol: the worker sends its 32-byte secret; back comes one byte, or EOF.

    With the byte comes the descriptor (SCM_RIGHTS); of a slab on a device, its handle follows instead.
    """

    def __init__(self, node: Node, run_dir: Path) -> None:
        self._node = node
        # Named like the segment, so that the next start removes what a killed kvstore left.
        self.path = run_dir / f"{node.config.slab_name}.sock"
        self._tasks: set[asyncio.Task[None]] = set()

    async def serve(self) -> None:
        """Until cancelled. Raises HeadwayError when the folder or the path is of no use."""
        loop = asyncio.get_running_loop()
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as listener:
            try:
                self.path.parent.mkdir(parents=True, exist_ok=True)
                self.path.unlink(missing_ok=True)
                listener.bind(str(self.path))
                self.path.chmod(0o600)
            except OSError as error:
                message = f"cannot make the socket {self.path} ({error}); choose another folder with --run-dir"
                raise HeadwayError(grpc.StatusCode.FAILED_PRECONDITION, message) from None
            listener.listen(64)
            listener.setblocking(False)
            try:
                while True:
                    try:
                        channel, _ = await loop.sock_accept(listener)
                    except OSError as error:
                        log.warning("event=accept_failed path=%s reason=%s", self.path, error)
                        await asyncio.sleep(ACCEPT_PAUSE_S)
                        continue
                    task = loop.create_task(self._hand_out(channel))
                    self._tasks.add(task)
                    task.add_done_callback(self._tasks.discard)
            finally:
                self.path.unlink(missing_ok=True)

    async def _hand_out(self, channel: socket.socket) -> None:
        loop = asyncio.get_running_loop()
        with channel, contextlib.suppress(OSError, TimeoutError):
            channel.setblocking(False)
            async with asyncio.timeout(TIMEOUT_S):
                secret = b""
                while len(secret) < SECRET_BYTES and (part := await loop.sock_recv(channel, SECRET_BYTES)):
                    secret += part
            session = self._redeem(secret)
            if session is not None:
                credentials = channel.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, struct.calcsize("3i"))
                pid, _, _ = struct.unpack("3i", credentials)
                self._node.mapped(session, pid)
                await self._send(channel)

    async def _send(self, channel: socket.socket) -> None:
        segment = self._node.segment
        if isinstance(segment, DeviceSegment):
            await asyncio.get_running_loop().sock_sendall(channel, b"\0" + segment.handle)
        else:
            socket.send_fds(channel, [b"\0"], [segment.descriptor])

    def _redeem(self, secret: bytes) -> Session | None:
        """The session of this secret, which is of no use from now on."""
        for session in self._node.sessions.values():
            if session.connected and session.secret and session.secret == secret:
                session.secret = b""
                return session
        return None
