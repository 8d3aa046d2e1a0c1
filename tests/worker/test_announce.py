"""When routers hear from a worker."""

from __future__ import annotations

import asyncio
from dataclasses import replace

import pytest

from headway.core.step import StepLimits
from headway.v1 import router_pb2
from headway.worker.announce import Announcer
from tests.worker.test_loop import Bench, sequence
from tests.worker.test_status import of_router


async def next_status(messages: object, seconds: float) -> router_pb2.WorkerStatus | None:
    """The next one, if it comes within that time."""
    try:
        async with asyncio.timeout(seconds):
            return (await anext(messages)).status  # type: ignore[call-overload, no-any-return]
    except TimeoutError:
        return None


async def test_other_routers_hear_of_a_prompt_at_once_and_its_own_need_not(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("headway.worker.announce.LEAST_S", 0.3)
    bench = Bench(StepLimits(8, 64))
    announcer = Announcer(("a:1", "b:1"), bench.loop, router_pb2.WorkerHello)
    bench.loop._on_prompt = announcer.prompt_came
    for router, name in zip(announcer._routers, "ab", strict=True):
        router.router_id = name
    streams = [announcer._messages(router) for router in announcer._routers]
    for messages in streams:
        await anext(messages)
        assert await next_status(messages, 0.1) is not None
    waiting = [asyncio.create_task(next_status(messages, 0.2)) for messages in streams]
    await asyncio.sleep(0.02)
    for number in range(3):
        bench.loop.start(replace(sequence([1] * 20), sequence_id=str(number)), of_router("a"))
    other = await waiting[1]
    assert other is not None
    assert len(other.prompts) == 3, "those that came together are told of together"
    assert await waiting[0] is None
    bench.loop.close()
