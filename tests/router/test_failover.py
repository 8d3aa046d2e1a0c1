"""Workers die, fail, lie or fall silent; the client's stream goes on or ends with the right status."""

from __future__ import annotations

import asyncio
import time
from typing import Any

import grpc
import pytest

from headway.runtime.convert import ids_from_bytes
from headway.v1 import common_pb2, decode_pb2, prefill_pb2
from tests.router.fakes import PROMPT, Fake, Rig, expected, next_token, until

COUNT = 12
Sequence = common_pb2.Sequence


class DieAt:
    """Of the workers that share it, the first one to reach output `index` dies; `times` of them in all."""

    def __init__(self, index: int, times: int = 1) -> None:
        self.index = index
        self.left = times

    def __call__(self, fake: Fake, sequence: Sequence, index: int) -> bool:
        if index < self.index or not self.left:
            return False
        self.left -= 1
        fake.die()
        return True


async def fleet(rig: Rig, script: Any, *names: str) -> list[Fake]:
    fakes = [await rig.add(name, step_s=0.001) for name in names]
    for fake in fakes:
        fake.script = script
    return fakes


@pytest.mark.parametrize("index", range(COUNT))
async def test_death_at_each_position_changes_nothing(index: int) -> None:
    async with Rig() as rig:
        fakes = await fleet(rig, DieAt(index), "p0", "p1", "d0", "d1")
        got = await rig.run(rig.request(COUNT))
        assert got.tokens[0] == expected(PROMPT, COUNT)

        def replays() -> list[list[int]]:
            starts = [pair for fake in fakes for pair in zip(fake.starts, fake.given, strict=True)]
            return [given for start, given in starts if start.attempt == 1]

        await until(lambda: len(replays()) == 2)
        assert replays() == [PROMPT + expected(PROMPT, index)] * 2
        assert got.finished[0].replays == 1
        assert got.finished[0].usage.output_tokens == COUNT
        await rig.quiet()


@pytest.mark.parametrize("index", range(0, COUNT, 3))
async def test_death_of_a_worker_that_prefills_by_itself(index: int) -> None:
    async with Rig() as rig:
        await fleet(rig, DieAt(index), "m0", "m1")
        got = await rig.run(rig.request(COUNT))
        assert got.tokens[0] == expected(PROMPT, COUNT)
        assert got.finished[0].usage.computed_tokens == len(PROMPT)
        await rig.quiet()


@pytest.mark.parametrize("index", [0, 1, 5])
async def test_second_death_ends_the_request(index: int) -> None:
    async with Rig() as rig:
        fakes = await fleet(rig, DieAt(index, times=3), "m0", "m1", "m2")
        code, sentence = await rig.refused(rig.request(COUNT))
        assert code is grpc.StatusCode.INTERNAL
        assert "ended two workers" in sentence
        assert sum(fake._announcing is not None for fake in fakes) == 1


async def test_last_worker_gone_is_unavailable_in_time() -> None:
    async with Rig() as rig:
        await fleet(rig, DieAt(4), "p0", "d0")
        started = time.monotonic()
        code, sentence = await rig.refused(rig.request(COUNT))
        assert code is grpc.StatusCode.UNAVAILABLE
        assert "no worker can serve" in sentence
        assert time.monotonic() - started < 2.0


async def test_no_worker_at_all_is_unavailable() -> None:
    async with Rig(no_worker_timeout_s=0.1) as rig:
        code, sentence = await rig.refused(rig.request(COUNT))
        assert code is grpc.StatusCode.UNAVAILABLE
        assert "no worker has announced itself" in sentence


async def test_worker_that_appears_in_time_takes_over() -> None:
    async with Rig() as rig:
        await fleet(rig, DieAt(4), "m0")
        running = asyncio.create_task(rig.run(rig.request(COUNT)))
        await until(lambda: not rig.service.fleet.workers)
        await rig.add("m1")
        got = await running
        assert got.tokens[0] == expected(PROMPT, COUNT)
        assert got.finished[0].decode_worker == "m1"


async def test_death_of_an_idle_decode_worker_is_no_blame() -> None:
    async with Rig() as rig:
        decodes: list[Fake] = []

        def prefill(fake: Fake, sequence: Sequence, index: int) -> bool:
            def kill() -> None:
                next(d for d in decodes if (sequence.sequence_id, sequence.attempt) in d.held).die()

            if sequence.attempt < 2:
                asyncio.get_running_loop().call_later(0.05, kill)
            return sequence.attempt < 2

        (prefiller,) = await fleet(rig, prefill, "p0")
        decodes += [await rig.add(name) for name in ("d0", "d1", "d2")]
        got = await rig.run(rig.request(COUNT))
        assert got.tokens[0] == expected(PROMPT, COUNT)
        assert got.finished[0].replays == 2
        await rig.quiet()
        await until(lambda: len(prefiller.cancels) == 2)


async def test_death_of_prefill_after_its_token_changes_nothing() -> None:
    async with Rig() as rig:
        prefill, decode = await rig.add("p0"), await rig.add("d0", step_s=0.005)

        def script(fake: Fake, sequence: Sequence, index: int) -> bool:
            if index == 3:
                prefill.die()
            return False

        decode.script = script
        got = await rig.run(rig.request(COUNT))
        assert got.tokens[0] == expected(PROMPT, COUNT)
        assert got.finished[0].replays == 0
        await until(lambda: "p0" not in rig.service.fleet.workers)


