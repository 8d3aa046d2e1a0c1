"""The one error of the client library, decoded from the rich status that services send."""

from __future__ import annotations

from typing import Any

import grpc
from google.rpc import error_details_pb2, status_pb2

DETAILS_KEY = "grpc-status-details-bin"


class HeadwayClientError(Exception):
    """`code` and one sentence; `retry_after_s` (seconds) where the service says when to try again."""

    def __init__(self, code: grpc.StatusCode, message: str, retry_after_s: float | None = None) -> None:
        super().__init__(message)
        self.code = code
        self.message = message
        self.retry_after_s = retry_after_s

    def __str__(self) -> str:
        return f"{self.message} [{self.code.name}]"


def from_rpc(error: grpc.RpcError, address: str) -> HeadwayClientError:
    """What a failed call (blocking or aio) says; a router that cannot be reached at all gets a sentence of its own."""
    code: grpc.StatusCode = error.code()
    message: str = error.details() or code.name
    if code is grpc.StatusCode.UNAVAILABLE and "connect" in message.lower():
        return HeadwayClientError(code, f"no router answers at {address}; is it running there?")
    return HeadwayClientError(code, message, _retry_after_s(error.trailing_metadata() or ()))


def _retry_after_s(metadata: Any) -> float | None:
    for key, value in metadata:
        if key == DETAILS_KEY and isinstance(value, bytes):
            for detail in status_pb2.Status.FromString(value).details:
                info = error_details_pb2.RetryInfo()
                if detail.Unpack(info):
                    return float(info.retry_delay.seconds + info.retry_delay.nanos / 1e9)
    return None
