"""Errors that reach a user: a gRPC code and one sentence that says what to do."""

from __future__ import annotations

import grpc
from google.protobuf import duration_pb2
from google.rpc import error_details_pb2, status_pb2
from grpc_status import rpc_status


class HeadwayError(Exception):
    """One clear sentence with its gRPC status code; `retry_after_s` where trying again makes sense.

    exit_status: of a process that ends with it.
    """

    exit_status = 1

    def __init__(self, code: grpc.StatusCode, message: str, *, retry_after_s: float | None = None) -> None:
        super().__init__(message)
        self.code = code
        self.message = message
        self.retry_after_s = retry_after_s


def invalid(message: str) -> HeadwayError:
    """INVALID_ARGUMENT: the request itself must change."""
    return HeadwayError(grpc.StatusCode.INVALID_ARGUMENT, message)


def status_code(number: int) -> grpc.StatusCode:
    """The status code with this google.rpc.Code number; UNKNOWN for a number that gRPC does not know."""
    for code in grpc.StatusCode:
        if code.value[0] == number:
            return code
    return grpc.StatusCode.UNKNOWN


async def abort(context: grpc.aio.ServicerContext, error: HeadwayError) -> None:  # type: ignore[type-arg]
    """End the RPC with the error as a rich status (google.rpc.Status; RetryInfo when there is a retry hint)."""
    status = status_pb2.Status(code=error.code.value[0], message=error.message)
    if error.retry_after_s is not None:
        seconds = int(error.retry_after_s)
        delay = duration_pb2.Duration(seconds=seconds, nanos=int((error.retry_after_s - seconds) * 1e9))
        status.details.add().Pack(error_details_pb2.RetryInfo(retry_delay=delay))
    rich = rpc_status.to_status(status)
    await context.abort(rich.code, rich.details, rich.trailing_metadata)
