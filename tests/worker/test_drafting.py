"""Drafts in the loop: several tokens a step, each once and in order, and nothing left of those that were wrong."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Callable, Sequence

import numpy as np
import pytest

from headway.core.drafts import MOST_DRAFTS
from headway.core.fit import Timing
from headway.core.keys import block_keys
from headway.core.step import StepLimits
from headway.engine.simulated import PRINTABLE
from headway.worker.active import Active
from headway.worker.drafting import AT_ONCE, PLAIN, Drafting, drafting_of, room
from tests.worker.rig import Bench, Heard, expected, sequence, until_over

PROMPT = list(range(1, 40))


class Oracle(Drafting):
    """Drafts what the answer to PROMPT will be, up to `most` tokens a step; `spoil` may make some of them wrong."""

    def __init__(self, most: int, spoil: Callable[[int], int] = lambda token: token) -> None:
        super().__init__(1.0)
        self._most, self._spoil = most, spoil

    def drafts(self, actives: Sequence[Active], timing: Timing) -> list[list[int]]:
        found = []
        for active in actives:
            done = active.sequence.output_index
            answer = expected(active.sequence.tokens[: active.sequence.prompt_tokens], 100)
            found.append([self._spoil(token) for token in answer[done : done + min(self._most, room(active))]])
        return found


def sometimes_wrong() -> Callable[[int], int]:
    draw = random.Random(1)
    return lambda token: 32 + (token - 32 + (draw.random() < 0.3)) % PRINTABLE


def bench(drafting: Drafting) -> Bench:
    return Bench(StepLimits(8, 64), timing=Timing(step=(0.02, 0.002, 0.0)), drafting=drafting)


async def answer(used: Bench, max_tokens: int = 40, stop: int | None = None) -> Heard:
    heard, asked = Heard(), sequence(PROMPT, max_tokens)
    if stop is not None:
        asked.stop_token_ids = frozenset([stop])
    used.loop.start(asked, heard)
    await until_over(heard)
    return heard


async def test_drafts_that_are_right_take_fewer_forwards_for_the_same_tokens() -> None:
    async with bench(Oracle(3)).running() as used:
        heard = await answer(used, 41)
    assert heard.tokens == expected(PROMPT, 41)
    assert heard.indexes == list(range(41))
    assert used.engine.batches == [[39], *[[4]] * 10]


async def test_wrong_drafts_change_nothing_and_are_never_sealed() -> None:
    """Over many blocks: K and V of a wrong draft stand where the right token's have to come."""
    async with bench(Oracle(9, sometimes_wrong())).running() as used:
        heard = await answer(used, 200)
        await asyncio.sleep(0.01)
    assert heard.tokens[:100] == expected(PROMPT, 200)[:100]
    assert heard.tokens == expected(PROMPT, 200)
    assert heard.indexes == list(range(200))
    assert len(used.engine.batches) < 150
    assert used.store.sealed == block_keys(b"n", (PROMPT + expected(PROMPT, 200))[:-1], 16)
    assert not used.store.leases
    assert len(used.store.free) == 64


async def test_nothing_follows_a_stop_token_that_was_drafted() -> None:
    tokens = expected(PROMPT, 100)
    at = next(at for at in range(8, 40) if tokens.index(tokens[at]) == at)
    for most in (1, 2, 3, 5, 9):
        async with bench(Oracle(most)).running() as used:
            heard = await answer(used, 100, stop=tokens[at])
            await asyncio.sleep(0.01)
        assert heard.tokens == tokens[: at + 1]
        assert used.store.sealed == block_keys(b"n", (PROMPT + tokens[: at + 1])[:-1], 16)


@pytest.mark.parametrize("max_tokens", [1, 2, 3, 7, 16, 33])
async def test_an_answer_is_never_longer_than_asked(max_tokens: int) -> None:
    async with bench(Oracle(9)).running() as used:
        heard = await answer(used, max_tokens)
    assert heard.tokens == expected(PROMPT, max_tokens)
    # Nothing is computed past the end either.
    assert sum(rows for (rows,) in used.engine.batches[1:]) == max_tokens - 1


