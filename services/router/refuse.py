"""What a client is told when no worker can take its request."""

from __future__ import annotations

from collections.abc import Sequence

import grpc

from headway.core.ask import Option, Why
from headway.runtime.errors import HeadwayError

# Workers whose reasons are told: more would not fit into a status.
NAMED = 3


def check_hopeless(options: Sequence[Option]) -> None:
    """Raise where waiting for a worker to come back is of no use: overload, or a prompt that fits nowhere."""
    kinds = {option.refused.why for option in options if option.refused}
    waits = [option.refused.retry_s for option in options if option.refused and option.refused.retry_s]
    if Why.LATE in kinds or Why.BUSY in kinds:
        what = "cannot come in time" if Why.LATE in kinds else "finds the queues of the workers full"
        retry_s = min(waits, default=1.0)
        message = f"the first token {what} ({_reasons(options)}); try again in {retry_s:.1f} s"
        raise HeadwayError(grpc.StatusCode.RESOURCE_EXHAUSTED, message, retry_after_s=retry_s)
    if Why.SMALL in kinds and Why.AWAY not in kinds:
        message = f"the prompt does not fit ({_reasons(options)}); shorten it, or give the kvstore a larger slab"
        raise HeadwayError(grpc.StatusCode.RESOURCE_EXHAUSTED, message)


def nobody(options: Sequence[Option]) -> HeadwayError:
    """UNAVAILABLE, with the reason of every option."""
    reasons = f" ({_reasons(options)})" if options else ""
    message = f"no worker can serve this request{reasons}; try again later"
    return HeadwayError(grpc.StatusCode.UNAVAILABLE, message, retry_after_s=1.0)


def _reasons(options: Sequence[Option]) -> str:
    refused = [f"{option.worker}: {option.refused.sentence}" for option in options if option.refused]
    more = f"; and {len(refused) - NAMED} more" if len(refused) > NAMED else ""
    return "; ".join(refused[:NAMED]) + more
