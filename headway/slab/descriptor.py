"""Fetch the way to the slab from the kvstore: secret over a unix socket; a descriptor (SCM_RIGHTS) or a handle back."""

from __future__ import annotations

import socket

from headway.slab.device import HANDLE_BYTES

TIMEOUT_S = 5.0


def fetch_descriptor(path: str, secret: bytes) -> int:
    """The descriptor that the store at unix socket `path` gives for this one-time secret. OSError when it does not."""
    with _asked(path, secret) as channel:
        _, descriptors, _, _ = socket.recv_fds(channel, 1, 1)
    if not descriptors:
        raise OSError(f"the kvstore at {path} gave no descriptor: the secret was wrong or used before")
    return descriptors[0]


def fetch_handle(path: str, secret: bytes) -> bytes:
    """The handle of a slab on a device, HANDLE_BYTES long. OSError when it is not given."""
    with _asked(path, secret) as channel:
        answer = channel.recv(1 + HANDLE_BYTES, socket.MSG_WAITALL)
    if len(answer) != 1 + HANDLE_BYTES:
        raise OSError(f"the kvstore at {path} gave no handle: the secret was wrong or used before")
    return answer[1:]


def _asked(path: str, secret: bytes) -> socket.socket:
    channel = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        channel.settimeout(TIMEOUT_S)
        channel.connect(path)
        channel.sendall(secret)
    except BaseException:
        channel.close()
        raise
    return channel