async def test_silent_worker_is_replaced() -> None:
    async with Rig(status_timeout_s=0.3) as rig:

        def stop(fake: Fake, sequence: Sequence, index: int) -> bool:
            fake.silent = index == 4 and fake.name == "m0"
            return fake.silent

        await fleet(rig, stop, "m0")
        running = asyncio.create_task(rig.run(rig.request(COUNT)))
        await rig.add("m1")
        got = await running
        assert got.tokens[0] == expected(PROMPT, COUNT)
        assert got.finished[0].decode_worker == "m1"


async def test_retryable_failures_are_retried_then_reported() -> None:
    async with Rig() as rig:
        fails = 3

        def fail(fake: Fake, sequence: Sequence, index: int) -> bool:
            if index != 2 or sequence.attempt >= fails:
                return False
            fake.held.pop((sequence.sequence_id, sequence.attempt))
            problem = common_pb2.Failure(code=10, message="the lease is gone", retryable=True)
            fake.put(sequence, failure=problem)
            return True

        await fleet(rig, fail, "p0", "d0")
        got = await rig.run(rig.request(COUNT))
        assert got.tokens[0] == expected(PROMPT, COUNT)
        assert got.finished[0].replays == 3
        fails = 4
        assert await rig.refused(rig.request(COUNT)) == (grpc.StatusCode.ABORTED, "the lease is gone")


async def test_final_failure_is_reported_as_it_is() -> None:
    async with Rig() as rig:

        def fail(fake: Fake, sequence: Sequence, index: int) -> bool:
            fake.held.pop((sequence.sequence_id, sequence.attempt))
            fake.put(sequence, failure=common_pb2.Failure(code=13, message="it broke"))
            return True

        await fleet(rig, fail, "p0", "d0")
        assert await rig.refused(rig.request(COUNT)) == (grpc.StatusCode.INTERNAL, "it broke")


def _tokens(sequence: Sequence, index: int, token_id: int) -> decode_pb2.DecodeTokens:
    return decode_pb2.DecodeTokens(tokens=[common_pb2.Token(token_id=token_id, output_index=index)])


async def test_tokens_of_older_attempts_are_dropped() -> None:
    async with Rig() as rig:

        def script(fake: Fake, sequence: Sequence, index: int) -> bool:
            if index == 3 and sequence.attempt == 0:
                fake.held.pop((sequence.sequence_id, 0))
                fake.put(sequence, failure=common_pb2.Failure(code=10, message="again", retryable=True))
                return True
            if index > 3:
                fake.put(sequence, attempt=0, tokens=_tokens(sequence, index, 33))
            return False

        await fleet(rig, script, "m0")
        got = await rig.run(rig.request(COUNT))
        assert got.tokens[0] == expected(PROMPT, COUNT)


async def test_repeated_tokens_are_dropped_and_a_gap_is_replayed() -> None:
    async with Rig() as rig:

        def script(fake: Fake, sequence: Sequence, index: int) -> bool:
            context = list(ids_from_bytes(sequence.tokens))
            if index == 3:
                fake.put(sequence, tokens=_tokens(sequence, 2, context[-1]))
            if index == 6 and sequence.attempt == 0:
                fake.put(sequence, tokens=_tokens(sequence, 7, next_token([*context, next_token(context)])))
            return False

        await fleet(rig, script, "m0")
        got = await rig.run(rig.request(COUNT))
        assert got.tokens[0] == expected(PROMPT, COUNT)
        assert got.finished[0].replays == 1
        await rig.quiet()


async def test_second_first_token_is_dropped() -> None:
    async with Rig() as rig:
        prefill, decode = await rig.add("p0"), await rig.add("d0", step_s=0.002)

        def again(fake: Fake, sequence: Sequence, index: int) -> bool:
            token = common_pb2.Token(token_id=next_token(list(ids_from_bytes(sequence.tokens))), output_index=0)
            fake.put(sequence, first_token=prefill_pb2.FirstToken(token=token, lease_id=9, epoch=1))
            return False

        prefill.script = again
        got = await rig.run(rig.request(COUNT))
        assert got.tokens[0] == expected(PROMPT, COUNT)
        await rig.quiet()
        assert decode.begins == 1


async def test_worker_that_died_under_a_request_gets_it_no_more_while_others_live() -> None:
    async with Rig() as rig:

        def script(fake: Fake, sequence: Sequence, index: int) -> bool:
            if index == 3 and sequence.attempt == 0:
                rig.service.fleet.workers[fake.name].link.close()
                return True
            if index == 6 and sequence.attempt == 1:
                asyncio.get_running_loop().call_later(0.3, fail, fake, sequence)
                return True
            return False

        def fail(fake: Fake, sequence: Sequence) -> None:
            assert set(rig.service.fleet.workers) == {"m0", "m1"}
            fake.put(sequence, failure=common_pb2.Failure(code=10, message="again", retryable=True))

        fakes = await fleet(rig, script, "m0", "m1")
        got = await rig.run(rig.request(COUNT))
        assert got.tokens[0] == expected(PROMPT, COUNT)
        assert got.finished[0].replays == 2
        assert sorted([start.attempt for start in fake.starts] for fake in fakes) == [[0], [1, 2]]


async def test_returning_worker_is_served_again() -> None:
    async with Rig() as rig:
        fake = await rig.add("m0")
        rig.service.fleet.workers["m0"].link.close()
        await until(lambda: "m0" in rig.service.fleet.workers and rig.service.fleet.workers["m0"].load.ready)
        got = await rig.run(rig.request(4))
        assert got.tokens[0] == expected(PROMPT, 4)
        assert fake.starts
