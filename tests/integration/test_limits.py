"""What workers say of their forwards is what the router predicts by."""

from __future__ import annotations

import asyncio

from headway.fleet import Fleet, FleetSpec
from tests.support import Stub, generate, request

# A token of a prompt takes 2 ms, a forward at most 64 tokens; nothing else bounds it.
SPEC = FleetSpec(
    0,
    0,
    mixed=1,
    model="sim",
    engine="sim",
    slab_bytes=16 << 20,
    worker_flags=(
        *("--sim-prefill", "0,0.002,0", "--sim-step", "0.01,0,0", "--measure-s", "0.2"),
        *("--chunk-tokens", "64", "--chunk-s", "1000", "--shared-chunk-s", "1000", "--itl-objective-s", "0"),
    ),
    flags={"router": ("--itl-objective-s", "0")},
)


async def test_a_short_prompt_is_not_refused_because_of_a_long_one_that_it_interrupts(fleet: Fleet, stub: Stub) -> None:
    long = asyncio.create_task(generate(stub, request([at % 200 for at in range(2000)], 2)))
    await asyncio.sleep(0.5)
    for number in range(3):
        short = await generate(stub, request([7 + number] * 32, 2, ttft_objective_s=1.0, refuse_late=True))
        assert short.details == ""
        assert not long.done()
    assert (await long).details == ""
