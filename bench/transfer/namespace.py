"""A network namespace of this run's own: nothing that a peer listens on can be reached from outside."""

from __future__ import annotations

import ctypes
import fcntl
import os
import socket
import struct

CLONE_NEWNET = 0x40000000
SIOCGIFFLAGS, SIOCSIFFLAGS, IFF_UP = 0x8913, 0x8914, 1
INTERFACE = struct.Struct("16sH22x")


def enter() -> bool:
    """Move this process, and so all its later children, into a new namespace that has only loopback. Needs root.

    Call it before any thread or socket exists. False where the kernel does not allow it; nothing has changed then.
    """
    if ctypes.CDLL(None, use_errno=True).unshare(CLONE_NEWNET):
        return False
    with socket.socket() as any_socket:
        _, flags = INTERFACE.unpack(fcntl.ioctl(any_socket, SIOCGIFFLAGS, INTERFACE.pack(b"lo", 0)))
        fcntl.ioctl(any_socket, SIOCSIFFLAGS, INTERFACE.pack(b"lo", flags | IFF_UP))
    return True


def alone() -> bool:
    """Whether this namespace has no interface but loopback."""
    return [name for _, name in socket.if_nameindex()] == ["lo"]


def description() -> str:
    return f"own namespace, {os.uname().sysname} loopback" if alone() else "loopback of the host"
