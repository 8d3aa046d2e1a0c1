"""Fleets whose prompts' prefixes lie on another node, on disk, in a server, or in a store that was restarted."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from bench.report import progress
from bench.tiers.ask import PREFIX, Answer, ask, new_prompt, same_answer
from bench.transfer.store_pair import FORMAT, Worker
from headway.core.keys import block_keys
from headway.fleet import Fleet, FleetSpec
from headway.runtime.channels import open_channel
from headway.v1 import kvstore_pb2, kvstore_pb2_grpc, router_pb2, router_pb2_grpc

BLOCK_TOKENS = FORMAT.block_size
START_S = 120.0
# Half of a prompt's blocks fit thrice: the fourth one before is gone.
SMALL_SLAB, BEHIND = 384 * 737_280, 4
# How much of a handoff is left after the last chunk hangs on that chunk's length, which is whatever is left over.
HANDOFFS = 3
WARM_SLAB = 4 << 30


async def stats(address: str) -> kvstore_pb2.StatsResponse:
    async with open_channel(address) as channel:
        reply: kvstore_pb2.StatsResponse = await kvstore_pb2_grpc.KvStoreServiceStub(channel).Stats(
            kvstore_pb2.StatsRequest(), timeout=5
        )
        return reply


async def another_node(folder: Path, repeats: int) -> dict[str, list[float]]:
    """Computed at node 0, wanted at node 1; then computed at node 0 for a decode worker of node 1."""
    out: dict[str, list[float]] = {"recompute": [], "remote": [], "visible": [], "transfer": [], "after": []}
    with Fleet(FleetSpec(2, 2, nodes=2, threads=2), folder) as fleet:
        fleet.wait_ready(START_S)
        async with open_channel(fleet.address) as channel:
            stub: router_pb2_grpc.RouterServiceAsyncStub = router_pb2_grpc.RouterServiceStub(channel)
            for warmup in (True, *[False] * repeats):
                prompt = new_prompt()
                computed = await ask(stub, prompt, "prefill-0", "decode-0")
                await _indexed(stub, prompt)
                fetched = same_answer(computed, await ask(stub, prompt, "prefill-1", "decode-1"))
                handed = [await _handed_over(stub, fleet) for _ in range(HANDOFFS)]
                if warmup:
                    continue
                out["recompute"].append(computed.ttft_s)
                out["remote"].append(fetched.ttft_s)
                for handoff in handed:
                    for key, value in handoff.items():
                        out[key].append(value)
                progress(f"remote {fetched.ttft_s:.3f} s, computed {computed.ttft_s:.3f} s, handoffs {handed}")
    return out


async def _indexed(stub: router_pb2_grpc.RouterServiceAsyncStub, prompt: list[int]) -> None:
    """Until the router knows that node 0 has the prompt."""
    hint = router_pb2.PlacementHint(prefill_worker="prefill-1", force_apart=True)
    request = router_pb2.GenerateRequest(tokens=router_pb2.TokenPrompt(token_ids=prompt), max_tokens=4, placement=hint)
    async with asyncio.timeout(10):
        while not (await stub.Explain(router_pb2.ExplainRequest(request=request))).options[0].pull_from:
            await asyncio.sleep(0.02)


async def _handed_over(stub: router_pb2_grpc.RouterServiceAsyncStub, fleet: Fleet) -> dict[str, float]:
    """Seconds of a handoff to another node: of all its transfer, and from the end of prefill until decode may step."""
    before = await stats(fleet.address_of("kvstore-1"))
    answer = await ask(stub, new_prompt(), "prefill-0", "decode-1")
    after = await stats(fleet.address_of("kvstore-1"))
    assert answer.usage.handoff_bytes
    busy_s = sum(peer.busy_s for peer in after.peers) - sum(peer.busy_s for peer in before.peers)
    visible_s = answer.timings.joined_at_s - answer.timings.prefilled_at_s
    return {"after": visible_s, "transfer": busy_s, "visible": visible_s / busy_s}


async def below_the_slab(folder: Path, repeats: int, flags: Iterable[str]) -> dict[str, list[float]]:
    """Computed, evicted by what came after it, wanted again."""
    out: dict[str, list[float]] = {"recompute": [], "below": [], "lost": []}
    spec = FleetSpec(1, 1, slab_bytes=SMALL_SLAB, threads=2, flags={"kvstore": tuple(flags)})
    with Fleet(spec, folder) as fleet:
        fleet.wait_ready(START_S)
        async with open_channel(fleet.address) as channel:
            stub: router_pb2_grpc.RouterServiceAsyncStub = router_pb2_grpc.RouterServiceStub(channel)
            asked: list[tuple[list[int], Answer]] = []
            while len(out["below"]) + len(out["lost"]) < repeats + 1:
                prompt = new_prompt()
                asked.append((prompt, await ask(stub, prompt)))
                out["recompute"].append(asked[-1][1].ttft_s)
                await _written(fleet)
                if len(asked) > BEHIND:
                    former, before = asked[-1 - BEHIND]
                    after = await ask(stub, former)
                    assert after.tokens == before.tokens
                    whole = after.usage.cached_tokens == PREFIX and after.usage.pulled_bytes > 0
                    out["below" if whole else "lost"].append(after.ttft_s)
                    progress(f"below {after.ttft_s:.3f} s ({after.usage.pulled_bytes >> 20} MiB), computed "
                             f"{out['recompute'][-1]:.3f} s")  # fmt: skip
    # The first of each also warms up.
    return {key: values[1:] if key != "lost" else values for key, values in out.items()}


async def _written(fleet: Fleet) -> None:
    async with asyncio.timeout(30):
        while (await stats(fleet.address_of("kvstore"))).unwritten_blocks:
            await asyncio.sleep(0.05)


async def warm_restart(folder: Path, repeats: int) -> dict[str, Any]:
    """A full slab of 4 GiB; its kvstore killed with -9 and started again."""
    out: dict[str, Any] = {"restart": [], "kept": [], "warm": [], "recompute": []}
    with Fleet(FleetSpec(1, 1, slab_bytes=WARM_SLAB, threads=2), folder) as fleet:
        fleet.wait_ready(START_S)
        store = fleet.address_of("kvstore")
        await _fill(store)
        async with open_channel(fleet.address) as channel:
            stub: router_pb2_grpc.RouterServiceAsyncStub = router_pb2_grpc.RouterServiceStub(channel)
            for warmup in (True, *[False] * repeats):
                prompt = new_prompt()
                computed = await ask(stub, prompt)
                before = await stats(store)
                restart_s = await _restart(fleet, store)
                after = await stats(store)
                fleet.wait_ready(30)
                warm = same_answer(computed, await ask(stub, prompt))
                if warmup:
                    continue
                out["restart"].append(restart_s)
                out["kept"].append((after.cached_slots + after.leased_slots) / before.cached_slots)
                out["warm"].append(warm.ttft_s)
                out["recompute"].append(computed.ttft_s)
                progress(f"restart {restart_s:.2f} s, {after.cached_slots} of {before.cached_slots} blocks kept, "
                         f"warm {warm.ttft_s:.3f} s, computed {computed.ttft_s:.3f} s")  # fmt: skip
    return out


async def _fill(store: str) -> None:
    """Seal blocks until nearly all of the slab is used; nobody has to compute them."""
    worker = Worker(store, "bench-filler")
    slots = (await worker.ready()).total_slots
    step = 500
    for first in range(0, slots - step, step):
        keys = block_keys(b"filler %d" % first, range(step * BLOCK_TOKENS), BLOCK_TOKENS)
        granted = await worker.acquire(keys, step * BLOCK_TOKENS)
        await worker.seal(granted.lease_id, keys)
        await worker.release(granted.lease_id)
    await worker.stop()


async def _restart(fleet: Fleet, store: str) -> float:
    """Seconds from the kill until the store answers with its blocks."""
    fleet.kill("kvstore")
    started = time.monotonic()
    await asyncio.to_thread(fleet.restart, "kvstore")
    async with asyncio.timeout(30):
        while not (await stats(store)).cached_slots:
            await asyncio.sleep(0.01)
    return time.monotonic() - started
