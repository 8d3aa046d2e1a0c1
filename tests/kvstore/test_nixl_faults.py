"""The NIXL plane when things go wrong in the middle: once a read is over, nothing is written to its slots any more."""

from __future__ import annotations

import asyncio
import os
import time
import weakref
from collections.abc import AsyncIterator, Iterator
from typing import Any

import pytest

from services.kvstore.planes.contract import Copied, Move
from services.kvstore.planes.nixl_agent import SHORTCUTS, Agent, NixlError, forbid_shortcuts
from services.kvstore.planes.nixl_source import NixlSource
from tests.kvstore.faulty import cut_connections
from tests.kvstore.nixl_rig import (
    NOW,
    SCATTERED,
    SLOTS,
    TIMEOUT_S,
    Side,
    asked,
    begun,
    held,
    moves,
    opened,
    two_slabs,
    untouched,
)

needs_nixl = pytest.mark.nixl


@pytest.fixture
def sides() -> Iterator[tuple[Side, Side]]:
    with two_slabs() as sides:
        yield sides


@pytest.fixture
async def source(sides: tuple[Side, Side]) -> AsyncIterator[NixlSource]:
    source = NixlSource(sides[0].memory, "source")
    yield source
    source.close()


@needs_nixl
async def test_a_slot_given_out_while_it_moves_is_stale(sides: tuple[Side, Side], source: NixlSource) -> None:
    """The generation counts that it has when all its bytes are read, not the one before."""
    async with opened(sides[1], source, checksum="off") as (plane, stream):
        with held(plane):
            reading = asyncio.create_task(plane.read([Move(5, 0, 6)] * 40, NOW))
            await begun(stream)
            sides[0].pool.generations[5] = 1
        assert await reading == [Copied.STALE] * 40


@needs_nixl
async def test_a_cancelled_read_is_over_only_when_its_bytes_have_landed(
    sides: tuple[Side, Side], source: NixlSource
) -> None:
    async with opened(sides[1], source) as (plane, stream):
        with held(plane):
            task = asyncio.create_task(plane.read(moves(SCATTERED) * 20, NOW))
            await begun(stream)
            # However often it is cancelled.
            for _ in range(3):
                task.cancel()
                await asyncio.sleep(0.05)
                assert not task.done()
        with pytest.raises(asyncio.CancelledError):
            await task
        await untouched(sides[1])
        assert await plane.read(moves({5: 6}), NOW) == [Copied.GOOD]


@needs_nixl
@pytest.mark.parametrize("how", ["silent", "closed", "stream cut"])
async def test_a_plane_that_breaks_writes_nothing_once_it_has_said_so(
    sides: tuple[Side, Side], source: NixlSource, how: str
) -> None:
    """The source goes on, or says nothing; after MISSING the reader's slots are out of reach."""
    async with opened(sides[1], source) as (plane, stream):
        stream.deaf = True
        started = time.monotonic()
        task = asyncio.create_task(plane.read(moves(SCATTERED) * 20, NOW))
        await asked(stream)
        if how == "closed":
            plane.close()
        elif how == "stream cut":
            stream.cut()
        assert await task == [Copied.MISSING] * SLOTS * 20
        assert time.monotonic() - started < TIMEOUT_S * 2
        await untouched(sides[1])
        assert await plane.read(moves({1: 2}), NOW) == [Copied.MISSING]
    # The source serves the next one.
    async with opened(sides[1], source) as (plane, _):
        assert await plane.read(moves({5: 6}), NOW) == [Copied.GOOD]


@needs_nixl
async def test_blocks_on_their_way_are_missing_only_when_the_agent_is_no_more(
    sides: tuple[Side, Side], source: NixlSource
) -> None:
    agents: list[weakref.ref[Any]] = []
    async with opened(sides[1], source) as (plane, stream):
        assert plane._thread is not None
        plane._thread.submit(lambda agent: agents.append(weakref.ref(agent._nixl.agent)))
        with held(plane):
            task = asyncio.create_task(plane.read(moves(SCATTERED), NOW))
            await begun(stream)
            plane.close()
            await asyncio.sleep(0.2)
            assert not task.done()
            assert agents[0]() is not None
        assert await task == [Copied.MISSING] * SLOTS
        assert agents[0]() is None


