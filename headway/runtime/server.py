"""What every server does alike: options, health, reflection, ready notice, signals and drain."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import os
import signal
import socket
import sys
from collections.abc import Awaitable, Callable, Sequence

import grpc
import uvloop
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection

from headway.runtime.errors import HeadwayError

MAX_MESSAGE_BYTES = 16 << 20

# so_reuseport=0: otherwise two processes share a port silently. Keepalive: a hung peer is noticed.
OPTIONS: list[tuple[str, int]] = [
    ("grpc.so_reuseport", 0),
    ("grpc.max_receive_message_length", MAX_MESSAGE_BYTES),
    ("grpc.max_send_message_length", MAX_MESSAGE_BYTES),
    ("grpc.keepalive_time_ms", 2000),
    ("grpc.keepalive_timeout_ms", 2000),
    ("grpc.keepalive_permit_without_calls", 1),
    ("grpc.http2.max_pings_without_data", 0),
    ("grpc.http2.min_recv_ping_interval_without_data_ms", 500),
    ("grpc.http2.max_ping_strikes", 0),
]


class GrpcServer:
    """A grpc.aio server on one address with standard health and reflection.

    Order: listen, add servicers, start, set_serving.
    """

    def __init__(self, services: Sequence[str]) -> None:
        self.server = grpc.aio.server(options=OPTIONS)
        self.health = health.aio.HealthServicer()
        self._services = ["", *services]
        health_pb2_grpc.add_HealthServicer_to_server(self.health, self.server)
        names = (*services, health.SERVICE_NAME, reflection.SERVICE_NAME)
        reflection.enable_server_reflection(names, self.server)

    def listen(self, host: str, port: int) -> int:
        """Take the port (the kernel chooses when `port` is 0) and return it. Raises HeadwayError if it is in use."""
        try:
            bound = self.server.add_insecure_port(f"{host}:{port}")
        except RuntimeError:
            bound = 0
        if not bound:
            message = f"cannot listen on {host}:{port}: the port is in use or not allowed; choose another with --port"
            raise HeadwayError(grpc.StatusCode.UNAVAILABLE, message)
        return bound

    async def start(self) -> None:
        """Answer RPCs; health says NOT_SERVING until `set_serving`."""
        await self.set_serving(False)
        await self.server.start()

    async def set_serving(self, serving: bool) -> None:
        status = health_pb2.HealthCheckResponse
        value = status.SERVING if serving else status.NOT_SERVING
        for name in self._services:
            await self.health.set(name, value)

    async def stop(self, grace_s: float) -> None:
        await self.health.enter_graceful_shutdown()
        await self.server.stop(grace_s)


def notify(state: str) -> None:
    """Tell systemd (or whoever set NOTIFY_SOCKET) e.g. "READY=1"; nothing happens without one."""
    path = os.environ.get("NOTIFY_SOCKET")
    if not path:
        return
    address = "\0" + path[1:] if path.startswith("@") else path
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as channel, contextlib.suppress(OSError):
        channel.connect(address)
        channel.sendall(state.encode())


def stop_event() -> asyncio.Event:
    """An event that SIGTERM and SIGINT set."""
    event = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, event.set)
    return event


def run_service(program: str, main: Callable[[], Awaitable[None]]) -> None:
    """Run `main` on uvloop; a HeadwayError becomes one line on stderr and its exit status."""

    async def guarded() -> int:
        status = 0
        try:
            await main()
        except* HeadwayError as group:
            error = group.exceptions[0]
            print(f"{program}: {error}", file=sys.stderr)
            status = error.exit_status if isinstance(error, HeadwayError) else 1
        return status

    # Nearly all is freed by counting; a collector that looks often only holds up the event loop.
    gc.freeze()
    gc.set_threshold(20_000, 20, 20)
    sys.exit(uvloop.run(guarded()))
