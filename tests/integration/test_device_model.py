"""The default model with its slab on a device: greedy output equals transformers' generate, apart and mixed.

On a GPU (marked gpu) weights, slab and attention are there; NumPy's device has the same way through handle and DLPack.
"""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

from headway.fleet import Fleet, FleetSpec
from headway.runtime.channels import open_channel
from headway.slab.device import DeviceError, open_device
from headway.v1 import router_pb2, router_pb2_grpc
from tests.reference import NEW_TOKENS, check_equal, model_folder, prompts, reference
from tests.support import generate, request, settled

pytestmark = [pytest.mark.model, pytest.mark.timeout(900)]
# Prompts of 2, 16, 33, 63 and 129 tokens.
PICKED = (1, 7, 12, 14, 18)


@pytest.mark.parametrize("device", ["numpy:0", pytest.param("cuda:0", marks=pytest.mark.gpu)])
async def test_greedy_output_is_that_of_generate(device: str, tmp_path: Path) -> None:
    try:
        model_folder()
        open_device(device)
    except (LookupError, DeviceError) as error:
        pytest.skip(str(error))
    on_device = ("--device", device)
    spec = FleetSpec(1, 1, 1, worker_flags=(*on_device, "--dtype", "float32"), flags={"kvstore": on_device})
    wanted = [reference(prompts()[at]) for at in PICKED]
    with Fleet(spec, tmp_path) as fleet:
        await asyncio.to_thread(fleet.wait_ready, 120)
        async with open_channel(fleet.address) as channel:
            stub = router_pb2_grpc.RouterServiceStub(channel)
            for hint in (
                router_pb2.PlacementHint(force_apart=True),
                router_pb2.PlacementHint(decode_worker="mixed-0"),
            ):
                messages = [
                    request(prompts()[at], NEW_TOKENS, ignore_eos=True, placement=hint, cache_salt=str(hint))
                    for at in PICKED
                ]
                outs = await asyncio.gather(*(generate(stub, message, timeout=300) for message in messages))
                assert check_equal([out.tokens for out in outs], wanted) == []
                assert all(out.finished.usage.handoff_bytes == 0 for out in outs)
        await settled(fleet.kvstore_address)
