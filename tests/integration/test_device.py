"""A fleet whose slab lies on a device (NumPy's, as a GPU's would): answers, handoff, and the kvstore's death."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from pathlib import Path

import grpc

from headway.fleet import Fleet
from headway.v1 import router_pb2
from tests.support import Stub, expected, generate, request, settled, sim_spec

ON_DEVICE = ("--device", "numpy:0")
SPEC = replace(
    sim_spec(1, 1, 16 << 20, "--sim-prefill", "0.02,0,0", "--sim-step", "0.01,0,0", *ON_DEVICE),
    flags={"kvstore": ON_DEVICE},
    supervise=True,
)
APART = router_pb2.PlacementHint(force_apart=True)


async def test_prefill_and_decode_share_the_device_slab(fleet: Fleet, stub: Stub) -> None:
    outs = await asyncio.gather(*(generate(stub, request([seed] * 70, placement=APART)) for seed in range(6)))
    for seed, out in enumerate(outs):
        assert (out.code, out.tokens) == (grpc.StatusCode.OK, expected([seed] * 70))
        assert out.finished.usage.handoff_bytes == 0
    await settled(fleet.kvstore_address)


async def test_workers_exit_with_their_kvstore_and_requests_are_replayed(fleet: Fleet, stub: Stub) -> None:
    before = {name: fleet.process(name) for name in ("prefill-0", "decode-0")}

    async def kill(tokens: int) -> None:
        if tokens == 3:
            fleet.kill("kvstore")

    out = await generate(stub, request([9] * 100, 60), kill)
    assert out.tokens == expected([9] * 100, 60)[: len(out.tokens)]
    assert out.code in (grpc.StatusCode.OK, grpc.StatusCode.UNAVAILABLE)
    async with asyncio.timeout(30):
        while any(fleet.process(name) == pid for name, pid in before.items()):
            await asyncio.sleep(0.1)
    await asyncio.to_thread(fleet.wait_ready, 60)
    for name, pid in before.items():
        assert not Path(f"/proc/{pid}").exists()
        log = (fleet.run_dir / f"{name}.log").read_text()
        assert "event=store_lost device=numpy:0" in log
        assert "the kvstore went away, and the slab on numpy:0 with it; start this worker again" in log
    again = await generate(stub, request([9] * 100, 60, placement=APART))
    assert (again.code, again.tokens) == (grpc.StatusCode.OK, expected([9] * 100, 60))
    await settled(fleet.kvstore_address)
