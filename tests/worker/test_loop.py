"""The engine loop: prefill, handoff, decode, cancel, preemption and failure over a simulated engine."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator

import pytest

from headway.core.keys import block_keys
from headway.core.step import StepLimits
from headway.engine.contract import DeviceLost
from headway.runtime.errors import HeadwayError
from headway.v1 import kvstore_pb2 as pb
from tests.worker.rig import Bench, Heard, expected, sequence, until_over


@pytest.fixture
async def bench() -> AsyncIterator[Bench]:
    async with Bench(StepLimits(8, 64)).running() as running:
        yield running


async def test_prefill_hands_over_and_decode_goes_on_in_the_same_slots(bench: Bench) -> None:
    prompt, first, rest = list(range(150)), Heard(), Heard()
    bench.loop.start(sequence(prompt), first, joiner="decode-0")
    await until_over(first)
    assert bench.engine.batches == [[64], [64], [22]]
    joined = sequence(prompt)
    joined.tokens.append(first.tokens[0])
    bench.loop.join(joined, rest, lease_id=first.lease_id, epoch=1)
    await until_over(rest)
    assert first.tokens + rest.tokens == expected(prompt, 40)
    assert first.indexes + rest.indexes == list(range(40))
    assert bench.engine.batches[3:] == [[1]] * 39
    await asyncio.sleep(0.01)
    assert bench.store.sealed == block_keys(b"n", (prompt + expected(prompt, 40))[:-1], 16)
    assert not bench.store.leases
    assert len(bench.store.free) == 64


async def test_more_sequences_than_a_forward_has_places_go_at_one_pace() -> None:
    """And a prompt that comes has its first token without waiting for the end of an answer."""
    async with Bench(StepLimits(2, 64), slots=256).running() as bench:
        heard = [Heard() for _ in range(5)]
        for at, sink in enumerate(heard[:4]):
            bench.loop.start(sequence(range(at, at + 20), 400), sink)
        while min(len(sink.tokens) for sink in heard[:4]) < 5:
            await asyncio.sleep(0)
        bench.loop.start(sequence(range(4, 24), 400), heard[4])
        while not heard[4].tokens:
            await asyncio.sleep(0)
        before = [len(sink.tokens) for sink in heard]
        assert max(before) < 400
        while len(heard[4].tokens) < 50:
            await asyncio.sleep(0)
        gained = [len(sink.tokens) - had for sink, had in zip(heard, before, strict=True)]
        assert max(gained) - min(gained) <= 1
        assert max(len(batch) for batch in bench.engine.batches) == 3
        await asyncio.gather(*map(until_over, heard))
    for at, sink in enumerate(heard):
        assert sink.tokens == expected(list(range(at, at + 20)), 400)


async def handed_off(bench: Bench, prompt: list[int]) -> tuple[Heard, pb.LeaseGranted]:
    """Prefill `prompt` for a joiner; what it was told, and what the store would push to the joiner."""
    first = Heard()
    bench.loop.start(sequence(prompt), first, joiner="decode-0")
    await until_over(first)
    slots = bench.store.leases[first.lease_id]
    granted = pb.LeaseGranted(lease_id=first.lease_id, slots=slots, sequence_id="s" + str(prompt[0]))
    return first, granted


async def test_a_lease_that_was_pushed_needs_no_join(bench: Bench) -> None:
    prompt, rest = list(range(7, 50)), Heard()
    first, granted = await handed_off(bench, prompt)
    bench.loop.leases.offer(granted)
    joined = sequence(prompt)
    joined.tokens.append(first.tokens[0])
    bench.loop.join(joined, rest, lease_id=first.lease_id, epoch=1)
    await until_over(rest)
    assert first.tokens + rest.tokens == expected(prompt, 40)
    await asyncio.sleep(0.01)
    assert "join" not in bench.store.operations
    assert not bench.store.leases


async def test_a_pushed_lease_is_released_when_its_request_is_cancelled(bench: Bench) -> None:
    _, granted = await handed_off(bench, list(range(7, 50)))
    bench.loop.leases.offer(granted)
    bench.loop.leases.release_handed_off("s7", 0)
    await asyncio.sleep(0.01)
    assert not bench.store.leases


async def test_a_lease_pushed_after_its_request_was_cancelled_is_released_at_once(bench: Bench) -> None:
    bench.loop.leases.release_handed_off("s7", 0)
    bench.loop.leases.offer(pb.LeaseGranted(lease_id=5, slots=[1], sequence_id="s7"))
    assert bench.store.operations == ["release"]


async def follow(bench: Bench, prompt: list[int], cached_tokens: int, *, begin_first: bool) -> tuple[Heard, Heard]:
    """Prefill elsewhere (so to speak); this worker expects the sequence, and gets `cached_tokens` of it fetched."""
    first, granted = await handed_off(bench, prompt)
    rest, followed = Heard(), sequence(prompt)
    active = bench.loop.expect(followed, rest, "elsewhere:1")
    await asyncio.sleep(0.01)
    slots = bench.store.leases[active.lease_id]
    for here, there in zip(slots, granted.slots, strict=False):
        bench.store.memory[here] = bench.store.memory[there]
    pulled = pb.LeasePulled(lease_id=active.lease_id, slots=slots, cached_tokens=cached_tokens, bytes=77)
    steps = [lambda: bench.loop.begin(active, first.tokens[0]), lambda: bench.loop.leases.pulled(pulled)]
    forwards = len(bench.engine.batches)
    for step in steps if begin_first else reversed(steps):
        assert len(bench.engine.batches) == forwards
        step()
        await asyncio.sleep(0)
    await until_over(rest)
    assert active.pulled_bytes == 77
    return first, rest


@pytest.mark.parametrize("begin_first", [True, False])
async def test_a_sequence_prefilled_on_another_node_goes_on_here(bench: Bench, begin_first: bool) -> None:
    prompt = list(range(7, 50))
    first, rest = await follow(bench, prompt, len(prompt), begin_first=begin_first)
    assert first.tokens + rest.tokens == expected(prompt, 40)
    assert bench.engine.batches[1:] == [[1]] * 39


@pytest.mark.parametrize("cached_tokens", [0, 32])
async def test_what_did_not_come_from_the_other_node_is_computed_here(bench: Bench, cached_tokens: int) -> None:
    prompt = list(range(7, 50))
    first, rest = await follow(bench, prompt, cached_tokens, begin_first=True)
    assert first.tokens + rest.tokens == expected(prompt, 40)
    assert bench.engine.batches[1] == [len(prompt) + 1 - cached_tokens]


async def test_a_pushed_lease_that_the_store_needs_back_is_given_back(bench: Bench) -> None:
    _, granted = await handed_off(bench, list(range(7, 50)))
    bench.loop.leases.offer(granted)
    bench.loop.leases.reclaim(granted.lease_id)
    await asyncio.sleep(0.01)
    assert not bench.store.leases


async def test_a_pushed_lease_that_nobody_begins_is_released(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("headway.worker.leases.OFFER_S", 0.02)
    _, granted = await handed_off(bench, list(range(7, 50)))
    bench.loop.leases.offer(granted)
    await asyncio.sleep(0.05)
    assert not bench.store.leases


async def test_a_join_whose_lease_is_gone_recomputes(bench: Bench) -> None:
    prompt, heard = list(range(30)), Heard()
    joined = sequence(prompt)
    joined.tokens.append(expected(prompt, 1)[0])
    bench.loop.join(joined, heard, lease_id=99, epoch=1)
    await until_over(heard)
    assert heard.tokens == expected(prompt, 40)[1:]
    assert heard.indexes == list(range(1, 40))


async def test_several_sequences_share_forwards_and_keep_their_answers(bench: Bench) -> None:
    prompts = [[seed] * (10 + seed) for seed in range(1, 7)]
    heards = [Heard() for _ in prompts]
    for prompt, heard in zip(prompts, heards, strict=True):
        bench.loop.start(sequence(prompt), heard)
    for prompt, heard in zip(prompts, heards, strict=True):
        await until_over(heard)
        assert heard.tokens == expected(prompt, 40)
    assert max(len(batch) for batch in bench.engine.batches) == 6
    assert len(bench.engine.batches) < 60


@pytest.mark.parametrize("how", ["cancel", "reclaim"])
async def test_slots_in_use_by_a_forward_are_given_up_only_after_it(bench: Bench, how: str) -> None:
    bench.engine.gate = threading.Semaphore(0)
    prompt, heard = list(range(40)), Heard()
    active = bench.loop.start(sequence(prompt), heard)
    await asyncio.to_thread(bench.engine.entered.acquire)
    if how == "cancel":
        bench.loop.cancel(active)
    else:
        bench.loop.leases.reclaim(active.lease_id)
    await asyncio.sleep(0.02)
    assert "release" not in bench.store.operations
    bench.engine.gate.release(1000)
    if how == "reclaim":
        await until_over(heard)
        assert heard.tokens == expected(prompt, 40)
    await asyncio.sleep(0.05)
    assert "release" in bench.store.operations
    assert not bench.store.leases


async def test_a_refused_extension_preempts_by_recompute(bench: Bench) -> None:
    bench.store.refuse_extend = True
    prompt, heard = list(range(20)), Heard()
    bench.loop.start(sequence(prompt, 100), heard)
    await until_over(heard)
    assert heard.tokens == expected(prompt, 100)
    assert heard.indexes == list(range(100))
    assert bench.store.operations.count("acquire") == 2


async def test_a_slow_reply_to_a_seal_does_not_stall_growth(bench: Bench) -> None:
    bench.store.seal_delay_s = 0.05
    prompt, heard = list(range(20)), Heard()
    bench.loop.start(sequence(prompt, 100), heard)
    await until_over(heard)
    assert heard.tokens == expected(prompt, 100)


async def test_a_sequence_ends_by_itself_at_its_deadline(bench: Bench) -> None:
    bench.engine.gate = threading.Semaphore(0)
    heard, late = Heard(), sequence(list(range(20)))
    late.deadline_s = 0.05
    bench.loop.start(late, heard)
    await until_over(heard)
    assert heard.failure is not None
    assert (heard.failure.code, heard.failure.retryable) == (4, False)
    bench.engine.gate.release(1000)
    await asyncio.sleep(0.05)
    assert heard.tokens == []
    assert not bench.store.leases


async def test_when_a_batch_fails_only_the_culprit_fails(bench: Bench) -> None:
    bench.engine.fails_on = 200
    good, bad = Heard(), Heard()
    bench.loop.start(sequence([1, 2, 3]), good)
    bench.loop.start(sequence([200, 2, 3]), bad)
    await until_over(good)
    await until_over(bad)
    assert good.tokens == expected([1, 2, 3], 40)
    assert bad.failure is not None
    assert bad.failure.code == 13
    assert not bad.failure.retryable
    assert "cannot compute this" in bad.failure.message


async def test_a_lost_kvstore_fails_sequences_over_and_lets_go_of_the_slab(bench: Bench) -> None:
    bench.engine.gate = threading.Semaphore(0)
    heard = Heard()
    bench.loop.start(sequence(list(range(40))), heard)
    await asyncio.to_thread(bench.engine.entered.acquire)
    losing = asyncio.create_task(bench.loop.lost())
    await asyncio.sleep(0.02)
    assert not losing.done(), "the slab was let go while a forward used it"
    bench.engine.gate.release(1000)
    await losing
    assert heard.failure is not None
    assert heard.failure.retryable
    assert heard.tokens == [], "the store may have given out anew what the forward read"
    batches = len(bench.engine.batches)
    late = Heard()
    bench.loop.start(sequence([5, 5]), late)
    await until_over(late)
    assert late.failure is not None
    assert len(bench.engine.batches) == batches


async def test_a_device_that_broke_ends_the_worker_and_is_not_tried_again(bench: Bench) -> None:
    heard = Heard()
    assert bench.task is not None
    bench.engine.fails_on, bench.engine.error = 7, DeviceLost("cuda:0 does not work any more")
    bench.loop.start(sequence([7] * 20), heard)
    await until_over(heard)
    assert heard.failure is not None
    assert (heard.failure.retryable, heard.failure.message) == (True, "cuda:0 does not work any more")
    with pytest.raises(HeadwayError, match="cuda:0 does not work any more"):
        await asyncio.wait_for(bench.task, 5)
    assert bench.engine.batches == []


async def test_nothing_is_launched_once_the_kvstore_is_gone(bench: Bench) -> None:
    """The forward that was running fails, as it may when its memory went; its sequences are replayed elsewhere."""
    heard, entered = [Heard(), Heard()], bench.engine.entered
    bench.engine.fails_on, bench.engine.error = 7, RuntimeError("an illegal memory access was encountered")
    bench.engine.gate = threading.Semaphore(0)
    for number, sink in enumerate(heard):
        bench.loop.start(sequence([number, 7]), sink)
    await asyncio.to_thread(entered.acquire)
    lost = asyncio.create_task(bench.loop.lost())
    await asyncio.sleep(0.01)
    bench.engine.gate.release(1000)
    await asyncio.wait_for(lost, 5)
    assert not entered.acquire(blocking=False)
    for sink in heard:
        assert sink.failure is not None
        assert sink.failure.retryable
