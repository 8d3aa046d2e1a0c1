"""Both sides of raw TCP: threads that send a contiguous share each, threads that receive it in place and answer a byte.

The header of a share is 24 bytes: offset, bytes, and bytes a call.
"""

from __future__ import annotations

import socket
import struct
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from bench.transfer.sides.common import Answer, Handler, Slab, serve

HEADER = struct.Struct("<QQQ")
MOST_CONNECTIONS = 4


def start(config: dict[str, Any]) -> Handler:
    slab = Slab(config["fd"], config["slab_bytes"])
    return source(config, slab) if config["role"] == "source" else target(config, slab)


def set_buffer(link: socket.socket, option: int, size: int) -> None:
    """A fixed buffer of `size` bytes; 0 leaves the kernel to tune it."""
    if size:
        link.setsockopt(socket.SOL_SOCKET, option, size)


def target(config: dict[str, Any], slab: Slab) -> Handler:
    """Listens on loopback; of each connection one thread receives."""
    listener = socket.create_server(("127.0.0.1", 0))
    set_buffer(listener, socket.SO_RCVBUF, config["buffer"])

    flags = {"all": socket.MSG_WAITALL, "some": 0, "spin": socket.MSG_DONTWAIT}[config["wait"]]

    def receive(link: socket.socket) -> None:
        header = bytearray(HEADER.size)
        while link.recv_into(header, HEADER.size, socket.MSG_WAITALL) == HEADER.size:
            at, size, piece = HEADER.unpack(header)
            end = at + size
            while at < end:
                try:
                    at += link.recv_into(slab.view[at:end], min(piece, end - at), flags)
                except BlockingIOError:
                    continue
            link.sendall(b"\x06")

    def accept() -> None:
        while True:
            link, _ = listener.accept()
            link.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            threading.Thread(target=receive, args=(link,), daemon=True).start()

    threading.Thread(target=accept, daemon=True).start()
    return lambda question: {"port": listener.getsockname()[1]}


def source(config: dict[str, Any], slab: Slab) -> Handler:
    links = [socket.socket() for _ in range(MOST_CONNECTIONS)]
    for link in links:
        set_buffer(link, socket.SO_SNDBUF, config["buffer"])
        link.connect(("127.0.0.1", config["port"]))
        link.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    flags = socket.MSG_DONTWAIT if config["wait"] == "spin" else 0
    pool = ThreadPoolExecutor(MOST_CONNECTIONS)

    def send(link: socket.socket, at: int, end: int, piece: int) -> None:
        link.sendall(HEADER.pack(at, end - at, piece), socket.MSG_MORE)
        while at < end:
            try:
                at += link.send(slab.view[at : min(at + piece, end)], flags)
            except BlockingIOError:
                continue
        if link.recv(1) != b"\x06":
            raise ConnectionError("the target has gone")

    def move(question: dict[str, Any]) -> Answer:
        size, connections, piece = (
            question["blocks"] * config["block_bytes"],
            question["connections"],
            question["piece"],
        )
        cuts = [size * index // connections // 4096 * 4096 for index in range(connections)] + [size]
        started = time.perf_counter()
        others = [pool.submit(send, links[i], cuts[i], cuts[i + 1], piece) for i in range(1, connections)]
        send(links[0], cuts[0], cuts[1], piece)
        for other in others:
            other.result()
        return {"seconds": time.perf_counter() - started}

    return move


if __name__ == "__main__":
    serve(start)
