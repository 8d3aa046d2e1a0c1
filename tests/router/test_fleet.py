"""Announcements, the fleet's views, Explain, and the index kept from block events."""

from __future__ import annotations

import asyncio
import time
from dataclasses import replace
from typing import Any

import grpc
import pytest

from headway.core.keys import block_keys, join_keys, key_namespace
from headway.core.model import KvFormat, LayerGroup
from headway.runtime.config import ConfigError
from headway.v1 import common_pb2, kvstore_pb2, router_pb2
from services.router.config import RouterConfig
from tests.router.fakes import BLOCK, CARD, Fake, FakeStore, Rig, until

LONG = list(range(40))
KEYS = block_keys(key_namespace(CARD.fingerprint, CARD.kv_format.digest(), "", ""), LONG, BLOCK)


def event(epoch: int, number: int, **kind: Any) -> kvstore_pb2.WatchBlocksResponse:
    return kvstore_pb2.WatchBlocksResponse(epoch=epoch, sequence_number=number, first_sequence_number=number, **kind)


def stored(epoch: int, number: int, keys: list[bytes]) -> kvstore_pb2.WatchBlocksResponse:
    return event(epoch, number, stored={"block_keys": join_keys(keys)})


def removed(epoch: int, number: int, keys: list[bytes]) -> kvstore_pb2.WatchBlocksResponse:
    return event(epoch, number, removed={"block_keys": join_keys(keys)})


def snapshot(epoch: int, number: int, keys: list[bytes]) -> list[kvstore_pb2.WatchBlocksResponse]:
    begin, end = event(epoch, number, snapshot_begin={}), event(epoch, number, snapshot_end={})
    return [begin, stored(epoch, number, keys), end]


async def overlap(rig: Rig) -> int:
    explained = await rig.stub.Explain(router_pb2.ExplainRequest(request=rig.request(prompt=LONG)))
    return int(explained.options[0].overlap_tokens)


async def watched(rig: Rig, *sessions: list[kvstore_pb2.WatchBlocksResponse]) -> FakeStore:
    store = FakeStore()
    store.sessions += sessions
    address = await store.start()
    await rig.add("m0", node=address)
    await until(lambda: not store.sessions)
    return store


def last(rig: Rig) -> int:
    (watch,) = rig.service.fleet.stores.values()
    return watch.last if watch.watching else -1


async def test_overlap_follows_block_events() -> None:
    async with Rig() as rig:
        store = await watched(rig, [*snapshot(7, 3, KEYS[:4]), stored(7, 4, KEYS[4:8]), removed(7, 5, KEYS[6:8])])
        await until(lambda: last(rig) == 5)
        assert await overlap(rig) == 6 * BLOCK
        view = await rig.stub.Fleet(router_pb2.FleetRequest())
        assert (view.stores[0].indexed_blocks, view.stores[0].last_sequence_number) == (6, 5)
        await store.stop()


async def test_a_broken_watch_resumes_where_it_was() -> None:
    async with Rig() as rig:
        store = await watched(rig, [*snapshot(7, 3, KEYS[:4]), stored(7, 4, KEYS[4:5])])
        await until(lambda: last(rig) == 4)
        store.sessions.append([stored(7, 5, KEYS[5:6])])
        store.hang_up.set()
        await until(lambda: last(rig) == 5)
        assert [(r.epoch, r.after_sequence_number) for r in store.requests] == [(0, 0), (7, 4)]
        assert await overlap(rig) == 6 * BLOCK
        await store.stop()


