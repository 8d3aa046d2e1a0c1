"""One incarnation of a worker at its kvstore."""

from __future__ import annotations

import asyncio
import secrets
import select
import time

from headway.v1 import kvstore_pb2 as pb

# A worker that does not read for so long is as good as gone.
MAX_REPLIES = 65536


class Session:
    """What a worker holds is accounted under its key, over breaks of the stream."""

    def __init__(self, key: str, worker_id: str) -> None:
        self.key = key
        self.worker_id = worker_id
        self.connected = True
        self.heard_s = time.monotonic()
        self.pidfd: int | None = None
        self.secret = secrets.token_bytes(32)
        self.replies: list[pb.AttachReply] = []
        self.wake = asyncio.Event()

    def put(self, reply: pb.AttachReply) -> None:
        """Send with all else of this loop tick. A session that takes none of them ends."""
        if self.connected:
            self.replies.append(reply)
            self.connected = len(self.replies) < MAX_REPLIES
            self.wake.set()

    def hang_up(self) -> None:
        """End the stream from this side."""
        self.connected = False
        self.wake.set()

    @property
    def dead(self) -> bool:
        """The process is gone (or never mapped the slab, which is as good)."""
        if self.pidfd is None:
            return True
        poll = select.poll()
        poll.register(self.pidfd, select.POLLIN)
        return bool(poll.poll(0))
