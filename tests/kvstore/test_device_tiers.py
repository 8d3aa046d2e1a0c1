"""Tiers below a slab on a device (NumPy's): device → host → disk, by way of staging, and back."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

from headway.core.keys import block_keys
from tests.kvstore.pulling import BLOCK, NAMESPACE, SLOT_BYTES
from tests.kvstore.rig import until
from tests.kvstore.test_tiering import (
    FIRST_OUT,
    QUARTER,
    bring_up,
    disk,
    prompt,
    push_out,
    store,
    tier,
    tiers_open,
    watch,
)

DEVICE = ("--device", "numpy:0")


def host(blocks: int) -> tuple[str, ...]:
    return ("--host-bytes", str(blocks * SLOT_BYTES))


@pytest.mark.parametrize("name", ["host", "disk"])
async def test_what_the_slab_evicted_comes_back(tmp_path: Path, name: str) -> None:
    flags = host(1000) if name == "host" else disk(tmp_path)
    async with store(tmp_path, *DEVICE, *flags) as side:
        await tiers_open(side)
        await push_out(side, *FIRST_OUT)
        pulled = await bring_up(side, [*prompt(1), 9])
        assert pulled.cached_tokens == len(prompt(1))
        figures = await tier(side, name)
        assert pulled.bytes == figures.bytes_read == figures.hits * SLOT_BYTES > 0
        assert (figures.torn, figures.dropped, figures.errors) == (0, 0, 0)


async def test_what_the_host_has_no_room_for_comes_from_disk(tmp_path: Path) -> None:
    """The host tier keeps two prompts of those that left the slab; the disk has the others."""
    async with store(tmp_path, *DEVICE, *host(2 * QUARTER), *disk(tmp_path)) as side:
        await tiers_open(side, 2)
        await push_out(side, *FIRST_OUT)
        assert (await tier(side, "host")).evicted
        for name in (1, 2, 3):
            assert (await bring_up(side, [*prompt(name), 9])).cached_tokens == len(prompt(name))
        by_host, by_disk = await tier(side, "host"), await tier(side, "disk")
        assert by_disk.hits
        assert by_host.blocks <= 2 * QUARTER


async def test_watchers_hear_of_a_block_as_long_as_one_tier_has_it(tmp_path: Path) -> None:
    async with store(tmp_path, *DEVICE, *host(QUARTER), *disk(tmp_path)) as side:
        await tiers_open(side, 2)
        known: set[bytes] = set()
        watching = asyncio.create_task(watch(side.address, known))
        await push_out(side, *FIRST_OUT)
        await until(side.address, lambda reply: bool(reply.tiers[0].evicted))
        everything = {key for name in FIRST_OUT for key in block_keys(NAMESPACE, prompt(name), BLOCK)}
        async with asyncio.timeout(10):
            while known != everything:
                await asyncio.sleep(0.05)
        # And stays so: what the host lost was not taken back a moment later.
        await asyncio.sleep(0.3)
        assert known == everything
        watching.cancel()
