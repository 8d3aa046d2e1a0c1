"""Client channels between services: keepalive that notices a stopped peer, limits as at the servers."""

from __future__ import annotations

import grpc

from headway.runtime.server import MAX_MESSAGE_BYTES

# Metadata of a Run call: which router it is from.
ROUTER_ID = "headway-router-id"
OPTIONS: list[tuple[str, int]] = [
    ("grpc.max_receive_message_length", MAX_MESSAGE_BYTES),
    ("grpc.max_send_message_length", MAX_MESSAGE_BYTES),
    ("grpc.keepalive_time_ms", 2000),
    ("grpc.keepalive_timeout_ms", 2000),
    ("grpc.keepalive_permit_without_calls", 1),
    ("grpc.http2.max_pings_without_data", 0),
    ("grpc.initial_reconnect_backoff_ms", 100),
    ("grpc.min_reconnect_backoff_ms", 100),
    ("grpc.max_reconnect_backoff_ms", 500),
    ("grpc.use_local_subchannel_pool", 1),
]


def open_channel(address: str) -> grpc.aio.Channel:
    """A channel to "host:port" of another service."""
    return grpc.aio.insecure_channel(address, options=OPTIONS)
