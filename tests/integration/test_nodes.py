"""Two nodes share one prefix cache, and hand sequences over, by every plane (simulated engines, real bytes)."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import grpc
import pytest

from headway.client import AsyncClient
from headway.fleet import Fleet, FleetSpec
from headway.runtime.channels import open_channel
from headway.v1 import kvstore_pb2, router_pb2, router_pb2_grpc
from tests.support import Outcome, Stub, expected, generate, request, settled, stats

BLOCK = 16
BLOCK_BYTES = 128
# A millisecond a prompt token, so that fetching a prefix is worth it.
FLAGS = ("--sim-prefill", "0,0.001,0")
WORKERS = ("prefill-0", "prefill-1", "decode-0", "decode-1")


def spec(planes: str, *kvstore_flags: str) -> FleetSpec:
    """Nodes in host memory; a device each for the plane that is for devices."""
    flags: dict[str, tuple[str, ...]] = {"kvstore": ("--planes", planes, "--checksum", "all", *kvstore_flags)}
    if planes == "peer":
        flags["kvstore"] += ("--device", "numpy:0")
        flags |= {name: ("--device", f"numpy:{name[-1]}") for name in ("kvstore-1", *WORKERS)}
    return FleetSpec(2, 2, model="sim", engine="sim", slab_bytes=4 << 20, nodes=2, worker_flags=FLAGS, flags=flags)


@pytest.fixture(scope="module", params=["socket", "grpc", "peer", pytest.param("nixl", marks=pytest.mark.nixl)])
def nodes(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[str, Fleet]]:
    with Fleet(spec(request.param), tmp_path_factory.mktemp("nodes")) as fleet:
        fleet.wait_ready(60)
        yield request.param, fleet


@pytest.fixture
async def stub(nodes: tuple[str, Fleet]) -> AsyncIterator[Stub]:
    async with open_channel(nodes[1].address) as channel:
        yield router_pb2_grpc.RouterServiceStub(channel)


def prompt(first: int, tokens: int) -> list[int]:
    return [first, *((at * 7 + first) % 250 for at in range(1, tokens))]


def apart(prefill: str, decode: str) -> router_pb2.PlacementHint:
    return router_pb2.PlacementHint(prefill_worker=prefill, decode_worker=decode, force_apart=True)


async def all_settled(fleet: Fleet) -> list[kvstore_pb2.StatsResponse]:
    return [await settled(fleet.address_of(name)) for name in fleet.spec.kvstores]


def check(out: Outcome, ids: list[int], count: int = 24) -> None:
    assert (out.code, out.details) == (grpc.StatusCode.OK, "")
    assert out.tokens == expected(ids, count)
    assert out.indexes == list(range(count))


async def test_a_sequence_is_handed_over_to_another_node(nodes: tuple[str, Fleet], stub: Stub) -> None:
    plane, fleet = nodes
    for tokens in (1, 15, 16, 17, 500):
        ids = prompt(tokens % 200, tokens)
        out = await generate(stub, request(ids, placement=apart("prefill-0", "decode-1")))
        check(out, ids)
        assert out.finished.usage.handoff_bytes == -(-tokens // BLOCK) * BLOCK_BYTES
        assert out.finished.usage.computed_tokens == tokens
        assert out.finished.replays == 0
    (peer,) = (await all_settled(fleet))[1].peers
    assert peer.plane == plane
    assert peer.node_id == "node-0"
    assert peer.fallbacks == 0
    async with AsyncClient(fleet.address) as client:
        links = {store.node_id: store.links for store in (await client.fleet()).stores}
    assert [(link.node_id, link.plane) for link in links["node-1"]] == [("node-0", plane)]


async def test_what_was_handed_over_is_cached_at_both_nodes(nodes: tuple[str, Fleet], stub: Stub) -> None:
    ids = prompt(33, 320)
    await generate(stub, request(ids, placement=apart("prefill-1", "decode-0")))
    again = await generate(stub, request(ids, placement=apart("prefill-1", "decode-0")))
    check(again, ids)
    assert again.finished.usage.cached_tokens == 304
    # All but the last block was there already: sealed prompt blocks are not moved twice.
    assert again.finished.usage.handoff_bytes <= BLOCK_BYTES


async def computed_at_node_0(nodes: tuple[str, Fleet], stub: Stub, ids: list[int]) -> None:
    """Its prefix lies on node 0, and the router knows."""
    check(await generate(stub, request(ids, placement=apart("prefill-0", "decode-0"))), ids)
    explain = router_pb2.ExplainRequest(request=request([*ids, 1], placement=apart("prefill-1", "")))
    async with asyncio.timeout(10):
        while not (await stub.Explain(explain)).options[0].pull_from:
            await asyncio.sleep(0.02)


async def test_a_prefix_is_fetched_rather_than_computed(nodes: tuple[str, Fleet], stub: Stub) -> None:
    ids = prompt(44, 640)
    await computed_at_node_0(nodes, stub, ids)
    longer = [*ids, 1, 2, 3]
    out = await generate(stub, request(longer, placement=apart("prefill-1", "decode-1")))
    check(out, longer)
    usage = out.finished.usage
    assert (usage.cached_tokens, usage.computed_tokens) == (640, 3)
    assert usage.pulled_bytes == 40 * BLOCK_BYTES
    await all_settled(nodes[1])


async def test_ten_that_want_a_prefix_fetch_it_once(nodes: tuple[str, Fleet], stub: Stub) -> None:
    ids = prompt(55, 640)
    await computed_at_node_0(nodes, stub, ids)
    before = sum(peer.blocks for peer in (await all_settled(nodes[1]))[1].peers)
    wanted = [[*ids, number] for number in range(10)]
    messages = [request(longer, placement=apart("prefill-1", "decode-1")) for longer in wanted]
    outs = await asyncio.gather(*(generate(stub, message) for message in messages))
    for out, longer in zip(outs, wanted, strict=True):
        check(out, longer)
        assert out.finished.usage.computed_tokens == 1
    after = sum(peer.blocks for peer in (await all_settled(nodes[1]))[1].peers)
    assert after - before == 40


async def test_many_at_once_in_all_directions(nodes: tuple[str, Fleet], stub: Stub) -> None:
    workers = [(f"prefill-{at % 2}", f"decode-{at // 2 % 2}") for at in range(40)]
    wanted = [prompt(at % 5, 30 + 17 * at) for at in range(40)]
    messages = [request(ids, placement=apart(*pair)) for ids, pair in zip(wanted, workers, strict=True)]
    outs = await asyncio.gather(*(generate(stub, message) for message in messages))
    for out, ids in zip(outs, wanted, strict=True):
        check(out, ids)
    await all_settled(nodes[1])


async def test_clients_that_leave_leave_nothing(nodes: tuple[str, Fleet], stub: Stub) -> None:
    async def leave(at: int) -> None:
        message = request(prompt(at, 700), 500, placement=apart("prefill-0", "decode-1"))
        task = asyncio.create_task(generate(stub, message))
        await asyncio.sleep(0.05 * at)
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)

    await asyncio.gather(*(leave(at) for at in range(20)))
    await all_settled(nodes[1])


async def test_a_slab_with_little_room_still_answers_all(tmp_path: Path) -> None:
    """Handoffs wait, give way and start over; nobody gets a wrong token and nothing is left."""
    small = FleetSpec(
        2, 2, model="sim", engine="sim", slab_bytes=40 * 4096, nodes=2,
        worker_flags=("--growth-tokens", "16", "--acquire-timeout-s", "60"),
        flags={"kvstore": ("--handoff-hold-s", "1")},
    )  # fmt: skip
    with Fleet(small, tmp_path) as fleet:
        fleet.wait_ready(60)
        async with open_channel(fleet.address) as channel:
            stub = router_pb2_grpc.RouterServiceStub(channel)
            wanted = [prompt(at, 100 + at) for at in range(24)]
            messages = [request(ids, 60, placement=apart("prefill-0", "decode-1")) for ids in wanted]
            outs = await asyncio.gather(*(generate(stub, message) for message in messages))
        for out, ids in zip(outs, wanted, strict=True):
            check(out, ids, 60)
        await all_settled(fleet)


async def test_a_store_says_what_it_reads_from_where(nodes: tuple[str, Fleet], stub: Stub) -> None:
    ids = prompt(66, 160)
    await generate(stub, request(ids, placement=apart("prefill-0", "decode-1")))
    (peer,) = (await stats(nodes[1].address_of("kvstore-1"))).peers
    assert peer.address == nodes[1].address_of("kvstore")
    assert peer.bytes == peer.blocks * BLOCK_BYTES > 0
    assert peer.busy_s > 0
    assert peer.probe_bytes_per_s > 0