@pytest.mark.parametrize(
    "strange", [stored(7, 6, KEYS[8:9]), stored(7, 4, KEYS[8:9]), stored(8, 5, KEYS[8:9])], ids=["gap", "old", "epoch"]
)
async def test_a_gap_leads_to_a_snapshot(strange: kvstore_pb2.WatchBlocksResponse) -> None:
    async with Rig() as rig:
        first = [*snapshot(7, 3, KEYS[:8]), stored(7, 4, KEYS[8:9]), strange]
        store = await watched(rig, first, snapshot(7, 9, KEYS[:2]))
        await until(lambda: last(rig) == 9)
        assert [(r.epoch, r.after_sequence_number) for r in store.requests] == [(0, 0), (0, 0)]
        assert await overlap(rig) == 2 * BLOCK
        await store.stop()


async def test_a_snapshot_cut_short_is_asked_for_again() -> None:
    async with Rig() as rig:
        store = await watched(rig, snapshot(7, 3, KEYS[:4])[:2])
        await until(lambda: rig.service.fleet.index.blocks(store_address(rig)) == 4)
        store.sessions.append(snapshot(7, 3, KEYS[:9]))
        store.hang_up.set()
        await until(lambda: last(rig) == 3)
        assert [(r.epoch, r.after_sequence_number) for r in store.requests] == [(0, 0), (0, 0)]
        assert await overlap(rig) == 9 * BLOCK
        await store.stop()


async def test_what_a_full_index_left_out_is_learned_when_there_is_room() -> None:
    async with Rig(max_index_blocks=8) as rig:
        first = [*snapshot(7, 3, KEYS), removed(7, 4, KEYS[2:8])]
        store = await watched(rig, first, snapshot(7, 6, [*KEYS[:2], *KEYS[8:]]))
        await until(lambda: last(rig) == 6)
        assert rig.service.fleet.index.blocks(store_address(rig)) == 4
        assert [(r.epoch, r.after_sequence_number) for r in store.requests] == [(0, 0), (0, 0)]
        await store.stop()


def store_address(rig: Rig) -> str:
    return next(iter(rig.service.fleet.stores))


async def test_a_node_without_workers_is_forgotten_after_a_while() -> None:
    async with Rig(store_linger_s=0.05) as rig:
        store = await watched(rig, snapshot(7, 3, KEYS[:4]))
        rig.fakes[0].die()
        await until(lambda: not rig.service.fleet.stores)
        assert rig.service.fleet.index.overlap(KEYS) == {}
        await store.stop()


async def test_fleet_shows_workers_and_model() -> None:
    async with Rig() as rig:
        await rig.add("p0")
        await rig.add("d0")
        view = await rig.stub.Fleet(router_pb2.FleetRequest())
        assert {(w.worker_id, w.role) for w in view.workers} == {
            ("p0", common_pb2.WORKER_ROLE_PREFILL),
            ("d0", common_pb2.WORKER_ROLE_DECODE),
        }
        assert all(worker.age_s < 2 and worker.status.ready for worker in view.workers)
        assert view.model.name == "toy"
        assert view.requests_in_flight == 0


async def test_fleet_shows_links_that_are_used_and_not_those_that_were_only_thought_of() -> None:
    async with Rig() as rig:
        await rig.add("m0")
        (source,) = rig.service.fleet.stores
        links = rig.service.fleet.links
        links.between(source, "thought of")
        links.between("gone", source).observe(10_000_000, 0.1)
        links.between(source, "measured").observe(10_000_000, 0.1)
        links.between(source, "busy").start(10**12, time.monotonic())
        view = await rig.stub.Fleet(router_pb2.FleetRequest())
        assert {link.destination: link.bytes_per_s for link in view.links} == {
            "measured": pytest.approx(1e8),
            "busy": 0.0,
        }


