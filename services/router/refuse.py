"""What a client is told when no worker can take its request."""

from __future__ import annotations

from collections.abc import Sequence

import grpc

from headway.core.place import Option, Why
from headway.runtime.errors import HeadwayError


def check_hopeless(options: Sequence[Option]) -> None:
    """Raise where waiting for a worker to come back is of no use: overload, or a prompt that fits nowhere."""
    kinds = {option.refused.why for option in options if option.refused}
    if Why.BUSY in kinds:
        message = f"the queues of the workers are full ({_reasons(options)}); try again later"
        raise HeadwayError(grpc.StatusCode.RESOURCE_EXHAUSTED, message, retry_after_s=1.0)
    if Why.SMALL in kinds and Why.AWAY not in kinds:
        message = f"the prompt does not fit ({_reasons(options)}); shorten it, or give the kvstore a larger slab"
        raise HeadwayError(grpc.StatusCode.RESOURCE_EXHAUSTED, message)


def nobody(options: Sequence[Option]) -> HeadwayError:
    """UNAVAILABLE, with the reason of every option."""
    reasons = f" ({_reasons(options)})" if options else ""
    message = f"no worker can serve this request{reasons}; try again later"
    return HeadwayError(grpc.StatusCode.UNAVAILABLE, message, retry_after_s=1.0)


def _reasons(options: Sequence[Option]) -> str:
    return "; ".join(
        f"{option.prefill_worker or option.decode_worker}: {option.refused.sentence}"
        for option in options
        if option.refused
    )
