"""Objectives at the router: refused at once, refused when the time is up, or served late, as the request says."""

from __future__ import annotations

import asyncio
import time
from typing import Any

import grpc
import pytest

from headway.client.errors import from_rpc
from headway.v1 import router_pb2
from tests.router.fakes import Fake, Rig, until


async def busy(rig: Rig, seconds: float, **limits: float) -> Fake:
    """A mixed worker that says it computes another router's prompt for so long."""
    fake = await rig.add("m0", **limits)
    fake.status.prefill_coefficients.extend([0.0, 1e-3, 0.0])
    tokens = round(seconds * 1000)
    prompt = router_pb2.QueuedPrompt(sequence_id="x", remaining_tokens=tokens, running=True, arrival_s=time.time())
    fake.status.prompts.append(prompt)
    await until(lambda: len(rig.service.fleet.workers["m0"].load.backlog) == 1)
    return fake


async def test_an_objective_that_cannot_be_met_is_refused_at_once() -> None:
    async with Rig() as rig:
        await busy(rig, 5.0)
        started = time.monotonic()
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await rig.run(rig.request(5, ttft_objective_s=1.0, refuse_late=True))
        assert time.monotonic() - started < 0.5
        assert caught.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
        assert "is due after 1.00 s" in (caught.value.details() or "")
        retry_s = from_rpc(caught.value, rig.address).retry_after_s
        assert retry_s is not None
        assert 3.0 < retry_s < 4.5
        await rig.quiet()


@pytest.mark.parametrize(
    "limits", [{"chunk_tokens": 64, "chunk_s": 1000.0}, {"chunk_s": 0.1}, {"chunk_s": 3.0, "layers": 30}]
)
async def test_an_objective_is_met_where_the_newcomer_interrupts(limits: dict[str, Any]) -> None:
    async with Rig() as rig:
        await busy(rig, 5.0, **limits)
        got = await rig.run(rig.request(5, ttft_objective_s=1.0, refuse_late=True))
        assert len(got.tokens[0]) == 5


async def test_best_effort_is_served_late() -> None:
    async with Rig() as rig:
        await busy(rig, 5.0)
        got = await rig.run(rig.request(5, ttft_objective_s=0.1))
        assert len(got.tokens[0]) == 5


async def test_a_first_token_that_does_not_come_in_time_is_refused_then() -> None:
    async with Rig() as rig:
        fake = await rig.add("m0")
        fake.script = lambda fake, sequence, index: True
        started = time.monotonic()
        code, sentence = await rig.refused(rig.request(5, ttft_objective_s=0.3, refuse_late=True))
        assert 0.25 < time.monotonic() - started < 1.5
        assert code is grpc.StatusCode.RESOURCE_EXHAUSTED
        assert sentence == "no first token came within 0.3 s; try again later"
        await until(lambda: bool(fake.cancels))


async def test_an_answer_that_began_in_time_goes_on() -> None:
    async with Rig() as rig:
        fake = await rig.add("m0", step_s=0.1)
        got = await rig.run(rig.request(6, ttft_objective_s=0.3, refuse_late=True))
        assert len(got.tokens[0]) == 6
        assert not fake.cancels


async def test_a_long_queue_is_refused_with_a_time_to_try_again() -> None:
    async with Rig(max_wait_s=2.0) as rig:
        await busy(rig, 5.0)
        code, sentence = await rig.refused(rig.request(5))
        assert code is grpc.StatusCode.RESOURCE_EXHAUSTED
        assert "above the limit of 2 s" in sentence


@pytest.mark.parametrize(
    ("fields", "sentence"),
    [
        ({"refuse_late": True}, "refuse_late is set without ttft_objective_s"),
        ({"expected_tokens": 0}, "expected_tokens is 0"),
        ({"tenant": "x" * 129}, "the length of tenant is 129"),
    ],
)
async def test_requests_that_make_no_sense_are_refused(fields: dict[str, Any], sentence: str) -> None:
    async with Rig() as rig:
        await rig.add("m0")
        code, details = await rig.refused(rig.request(5, **fields))
        assert code is grpc.StatusCode.INVALID_ARGUMENT
        assert sentence in details


async def test_workers_are_told_tenant_and_expected_length_which_is_learned() -> None:
    async with Rig() as rig:
        fake = await rig.add("m0")
        await asyncio.gather(*(rig.run(rig.request(4, tenant="a")) for _ in range(40)))
        await rig.run(rig.request(30, tenant="a"))
        assert fake.starts[-1].tenant == "a"
        assert fake.starts[-1].expected_tokens < 12
        await rig.run(rig.request(30, tenant="a", expected_tokens=25))
        assert fake.starts[-1].expected_tokens == 25


async def test_a_replay_after_the_time_goes_on_all_the_same() -> None:
    """The first token came in time; then the worker dies, when the objective has long passed."""
    async with Rig() as rig:
        fakes = [await rig.add("m0", step_s=0.1), await rig.add("m1", step_s=0.1)]
        running = asyncio.create_task(rig.run(rig.request(10, ttft_objective_s=0.3, refuse_late=True)))
        await until(lambda: any(fake.held for fake in fakes))
        await asyncio.sleep(0.5)
        next(fake for fake in fakes if fake.held).die()
        got = await running
        assert len(got.tokens[0]) == 10
        assert got.finished[0].replays == 1


async def test_other_choices_come_after_the_first_ones_objective() -> None:
    async with Rig() as rig:
        fake = await rig.add("m0")

        def slow(fake: Fake, sequence: Any, index: int) -> bool:
            time.sleep(0.25 if index == 0 else 0.0)
            return False

        fake.script = slow
        got = await rig.run(rig.request(3, n=3, ttft_objective_s=0.4, refuse_late=True))
        assert [len(got.tokens[choice]) for choice in range(3)] == [3, 3, 3]


async def test_a_refusal_names_a_few_workers_however_many_there_are() -> None:
    async with Rig() as rig:
        for number in range(6):
            fake = await rig.add(f"m{number}")
            fake.status.prefill_coefficients.extend([5.0, 0.0, 0.0])
        await until(lambda: all(w.load.predictor.prefill[0] for w in rig.service.fleet.workers.values()))
        _, sentence = await rig.refused(rig.request(5, ttft_objective_s=1.0, refuse_late=True))
        assert "; and 3 more)" in sentence
