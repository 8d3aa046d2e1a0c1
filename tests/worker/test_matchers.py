"""Constrained sequences in the loop: the same answer in one piece, handed off or preempted; what fails, fails alone."""

from __future__ import annotations

import asyncio
import re
import sys
from collections.abc import AsyncIterator

import grpc
import pytest

from headway.core.sampling import Constraint, ConstraintError, ConstraintKind, Sampling
from headway.core.sequence import Finish
from headway.core.sequence import Sequence as Running
from headway.core.step import StepLimits
from headway.text.constrain import GrammarMatcher
from headway.worker.active import Active
from headway.worker.matchers import Matchers
from tests.worker.rig import Bench, Heard, expected, sequence, until_over

pytest.importorskip("llguidance", reason="llguidance is not installed (pip install .[constrained])")

PROMPT = list(range(40))
WORDS = "([a-z]{3,9} ){6}end"
INVALID, UNABLE = grpc.StatusCode.INVALID_ARGUMENT.value[0], grpc.StatusCode.FAILED_PRECONDITION.value[0]


@pytest.fixture
async def bench() -> AsyncIterator[Bench]:
    async with Bench(StepLimits(8, 64)).running() as running:
        yield running


def held(prompt: list[int], regex: str = WORDS, **sampling: object) -> Running:
    result = sequence(prompt, 100)
    constraint = Constraint(ConstraintKind.REGEX, regex)
    result.sampling = Sampling(constraint=constraint, **sampling)  # type: ignore[arg-type]
    return result


class Ended(Heard):
    """Also hears how it ended."""

    finish: Finish | None = None

    def drawn(self, active: Active, drawn: object, output_index: int, finish: Finish | None) -> None:
        super().drawn(active, drawn, output_index, finish)  # type: ignore[arg-type]
        self.finish = finish


async def answer(bench: Bench, running: Running) -> Ended:
    heard = Ended()
    bench.loop.start(running, heard)
    await until_over(heard)
    return heard


@pytest.mark.parametrize("temperature", [0.0, 1.0])
async def test_the_answer_meets_its_constraint_and_ends_there(bench: Bench, temperature: float) -> None:
    heard = await answer(bench, held(PROMPT, temperature=temperature, seed=3))
    assert re.fullmatch(WORDS, bytes(heard.tokens).decode())
    assert heard.indexes == list(range(len(heard.tokens)))
    assert heard.finish is Finish.STOP
    await asyncio.sleep(0.01)
    assert not bench.store.leases


async def test_others_in_the_batch_are_answered_as_without_it(bench: Bench) -> None:
    heard = [Heard() for _ in range(4)]
    for at, one in enumerate(heard):
        bench.loop.start(held([at] * 20) if at % 2 else sequence([at] * 20), one)
    for one in heard:
        await until_over(one)
    assert [heard[at].tokens for at in (0, 2)] == [expected([at] * 20, 40) for at in (0, 2)]
    assert all(re.fullmatch(WORDS, bytes(heard[at].tokens).decode()) for at in (1, 3))


async def test_max_tokens_ends_it_earlier(bench: Bench) -> None:
    running = held(PROMPT)
    running.max_tokens = 5
    heard = await answer(bench, running)
    assert (len(heard.tokens), heard.finish) == (5, Finish.LENGTH)


async def test_handed_off_replayed_and_preempted_it_is_the_same_answer(bench: Bench) -> None:
    whole = (await answer(bench, held(PROMPT))).tokens
    first, rest = Heard(), Heard()
    bench.loop.start(held(PROMPT), first, joiner="decode-0")
    await until_over(first)
    joined = held(PROMPT)
    joined.tokens.append(first.tokens[0])
    bench.loop.join(joined, rest, lease_id=first.lease_id, epoch=1)
    await until_over(rest)
    assert first.tokens + rest.tokens == whole
    for sent in (1, 17, len(whole) - 1):
        replayed = held(PROMPT)
        replayed.tokens += whole[:sent]
        replayed.given = len(replayed.tokens)
        assert (await answer(bench, replayed)).tokens == whole[sent:]
    bench.store.refuse_extend = True
    assert (await answer(bench, held(PROMPT))).tokens == whole
    assert bench.store.operations.count("acquire") > 5


async def test_nothing_runs_before_its_matcher_is_there(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    """Others run meanwhile; one that is cancelled then gets no matcher."""
    made: list[object] = []
    monkeypatch.setattr(Matchers, "make", lambda self, running, done: made.append((running, done)))
    heard, other = Heard(), Heard()
    bench.loop.start(held(PROMPT), heard)
    cancelled = bench.loop.start(held([9] * 20), Heard())
    bench.loop.start(sequence([7] * 20), other)
    await until_over(other)
    assert not heard.tokens
    bench.loop.cancel(cancelled)
    monkeypatch.undo()
    for running, done in made:  # type: ignore[misc]
        Matchers(bench.engine.card).make(running, done)
    await until_over(heard)
    assert cancelled.matcher is None
    assert re.fullmatch(WORDS, bytes(heard.tokens).decode())


async def test_one_that_cannot_be_compiled_fails_alone(bench: Bench) -> None:
    other = Heard()
    bench.loop.start(sequence([7] * 20), other)
    heard = await answer(bench, held(PROMPT, "["))
    assert heard.failure is not None
    assert (heard.failure.code, heard.failure.retryable) == (INVALID, False)
    assert heard.failure.message == "constraint: unclosed character class"
    await until_over(other)
    assert other.tokens == expected([7] * 20, 40)
    await asyncio.sleep(0.01)
    assert not bench.store.leases


async def test_one_that_fails_on_its_way_fails_alone_and_costs_no_forward(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    allowed = GrammarMatcher.allowed

    def fail_at_5(self: GrammarMatcher, outputs: list[int]) -> object:
        if len(outputs) == 5:
            raise ConstraintError("the constraint is too complex: whatever")
        return allowed(self, outputs)

    monkeypatch.setattr(GrammarMatcher, "allowed", fail_at_5)
    other, heard = Heard(), Heard()
    bench.loop.start(sequence([7] * 20), other)
    bench.loop.start(held(PROMPT), heard)
    await until_over(heard)
    await until_over(other)
    assert heard.failure is not None
    assert (heard.failure.code, heard.failure.retryable) == (INVALID, False)
    assert heard.failure.message == "constraint: the constraint is too complex: whatever"
    assert len(heard.tokens) == 4
    assert other.tokens == expected([7] * 20, 40)
    assert sum(len(batch) for batch in bench.engine.batches) == 40 + 5


async def test_without_the_library_the_worker_says_what_to_install(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "llguidance", None)
    heard = await answer(bench, held(PROMPT))
    assert heard.failure is not None
    assert (heard.failure.code, heard.failure.retryable) == (UNABLE, False)
    assert "pip install 'headway[constrained]'" in heard.failure.message
    assert (await answer(bench, sequence([7] * 20))).tokens == expected([7] * 20, 40)