async def test_a_cancel_while_drafts_are_computed_ends_the_sequence() -> None:
    async with bench(Oracle(3)).running() as used:
        used.engine.gate = type(used.engine.gate)(1)
        heard = Heard()
        active = used.loop.start(sequence(PROMPT), heard)
        while len(used.engine.batches) < 1:
            await asyncio.sleep(0.001)
        while not active.stepping or not heard.tokens:
            await asyncio.sleep(0.001)
        used.loop.cancel(active)
        used.engine.gate.release(100)
        while used.loop.actives:
            await asyncio.sleep(0.001)
        await asyncio.sleep(0.01)
        assert heard.tokens == expected(PROMPT, 1)
        assert not used.store.leases


async def test_a_sequence_that_gives_way_between_drafts_goes_on_where_it_stood() -> None:
    async with bench(Oracle(5, sometimes_wrong())).running() as used:
        heard = Heard()
        active = used.loop.start(sequence(PROMPT, 80), heard)
        for _ in range(5):
            before = len(heard.tokens)
            while len(heard.tokens) == before and not heard.over.is_set():
                await asyncio.sleep(0.001)
            used.loop.leases.reclaim(active.lease_id)
        await until_over(heard)
    assert heard.tokens == expected(PROMPT, 80)
    assert heard.indexes == list(range(80))


async def test_beside_a_prompt_nothing_is_drafted() -> None:
    async with bench(Oracle(3)).running() as used:
        first, second = Heard(), Heard()
        used.loop.start(sequence(PROMPT, 60), first)
        while not first.tokens:
            await asyncio.sleep(0)
        used.loop.start(sequence(list(range(50, 190)), 8), second)
        await until_over(first)
        await until_over(second)
    assert first.tokens == expected(PROMPT, 60)
    mixed = [batch for batch in used.engine.batches if len(batch) == 2 and max(batch) > 10]
    assert mixed
    assert all(batch[0] == 1 for batch in mixed)


def test_drafts_pay_by_what_was_measured_and_a_step_now_and_then_has_none() -> None:
    drafting, timing = Drafting(1.0), Timing(step=(0.02, 0.003, 0.0))
    tokens = [1, 2, 3, 4, 5] * 4
    active = Active(sequence(tokens, 500), Heard(), 0.0)
    active.slots = np.arange(100, dtype=np.int32)

    def counts(steps: int) -> list[int]:
        given = []
        for _ in range(steps):
            (drafts,) = drafting.drafts([active], timing)
            done = len(active.sequence.tokens)
            assert drafts == [(done + at) % 5 + 1 for at in range(len(drafts))]
            given.append(len(drafts))
            active.sequence.tokens.append(done % 5 + 1)
        return given

    assert counts(3 * PLAIN).count(0) == 3
    for _ in range(400):
        # A draft turns out to cost as much as eight sequences.
        timing.draft.observe(4, 4 * 0.05, 0.003)
    assert counts(20) == [0] * 20
    for _ in range(2000):
        timing.draft.fade()
    assert counts(PLAIN).count(0) == 1


def test_the_setting_says_whether_drafts_have_to_pay() -> None:
    costly = Timing(step=(0.02, 0.02, 0.0))
    counts = {}
    for setting in ("auto", "always", "off"):
        active = Active(sequence([1, 2, 3, 4, 5] * 4, 500), Heard(), 0.0)
        active.slots = np.arange(100, dtype=np.int32)
        drafting = drafting_of(setting, 0.1)
        counts[setting] = len(drafting.drafts([active], costly)[0]) if drafting else None
    assert counts == {"auto": 0, "always": MOST_DRAFTS, "off": None}


def test_what_a_step_looks_up_is_bounded_and_long_prompts_come_bit_by_bit() -> None:
    drafting, timing = Drafting(1.0), Timing(step=(0.02, 0.003, 0.0))
    prompt = list(range(AT_ONCE // 2))
    actives = [Active(sequence([*prompt, *prompt, 5, 6], 500), Heard(), 0.0) for _ in range(6)]
    for active in actives:
        active.slots = np.arange(400, dtype=np.int32)
    taken = []
    for _ in range(9):
        found = drafting.drafts(actives, timing)
        assert all(drafts == list(range(7, 7 + len(drafts))) for drafts in found)
        taken.append(sum(active.lookup._taken for active in actives if active.lookup))
    assert np.diff([0, *taken]).max() == AT_ONCE
    assert all(found)
    assert taken[-1] == 6 * (AT_ONCE + 2)
