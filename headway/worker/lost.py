"""What ends a worker on a device: the kvstore whose memory it has open went away, or the device itself broke."""

from __future__ import annotations

import os
from collections.abc import Iterable

import grpc

from headway.engine.contract import DeviceLost
from headway.runtime.errors import HeadwayError


class StoreLost(HeadwayError):
    """The kvstore went, and with it the device memory that this worker had open: the process has to end."""

    exit_status = os.EX_TEMPFAIL


def check_device(results: Iterable[object]) -> None:
    """Raises HeadwayError when a forward's results say that no later one can succeed."""
    for result in results:
        if isinstance(result, DeviceLost):
            raise HeadwayError(grpc.StatusCode.INTERNAL, str(result))