async def test_explain_lists_every_option_the_pick_first() -> None:
    async with Rig() as rig:
        for name in ("p0", "p1", "d0"):
            fake = await rig.add(name)
            fake.status.prefill_coefficients.extend([0.0, 1e-3, 0.0])
        queued = router_pb2.QueuedPrompt(sequence_id="another router's", remaining_tokens=500, running=True)
        rig.fakes[0].status.prompts.append(queued)
        await until(lambda: len(rig.service.fleet.workers["p0"].load.backlog) == 1)
        explained = await rig.stub.Explain(router_pb2.ExplainRequest(request=rig.request(prompt=LONG)))
        assert explained.prompt_tokens == 40
        options = [(o.prefill_worker, o.decode_worker, bool(o.refused)) for o in explained.options]
        assert options == [("p1", "d0", False), ("p0", "d0", False), ("", "d0", True)]
        assert 0.044 < explained.options[1].cost_s <= 0.544
        assert not any(fake.starts for fake in rig.fakes)


async def test_keys_follow_the_order_that_the_worker_announces() -> None:
    async with Rig() as rig:
        fake = Fake("m0", common_pb2.WORKER_ROLE_MIXED)
        fake.order = "arrival"
        fake.status.prompts.append(router_pb2.QueuedPrompt(sequence_id="x", remaining_tokens=500, arrival_s=9.0))
        rig.fakes.append(await fake.start(rig.address))
        await until(lambda: "m0" in rig.service.fleet.workers and "x" in rig.service.fleet.workers["m0"].load.backlog)
        (prompt,) = rig.service.fleet.workers["m0"].load.backlog
        assert prompt.key == (0, 9.0)


async def test_a_worker_with_an_unknown_order_is_refused() -> None:
    async with Rig() as rig:
        hello = router_pb2.WorkerHello(
            worker_id="m0", address="host:1", role=common_pb2.WORKER_ROLE_MIXED, order="backwards"
        )
        with pytest.raises(grpc.aio.AioRpcError, match="'backwards' is none that this router knows") as refused:
            async for _ in rig.stub.Announce(iter([router_pb2.AnnounceRequest(hello=hello)])):
                pass
        assert refused.value.code() is grpc.StatusCode.INVALID_ARGUMENT


async def test_tenants_debts_put_their_prompts_back() -> None:
    async with Rig() as rig:
        fake = await rig.add("m0")
        fake.status.prefill_coefficients.extend([0.0, 1e-3, 0.0])
        fake.status.debts["flood"] = 7.0
        queued = router_pb2.QueuedPrompt(sequence_id="x", remaining_tokens=500, arrival_s=0.0, tenant="flood")
        fake.status.prompts.append(queued)
        backlog = rig.service.fleet.workers["m0"].load.backlog
        await until(lambda: "x" in backlog)
        (prompt,) = backlog
        assert backlog.with_debt(prompt.key, prompt.tenant) == (0, pytest.approx(0.5 + 7.0))
        fake.status.debts.clear()
        await until(lambda: not backlog.debts)


async def test_a_late_word_of_a_prompt_that_is_computed_changes_nothing() -> None:
    async with Rig() as rig:
        fake = await rig.add("m0", step_s=0.2)
        running = asyncio.create_task(rig.run(rig.request(6)))
        worker = rig.service.fleet.workers["m0"]
        await until(lambda: fake.starts and worker.load.running == 1 and not len(worker.load.backlog))
        late = router_pb2.QueuedPrompt(sequence_id=fake.starts[0].sequence_id, remaining_tokens=500)
        fake.status.prompts.append(late)
        heard = worker.status_at
        await until(lambda: worker.status_at > heard and len(worker.status.prompts) == 1)
        assert not len(worker.load.backlog)
        await running


async def test_promises_of_other_routers_are_kept() -> None:
    async with Rig() as rig:
        fake = await rig.add("m0")
        fake.status.prefill_coefficients.extend([0.0, 2e-2, 0.0])
        for name, tokens in (("runs", 50), ("waits", 150)):
            queued = router_pb2.QueuedPrompt(sequence_id=name, remaining_tokens=tokens, arrival_s=time.time())
            queued.running = name == "runs"
            fake.status.prompts.append(queued)
        backlog = rig.service.fleet.workers["m0"].load.backlog
        await until(lambda: len(backlog) == 2)
        # It goes before the one that waits, whose first token is due in five seconds.
        explained = await rig.stub.Explain(router_pb2.ExplainRequest(request=in_time(rig, 50)))
        assert not explained.options[0].refused
        fake.status.prompts[1].first_token_due_s = time.time() + 5.0
        fake.status.prompts[1].remaining_tokens = 149
        await until(lambda: any(prompt.due_s < 1e9 for prompt in backlog))
        explained = await rig.stub.Explain(router_pb2.ExplainRequest(request=in_time(rig, 50)))
        assert "promised" in explained.options[0].refused