@needs_nixl
async def test_slots_that_an_agent_could_still_write_to_never_come_back(
    sides: tuple[Side, Side], source: NixlSource, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An agent that outlives its destruction costs slots, not bytes."""
    real = Agent.destroy
    monkeypatch.setattr(Agent, "destroy", lambda agent: real(agent) and False)
    async with opened(sides[1], source) as (plane, stream):
        with held(plane):
            task = asyncio.create_task(plane.read(moves(SCATTERED), NOW))
            await begun(stream)
            plane.close()
        task.cancel()
        await asyncio.sleep(TIMEOUT_S)
        assert not task.done()
        plane._over("the test is over")
        await asyncio.gather(task, return_exceptions=True)


@needs_nixl
@pytest.mark.parametrize("checksum", ["all", "off"])
@pytest.mark.parametrize("after_s", [None, 0.0, 0.005, 0.05], ids=str)
async def test_a_connection_that_is_cut_gives_right_bytes_or_none(
    sides: tuple[Side, Side], source: NixlSource, after_s: float | None, checksum: str
) -> None:
    """UCX's own TCP connections are shut down: before the blocks are asked for (None), or in the middle of them."""
    async with opened(sides[1], source, checksum=checksum) as (plane, stream):
        assert await plane.read(moves({5: 6}), NOW) == [Copied.GOOD]
        sides[1].fill(0)
        if after_s is None:
            assert cut_connections(os.getpid(), os.getpid())
        task = asyncio.create_task(plane.read(moves(SCATTERED) * 20, NOW))
        if after_s is not None:
            await asked(stream)
            await asyncio.sleep(after_s)
            assert cut_connections(os.getpid(), os.getpid())
        async with asyncio.timeout(TIMEOUT_S * 3):
            copied = await task
        assert set(copied) <= {Copied.GOOD, Copied.MISSING}
        assert copied[-1] is Copied.MISSING
        for (there, here), what in zip(list(SCATTERED.items()) * 20, copied, strict=True):
            assert what is Copied.MISSING or sides[1].memory.view(here) == sides[0].memory.view(there)
        await untouched(sides[1])
    async with opened(sides[1], source) as (plane, _):
        assert await plane.read(moves({5: 6}), NOW) == [Copied.GOOD]


@needs_nixl
async def test_readers_do_not_disturb_each_other(sides: tuple[Side, Side], source: NixlSource) -> None:
    """One goes away in the middle of a transfer; the other's blocks come."""
    async with opened(sides[1], source) as (staying, _), opened(sides[1], source) as (leaving, _):
        tasks = [asyncio.create_task(plane.read(moves(SCATTERED) * 10, NOW)) for plane in (leaving, staying)]
        await asyncio.sleep(0.02)
        leaving.close()
        left, stayed = await asyncio.gather(*tasks)
        assert Copied.MISSING in left
        assert stayed == [Copied.GOOD] * SLOTS * 10


# ---------------------------------------------------------------------- what UCX may use


@pytest.mark.parametrize("transports", ["tcp", "posix,sysv,self,tcp", "rc,ud,dc", f"^ib,{','.join(SHORTCUTS)}"])
def test_transports_that_end_with_the_agent_are_allowed(transports: str) -> None:
    environment = {"UCX_TLS": transports}
    forbid_shortcuts(environment)
    assert environment == {"UCX_TLS": transports}


@pytest.mark.parametrize("transports", ["all", "shm", "tcp,cma", "\\cma,tcp", "rc,cuda", "^tcp", "^cma"])
def test_transports_that_outlive_the_agent_are_refused(transports: str) -> None:
    with pytest.raises(NixlError, match="UCX_TLS="):
        forbid_shortcuts({"UCX_TLS": transports})


@pytest.mark.parametrize("environment", [{}, {"UCX_TLS": ""}], ids=["unset", "empty"])
def test_left_alone_ucx_may_use_all_that_ends_with_the_agent(environment: dict[str, str]) -> None:
    forbid_shortcuts(environment)
    # What it has set is what it allows.
    forbid_shortcuts(environment)
    assert environment["UCX_TLS"].startswith("^cma,")
