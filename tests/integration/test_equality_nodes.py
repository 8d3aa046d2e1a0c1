"""The default model over two and four nodes, each in a network namespace of its own where root may make them: greedy
output equals transformers' generate, by every plane.
"""

from __future__ import annotations

import asyncio
from dataclasses import replace
from pathlib import Path

import grpc
import pytest

from headway.fleet import Fleet, FleetSpec
from headway.runtime.channels import open_channel
from headway.v1 import router_pb2, router_pb2_grpc
from tests.integration.namespaces import places_of
from tests.reference import NEW_TOKENS, check_equal, model_folder, prompts, reference
from tests.support import Stub, generate, request, settled

pytestmark = [pytest.mark.model, pytest.mark.timeout(600)]

# Of the prompts, the lengths around block boundaries, a chat and a long one.
SOME = (0, 6, 7, 8, 13, 16, 18, 21)


@pytest.fixture(scope="module", autouse=True)
def model() -> None:
    try:
        model_folder()
    except LookupError as error:
        pytest.skip(str(error))


def pairs(nodes: int) -> list[tuple[str, str]]:
    """(prefill, decode) on different nodes: each node's prefill worker with the next node's decode worker."""
    return [(f"prefill-{node}", f"decode-{(node + 1) % nodes}") for node in range(nodes)]


def a_device_each(nodes: int, kvstore: tuple[str, ...]) -> dict[str, tuple[str, ...]]:
    """Flags of the processes of all nodes, which share hosts but not devices (NumPy's)."""
    flags = {"kvstore": (*kvstore, "--device", "numpy:0")}
    for node in range(nodes):
        device = ("--device", f"numpy:{node}")
        flags |= {f"{role}-{node}": (*device, "--dtype", "float32") for role in ("prefill", "decode")}
        if node:
            flags[f"kvstore-{node}"] = device
    return flags


async def connected(stub: Stub, hint: router_pb2.PlacementHint) -> None:
    """The first sequence may be computed anew while the stores still connect."""
    for number in range(20):
        out = await generate(stub, request([number + 1] * 20, 2, ignore_eos=True, placement=hint), timeout=60)
        if out.finished.usage.handoff_bytes:
            return
    raise AssertionError("no handoff moved any bytes")


@pytest.mark.parametrize(
    ("nodes", "plane"),
    [
        (2, "socket"),
        (2, "grpc"),
        (2, "peer"),
        pytest.param(2, "nixl", marks=pytest.mark.nixl),
        (4, "socket"),
        (4, "grpc"),
        pytest.param(4, "nixl", marks=pytest.mark.nixl),
    ],
)
async def test_greedy_output_across_nodes(nodes: int, plane: str, tmp_path: Path) -> None:
    flags: dict[str, tuple[str, ...]] = {"kvstore": ("--planes", plane, "--checksum", "all")}
    if plane == "peer":
        flags |= a_device_each(nodes, flags["kvstore"])
    # Other tests of this run may have told UCX to keep to loopback, which does not lead out of a namespace.
    env = {"kvstore": {"UCX_NET_DEVICES": "all"}}
    spec = FleetSpec(nodes, nodes, nodes=nodes, slab_bytes=256 << 20, flags=flags, env=env, threads=1)
    wanted = [reference(prompts()[at]) for at in SOME]
    with places_of(nodes) as places, Fleet(replace(spec, places=places), tmp_path) as fleet:
        fleet.wait_ready(120)
        async with open_channel(fleet.address) as channel:
            stub = router_pb2_grpc.RouterServiceStub(channel)

            hints = [
                router_pb2.PlacementHint(prefill_worker=prefill, decode_worker=decode, force_apart=True)
                for prefill, decode in pairs(nodes)
            ]
            await asyncio.gather(*(connected(stub, hint) for hint in hints))

            async def answer(at: int, number: int) -> list[int]:
                hint = hints[number % nodes]
                message = request(prompts()[at], NEW_TOKENS, ignore_eos=True, placement=hint)
                out = await generate(stub, message, timeout=300)
                assert (out.code, out.details) == (grpc.StatusCode.OK, "")
                assert out.finished.usage.handoff_bytes > 0
                assert out.finished.replays == 0
                return out.tokens

            answers = await asyncio.gather(*(answer(at, number) for number, at in enumerate(SOME)))
        assert len({fleet.address_of(name).rpartition(":")[0] for name in spec.kvstores}) == (len(places) or 1)
        for name in spec.kvstores:
            figures = await settled(fleet.address_of(name))
            assert all(peer.plane == plane for peer in figures.peers)
            assert not figures.corrupt_blocks
    for line in check_equal(answers, wanted):
        print(line)
