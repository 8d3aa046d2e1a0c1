"""Clients that leave, deadlines that pass, a kvstore that is killed: every lease and slot comes back."""

from __future__ import annotations

import asyncio
import random
import time

import grpc
import pytest

from headway.fleet import Fleet
from headway.v1 import router_pb2
from tests.support import Stub, expected, generate, request, settled, sim_spec

SPEC = sim_spec(1, 1, 16 << 20, "--sim-prefill", "0.03,0,0", "--sim-step", "0.01,0,0")
APART = router_pb2.PlacementHint(force_apart=True)


@pytest.mark.parametrize("tokens", [0, 1, 2, 7])
async def test_a_client_that_leaves_takes_nothing_with_it(fleet: Fleet, stub: Stub, tokens: int) -> None:
    others = [asyncio.create_task(generate(stub, request([seed] * 50, 40))) for seed in range(3)]
    call = stub.Generate(request([tokens] * 100, 200, placement=APART))
    seen = 0
    async for response in call:
        seen += len(response.delta.tokens)
        if seen >= tokens:
            break
    call.cancel()
    for seed, other in enumerate(await asyncio.gather(*others)):
        assert other.tokens == expected([seed] * 50, 40)
    await settled(fleet.address_of("kvstore"))


@pytest.mark.parametrize("deadline_s", [0.01, 0.1, 0.3])
async def test_a_deadline_ends_the_request_and_frees_it(fleet: Fleet, stub: Stub, deadline_s: float) -> None:
    out = await generate(stub, request([3] * 100, 500, deadline_s=deadline_s))
    assert out.code == grpc.StatusCode.DEADLINE_EXCEEDED
    assert out.seconds < deadline_s + 1
    assert out.tokens == expected([3] * 100, 500)[: len(out.tokens)]
    await settled(fleet.address_of("kvstore"))


async def test_deadlines_that_end_while_the_first_message_leaves(fleet: Fleet, stub: Stub) -> None:
    """The status follows, whatever the message is doing."""
    rng = random.Random(1)
    for _ in range(50):
        deadlines = [rng.uniform(0.0005, 0.01) for _ in range(4)]
        outs = await asyncio.gather(
            *(generate(stub, request([3] * 100, 500, deadline_s=seconds), timeout=10) for seconds in deadlines)
        )
        assert max(out.seconds for out in outs) < 2
    await settled(fleet.address_of("kvstore"))


async def test_the_grpc_deadline_counts_too(fleet: Fleet, stub: Stub) -> None:
    out = await generate(stub, request([4] * 100, 500), timeout=0.2)
    assert out.code == grpc.StatusCode.DEADLINE_EXCEEDED
    await settled(fleet.address_of("kvstore"))


async def test_the_fleet_serves_again_after_its_kvstore_was_killed(fleet: Fleet, stub: Stub) -> None:
    async def kill(tokens: int) -> None:
        if tokens == 5:
            fleet.kill("kvstore")

    out = await generate(stub, request([5] * 100, 100), kill)
    assert out.code == grpc.StatusCode.UNAVAILABLE
    assert out.longest_gap_s < 2.5
    assert out.tokens == expected([5] * 100, 100)[: len(out.tokens)]
    await asyncio.to_thread(fleet.restart, "kvstore")
    await asyncio.to_thread(fleet.wait_ready, 30)
    again = await generate(stub, request([5] * 100, 100))
    assert (again.code, again.tokens) == (grpc.StatusCode.OK, expected([5] * 100, 100))
    await settled(fleet.address_of("kvstore"))


async def test_a_kvstore_that_comes_back_in_time_costs_only_a_replay(fleet: Fleet, stub: Stub) -> None:
    took_s = 0.0

    async def restart(tokens: int) -> None:
        nonlocal took_s
        if tokens == 5:
            fleet.kill("kvstore")
            started = time.monotonic()
            await asyncio.to_thread(fleet.restart, "kvstore")
            took_s = time.monotonic() - started

    for _ in range(5):
        out = await generate(stub, request([6] * 100, 100), restart)
        await asyncio.to_thread(fleet.wait_ready, 30)
        # The router waits for 1.5 s, in which workers have to attach, too: a busy box may not make it.
        if took_s < 0.7 or out.code is grpc.StatusCode.OK:
            break
    assert (out.code, out.tokens) == (grpc.StatusCode.OK, expected([6] * 100, 100))
    assert out.finished.replays > 0
    await settled(fleet.address_of("kvstore"))
