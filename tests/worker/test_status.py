"""What a worker says of itself: prompts by name and in order, other routers' sequences, predictions and their error."""

from __future__ import annotations

import asyncio
import threading
from dataclasses import replace

import pytest

from headway.core.fit import ForwardWork
from headway.core.step import StepLimits
from headway.worker.status import worker_status
from tests.worker.test_loop import Bench, Heard, sequence


def of_router(router_id: str) -> Heard:
    heard = Heard()
    heard.router_id = router_id
    return heard


async def test_prompts_are_named_in_their_order_and_others_are_counted() -> None:
    bench = Bench(StepLimits(8, 64))
    bench.engine.gate = threading.Semaphore(0)
    task = asyncio.create_task(bench.loop.run())
    for name, tokens, router in (("long", 300, "a"), ("short", 20, "a"), ("shorter", 10, "b")):
        made = replace(sequence([1] * tokens), sequence_id=name, expected_tokens=30)
        bench.loop.start(made, of_router(router))
    await asyncio.to_thread(bench.engine.entered.acquire)
    status = worker_status(bench.loop, "a")
    assert [prompt.sequence_id for prompt in status.prompts] == ["shorter", "short", "long"]
    assert [prompt.remaining_tokens for prompt in status.prompts] == [10, 20, 300]
    assert any(prompt.running for prompt in status.prompts)
    assert status.waiting_sequences == 3
    assert status.others.sequences == 0
    bench.engine.gate.release(40)
    while len([active for active in bench.loop.actives if active.sequence.decoding]) < 3:
        await asyncio.sleep(0.005)
    status = worker_status(bench.loop, "a")
    assert status.running_sequences == 3
    (other,) = (active.sequence for active in bench.loop.actives if active.sink.router_id == "b")
    others = status.others
    assert (others.sequences, others.kv_tokens) == (1, len(other.tokens))
    assert others.growth_tokens == max(0, 30 - other.output_index)
    assert worker_status(bench.loop, "c").others.sequences == 3
    bench.engine.gate.release(1000)
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)
    bench.loop.close()


async def test_those_that_are_expected_count_for_other_routers_only() -> None:
    bench = Bench(StepLimits(8, 64))
    made = sequence([1] * 40)
    bench.loop.expected["a"] = {(made.sequence_id, 0): made}
    assert worker_status(bench.loop, "a").others.sequences == 0
    assert worker_status(bench.loop, "b").others.kv_tokens == 40
    bench.loop.close()


async def test_a_handoff_on_its_way_counts_for_other_routers_only() -> None:
    bench = Bench(StepLimits(8, 64))
    bench.loop.expect(sequence([1] * 40), of_router("a"), "elsewhere")
    assert worker_status(bench.loop, "a").others.sequences == 0
    assert worker_status(bench.loop, "b").others.sequences == 1
    assert worker_status(bench.loop, "a").waiting_sequences == 0
    bench.loop.close()


async def test_a_long_queue_is_counted_and_not_named_to_its_end(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("headway.worker.status.MOST_PROMPTS", 4)
    bench = Bench(StepLimits(8, 64))
    for number in range(10):
        bench.loop.start(replace(sequence([1] * (10 + number)), sequence_id=str(number)), of_router("a"))
    status = worker_status(bench.loop, "a")
    assert status.waiting_sequences == 10
    assert [prompt.sequence_id for prompt in status.prompts] == ["0", "1", "2", "3"]
    bench.loop.close()


async def test_debts_put_prompts_back_and_are_told() -> None:
    bench = Bench(StepLimits(8, 64))
    for tenant, tokens in (("flood", 10), ("other", 20)):
        due_s = 7.0 if tenant == "other" else None
        made = replace(sequence([1] * tokens), sequence_id=tenant, tenant=tenant, first_token_due_s=due_s)
        bench.loop.start(made, of_router("a"))
    bench.loop.steps.debts = {"flood": 5.0, "other": 0.0}
    status = worker_status(bench.loop, "a")
    assert [prompt.tenant for prompt in status.prompts] == ["other", "flood"]
    assert dict(status.debts) == {"flood": 5.0, "other": 0.0}
    assert status.prompts[0].first_token_due_s == 7.0
    assert not status.prompts[1].HasField("first_token_due_s")
    bench.loop.close()


async def test_predictions_and_their_error_go_along() -> None:
    bench = Bench(StepLimits(8, 64))
    for number in range(30):
        bench.loop.steps.timing.observe(ForwardWork([(1000, 0)]), 0.5 if number % 2 else 1.0)
    status = worker_status(bench.loop, "a")
    assert tuple(status.prefill_coefficients) == bench.loop.steps.timing.predictor.prefill
    assert 0.1 < status.prefill_error < 1.0
    assert status.step_error == 0.0
    bench.loop.close()


async def test_a_tenants_flood_delays_the_tenant_and_not_the_others() -> None:
    """Engine forwards of one prompt each, in the order in which tenants get them."""
    bench = Bench(StepLimits(batch=1))
    drawn: list[str] = []

    class Listener(Heard):
        def drawn(self, active, drawn_token, output_index, finish) -> None:  # type: ignore[no-untyped-def]
            drawn.append(active.sequence.tenant)

    bench.loop.steps.timing.prefill.coefficients = (0.0, 1e-3, 0.0)
    for number in range(20):
        flood = replace(sequence([2] * 30), sequence_id=f"flood {number}", tenant="flood", max_tokens=1)
        bench.loop.start(flood, Listener())
    for number in range(2):
        other = replace(sequence([3] * 60), sequence_id=f"other {number}", tenant="other", max_tokens=1)
        bench.loop.start(other, Listener())
    bench.loop.steps.fairness.debts({"flood", "other"})
    bench.loop.steps.fairness.charge("flood", 10.0)
    while not all(active.runnable for active in bench.loop.actives):
        await asyncio.sleep(0.01)
    task = asyncio.create_task(bench.loop.run())
    while len(drawn) < 22:
        await asyncio.sleep(0.01)
    assert drawn[:2] == ["other", "other"]
    assert bench.loop.steps.debts == {}, "of one tenant that waits"
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)
    bench.loop.close()
