"""A node's kvstore is killed or hangs while another node fetches from it: every request is answered, by every plane."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import grpc
import pytest

from headway.fleet import Fleet, FleetSpec
from headway.runtime.channels import open_channel
from headway.v1 import router_pb2, router_pb2_grpc
from tests.support import Stub, expected, generate, request, settled

# A millisecond a prompt token, so that fetching a prefix is worth it.
FLAGS = ("--sim-prefill", "0,0.001,0")
PREFIX, WANTED = 640, 8


@pytest.fixture(params=["socket", "grpc", pytest.param("nixl", marks=pytest.mark.nixl)])
def fleet(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Fleet]:
    kvstore = ("--planes", request.param, "--checksum", "all", "--transfer-timeout-s", "1")
    spec = FleetSpec(
        2, 2, model="sim", engine="sim", slab_bytes=4 << 20, nodes=2, worker_flags=FLAGS, flags={"kvstore": kvstore}
    )
    with Fleet(spec, tmp_path) as fleet:
        fleet.wait_ready(60)
        yield fleet


@pytest.fixture
async def stub(fleet: Fleet) -> AsyncIterator[Stub]:
    async with open_channel(fleet.address) as channel:
        yield router_pb2_grpc.RouterServiceStub(channel)


def prompt(number: int) -> list[int]:
    return [number, *((at * 7 + number) % 250 for at in range(1, PREFIX))]


def at(prefill: int, decode: int) -> router_pb2.PlacementHint:
    return router_pb2.PlacementHint(
        prefill_worker=f"prefill-{prefill}", decode_worker=f"decode-{decode}", force_apart=True
    )


async def computed_at_node_0(stub: Stub) -> None:
    """The prefixes lie there, and the router knows."""
    await asyncio.gather(*(generate(stub, request(prompt(number), placement=at(0, 0))) for number in range(WANTED)))
    async with asyncio.timeout(10):
        for number in range(WANTED):
            explain = router_pb2.ExplainRequest(request=request([*prompt(number), 1], placement=at(1, 1)))
            while not (await stub.Explain(explain)).options[0].pull_from:
                await asyncio.sleep(0.02)


@pytest.mark.parametrize("how", ["killed", "stopped"])
async def test_prefixes_that_do_not_come_are_computed(fleet: Fleet, stub: Stub, how: str) -> None:
    await computed_at_node_0(stub)
    # Connected and probed: the others are fetched at once.
    wanted = [[*prompt(number), 1, 2, 3] for number in range(WANTED)]
    first = await generate(stub, request(wanted.pop(), placement=at(1, 1)))
    assert first.finished.usage.pulled_bytes
    tasks = [asyncio.create_task(generate(stub, request(ids, placement=at(1, 1)))) for ids in wanted]
    await asyncio.sleep(0.02)
    if how == "killed":
        fleet.kill("kvstore")
    else:
        fleet.stop_signal("kvstore")
    for ids, out in zip(wanted, await asyncio.gather(*tasks), strict=True):
        assert (out.code, out.details) == (grpc.StatusCode.OK, "")
        assert out.tokens == expected(ids)
        # Given up after a second or two (the plane's timeout, the stream's), not at the request's own deadline.
        assert out.seconds < 15
    assert not (await settled(fleet.address_of("kvstore-1"))).corrupt_blocks
    fleet.cont("kvstore")