def in_time(rig: Rig, tokens: int) -> router_pb2.GenerateRequest:
    return rig.request(prompt=list(range(tokens)), ttft_objective_s=30.0, refuse_late=True)


async def test_what_other_routers_sent_comes_and_goes_with_the_status() -> None:
    async with Rig() as rig:
        fake = await rig.add("d0")
        load = rig.service.fleet.workers["d0"].load
        fake.status.others.MergeFrom(router_pb2.BatchShare(sequences=5, kv_tokens=500, growth_tokens=50))
        fake.status.prompts.append(router_pb2.QueuedPrompt(sequence_id="x", remaining_tokens=500))
        await until(lambda: load.running == 5 and len(load.backlog) == 1)
        assert load.memory.committed_tokens == 550
        fake.status.ClearField("others")
        del fake.status.prompts[:]
        await until(lambda: not load.running and not len(load.backlog))


async def test_draining_worker_gets_no_new_work() -> None:
    async with Rig() as rig:
        await rig.add("m0")
        await rig.add("m1")
        rig.service.fleet.workers["m0"].load.draining = True
        for _ in range(3):
            assert (await rig.run(rig.request(2))).finished[0].decode_worker == "m1"


async def test_worker_of_another_model_is_refused() -> None:
    async with Rig() as rig:
        await rig.add("m0")
        other = KvFormat(8, "uint64", "token", (LayerGroup(1, 1, 1, 8),))
        fake = Fake("m1", common_pb2.WORKER_ROLE_MIXED)
        fake.card = replace(CARD, kv_format=other)
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            async for _ in rig.stub.Announce(_hello(fake)):
                pass
        assert caught.value.code() is grpc.StatusCode.FAILED_PRECONDITION
        assert "differs from it in name, weights or KV format" in (caught.value.details() or "")
        assert list(rig.service.fleet.workers) == ["m0"]


async def _hello(fake: Fake) -> Any:
    fake.port = 1
    async for message in fake._announcements():
        yield message
        return


async def test_all_workers_may_be_replaced_by_those_of_another_model() -> None:
    async with Rig() as rig:
        fake = await rig.add("m0")
        fake.die()
        await until(lambda: not rig.service.fleet.workers)
        new = Fake("m1", common_pb2.WORKER_ROLE_MIXED)
        new.card = replace(CARD, name="new")
        rig.fakes.append(await new.start(rig.address))
        await until(lambda: "m1" in rig.service.fleet.workers)
        got = await rig.run(rig.request(2))
        assert got.started is not None
        assert got.started.model == "new"


async def test_loads_return_to_what_workers_say() -> None:
    async with Rig() as rig:
        for name in ("p0", "d0"):
            fake = await rig.add(name)
            fake.status_every_s = 60.0
        for _ in range(3):
            await rig.run(rig.request(4))
        await rig.quiet()
        for worker in rig.service.fleet.workers.values():
            load = worker.load
            assert (len(load.backlog), load.backlog.tokens, load.memory.committed_tokens, load.sent) == (0, 0, 0, 3)


@pytest.mark.parametrize("setting", [{"max_in_flight": 0}, {"status_timeout_s": 0.0}, {"drain_s": -1.0}])
def test_settings_out_of_range_are_refused(setting: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=next(iter(setting))):
        RouterConfig(**setting)
