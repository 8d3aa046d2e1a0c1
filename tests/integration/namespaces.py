"""A network namespace for each node where root may make them, joined by a bridge; loopback elsewhere."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

from headway.fleet import Place


def _ip(*arguments: str) -> None:
    subprocess.run(["ip", *arguments], check=True, capture_output=True)


def _can() -> bool:
    """Whether bridges and namespaces can be made: tried, because containers often forbid it to root."""
    if os.geteuid():
        return False
    name = f"hwt{os.getpid()}"
    try:
        _ip("link", "add", name, "type", "bridge")
        _ip("link", "del", name)
        _ip("netns", "add", name)
        _ip("netns", "del", name)
    except (OSError, subprocess.CalledProcessError):
        return False
    return True


@contextmanager
def places_of(nodes: int) -> Iterator[list[Place]]:
    """Of each node; empty where there are no namespaces. What runs there reaches the others, and this process them."""
    if not _can():
        yield []
        return
    # Of 198.18.0.0/15, which is for tests, by process: several runs at once keep apart.
    net = f"198.{18 + os.getpid() // 256 % 2}.{os.getpid() % 256}"
    bridge = f"hwb{os.getpid()}"
    with ExitStack() as stack:
        _ip("link", "add", bridge, "type", "bridge")
        stack.callback(_ip, "link", "del", bridge)
        _ip("addr", "add", f"{net}.1/24", "dev", bridge)
        _ip("link", "set", bridge, "up")
        yield [
            stack.enter_context(_namespace(f"hw{os.getpid()}n{at}", bridge, f"{net}.{at + 2}")) for at in range(nodes)
        ]


@contextmanager
def _namespace(name: str, bridge: str, address: str) -> Iterator[Place]:
    """With one interface beside loopback."""
    _ip("netns", "add", name)
    try:
        _ip("link", "add", name, "type", "veth", "peer", "name", "eth0", "netns", name)
        _ip("link", "set", name, "master", bridge, "up")
        for arguments in (("addr", "add", f"{address}/24", "dev", "eth0"), ("link", "set", "eth0", "up")):
            _ip("-n", name, *arguments)
        _ip("-n", name, "link", "set", "lo", "up")
        yield Place(address, ("nsenter", f"--net=/run/netns/{name}", "--"))
    finally:
        # Its interface goes with it.
        _ip("netns", "del", name)
