"""What a request waits for."""

from __future__ import annotations

import asyncio
import random
import time

import uvloop

from services.router.inbox import Inbox


def test_a_timer_never_pokes_before_its_time() -> None:
    """uvloop's own come up to two milliseconds early; a request that looks at the clock then would sleep on."""

    async def early(seconds: float) -> float:
        inbox, until_s = Inbox(1), time.monotonic() + seconds
        inbox.poke_after(seconds)
        await inbox.take()
        return until_s - time.monotonic()

    async def worst() -> float:
        draw = random.Random(0)
        return max(await asyncio.gather(*(early(draw.uniform(0.0, 0.05)) for _ in range(200))))

    assert uvloop.run(worst()) <= 0.0
