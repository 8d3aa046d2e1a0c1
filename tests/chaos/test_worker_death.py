"""kill -9, SIGSTOP and poison: a stream goes on and ends as if nothing had happened, or ends with the right status."""

from __future__ import annotations

import asyncio
from pathlib import Path

import grpc
import pytest

from headway.fleet import Fleet
from headway.runtime.channels import open_channel
from headway.v1 import router_pb2, router_pb2_grpc
from tests.support import Stub, expected, generate, request, settled, sim_spec, stats

# Slow enough that a kill lands where it is meant to: 10 ms a step, 30 ms a prefill.
SPEC = sim_spec(2, 2, 2 << 20, "--sim-prefill", "0.03,0,0", "--sim-step", "0.01,0,0")
PROMPT = list(b"The quick brown fox jumps over the lazy dog. " * 3)
HINT = router_pb2.PlacementHint(prefill_worker="prefill-0", decode_worker="decode-0", force_apart=True)


@pytest.mark.parametrize("victim", ["prefill-0", "decode-0"])
@pytest.mark.parametrize("position", range(21))
async def test_kill_at_every_token_position(fleet: Fleet, stub: Stub, victim: str, position: int) -> None:
    await asyncio.to_thread(fleet.wait_ready, 30)

    async def kill(tokens: int) -> None:
        if tokens == position:
            fleet.kill(victim)

    prompt = [position, *PROMPT]
    out = await generate(stub, request(prompt, placement=HINT), kill)
    assert (out.code, out.details) == (grpc.StatusCode.OK, "")
    assert out.tokens == expected(prompt)
    assert out.indexes == list(range(24))
    assert await asyncio.to_thread(fleet.restart, victim) is None
    await settled(fleet.address_of("kvstore"))


async def test_nobody_left_to_decode_is_unavailable_within_two_seconds(fleet: Fleet, stub: Stub) -> None:
    await asyncio.to_thread(fleet.wait_ready, 30)

    async def kill(tokens: int) -> None:
        if tokens == 5:
            fleet.kill("decode-0")
            fleet.kill("decode-1")

    out = await generate(stub, request(PROMPT, placement=HINT), kill)
    assert out.code == grpc.StatusCode.UNAVAILABLE
    assert out.longest_gap_s < 2.5
    assert out.tokens == expected(PROMPT)[: len(out.tokens)]
    for name in ("decode-0", "decode-1"):
        await asyncio.to_thread(fleet.restart, name)
    await settled(fleet.address_of("kvstore"))


async def checksums(fleet: Fleet) -> dict[bytes, bytes]:
    figures = await stats(fleet.address_of("kvstore"), checksum_blocks=True)
    return {item.block_key: item.checksum for item in figures.checksums}


async def run_all(stub: Stub, prompts: list[list[int]]) -> None:
    outs = await asyncio.gather(*(generate(stub, request(prompt, 40)) for prompt in prompts))
    for prompt, out in zip(prompts, outs, strict=True):
        assert (out.code, out.tokens) == (grpc.StatusCode.OK, expected(prompt, 40))


async def test_a_stopped_worker_that_wakes_up_harms_nobody(fleet: Fleet, stub: Stub) -> None:
    """Stopped in the middle of a step, its stream broken, the slab filled by others, then woken while others run."""
    await asyncio.to_thread(fleet.wait_ready, 30)

    async def stop(tokens: int) -> None:
        if tokens == 8:
            fleet.stop_signal("decode-0")

    try:
        out = await generate(stub, request(PROMPT, 60, placement=HINT), stop)
        assert (out.code, out.tokens) == (grpc.StatusCode.OK, expected(PROMPT, 60))
        async with asyncio.timeout(10):
            while not (await stats(fleet.address_of("kvstore"))).quarantined_slots:
                await asyncio.sleep(0.05)
        # 512 slots, nine a request.
        await run_all(stub, [[seed] * 100 for seed in range(60)])
        filled = await stats(fleet.address_of("kvstore"))
        assert filled.evicted_blocks > 0
        assert filled.quarantined_slots > 0
        before = await checksums(fleet)
        waking = asyncio.create_task(run_all(stub, [[200 + seed] * 50 for seed in range(10)]))
        await asyncio.sleep(0.1)
        fleet.cont("decode-0")
        await waking
    finally:
        fleet.cont("decode-0")
    await settled(fleet.address_of("kvstore"), 20)
    after = await checksums(fleet)
    kept = before.keys() & after.keys()
    assert len(kept) > 200
    assert all(after[key] == before[key] for key in kept)


async def test_a_request_that_kills_every_worker_ends_with_internal(tmp_path: Path) -> None:
    spec = sim_spec(3, 1, 8 << 20, "--sim-poison-token", "255")
    with Fleet(spec, tmp_path) as fleet:
        fleet.wait_ready(60)
        async with open_channel(fleet.address) as channel:
            stub = router_pb2_grpc.RouterServiceStub(channel)
            apart = router_pb2.PlacementHint(force_apart=True)
            out = await generate(stub, request([1, 2, 255, 4], placement=apart))
            assert out.code == grpc.StatusCode.INTERNAL
            assert "two workers" in out.details
            async with asyncio.timeout(5):
                # A stream breaks before the process that held it is quite gone.
                while sum(fleet.alive(f"prefill-{at}") for at in range(3)) > 1:
                    await asyncio.sleep(0.02)
            assert sum(fleet.alive(f"prefill-{at}") for at in range(3)) == 1
            other = await generate(stub, request(PROMPT))
            assert (other.code, other.tokens) == (grpc.StatusCode.OK, expected(PROMPT))
        await settled(fleet.address_of("kvstore"))
