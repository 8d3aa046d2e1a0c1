"""Fetch the slab's descriptor from the kvstore: secret over a unix socket, descriptor back (SCM_RIGHTS)."""

from __future__ import annotations

import socket

TIMEOUT_S = 5.0


def fetch_descriptor(path: str, secret: bytes) -> int:
    """The descriptor that the store at unix socket `path` gives for this one-time secret. OSError when it does not."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as channel:
        channel.settimeout(TIMEOUT_S)
        channel.connect(path)
        channel.sendall(secret)
        _, descriptors, _, _ = socket.recv_fds(channel, 1, 1)
    if not descriptors:
        raise OSError(f"the kvstore at {path} gave no descriptor: the secret was wrong or used before")
    return descriptors[0]
