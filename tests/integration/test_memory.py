"""A fleet's processes and its slab after ten thousand short requests: as they were after the first few."""

from __future__ import annotations

import asyncio

import pytest

from headway.fleet import Fleet
from tests.engine.test_memory import resident_bytes
from tests.support import Stub, generate, request, settled, sim_spec

SPEC = sim_spec(1, 1, 16 << 20)
WARM, REQUESTS, AT_ONCE = 2_000, 10_000, 100
# Of a process: the allocator's coming and going, and what a bounded table still fills.
GROWTH_BYTES = 16 << 20


async def serve(stub: Stub, first: int, count: int) -> None:
    for start in range(first, first + count, AT_ONCE):
        prompts = [[number % 200, number // 200, *range(20)] for number in range(start, start + AT_ONCE)]
        outs = await asyncio.gather(*(generate(stub, request(prompt, 4)) for prompt in prompts))
        assert [out.details for out in outs if len(out.tokens) != 4] == []


@pytest.mark.timeout(300)
async def test_ten_thousand_short_requests_leave_the_processes_as_they_found_them(fleet: Fleet, stub: Stub) -> None:
    await serve(stub, 0, WARM)
    await settled(fleet.address_of("kvstore"))
    before = {name: resident_bytes(str(fleet.process(name))) for name in fleet.names}
    await serve(stub, WARM, REQUESTS)
    await settled(fleet.address_of("kvstore"))
    grown = {name: resident_bytes(str(fleet.process(name))) - before[name] for name in fleet.names}
    assert max(grown.values()) < GROWTH_BYTES, grown
