"""A fleet whose slab is too small for its prompts: what was evicted comes back from disk (simulated engine)."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

from headway.cli import main
from headway.fleet import Fleet, FleetSpec
from headway.runtime.channels import open_channel
from headway.v1 import router_pb2_grpc
from tests.kvstore.rig import until
from tests.support import expected, generate, request, settled

BLOCK = 16
SLOTS = 64
PROMPT = 14 * BLOCK


def prompt(first: int) -> list[int]:
    return [first, *((at * 7 + first) % 250 for at in range(1, PROMPT))]


async def test_an_evicted_prompt_is_read_and_not_computed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    # A millisecond a prompt token, so that reading is worth it.
    flags = ("--disk-dir", str(tmp_path), "--disk-bytes", str(4 << 20))
    spec = FleetSpec(
        model="sim",
        engine="sim",
        slab_bytes=SLOTS * 4096,
        worker_flags=("--sim-prefill", "0,0.001,0"),
        flags={"kvstore": flags},
    )
    with Fleet(spec, tmp_path) as fleet:
        fleet.wait_ready(60)
        store = fleet.address_of("kvstore")
        async with open_channel(fleet.address) as channel:
            stub = router_pb2_grpc.RouterServiceStub(channel)
            for first in range(1, 9):
                await generate(stub, request(prompt(first)))
                await until(store, lambda reply: not reply.unwritten_blocks)
            again = await generate(stub, request(prompt(1)))
        assert again.tokens == expected(prompt(1), len(again.tokens))
        usage = again.finished.usage
        assert (usage.cached_tokens, usage.computed_tokens) == (PROMPT - BLOCK, BLOCK)
        (disk,) = (await settled(store)).tiers
        assert disk.hits == PROMPT // BLOCK - 1
        assert await asyncio.to_thread(main, ["fleet", "--address", fleet.address]) == 0
        assert "disk" in capsys.readouterr().out
