"""Order and chunking of work: shortest first with ageing, decode before prompts, within the budget."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from headway.core.order import order_key
from headway.core.predict import Predictor
from headway.core.sampling import Sampling
from headway.core.sequence import Finish, Sequence
from headway.core.step import StepLimits, plan_step


def sequence(
    tokens: int, *, computed: int = 0, outputs: int = 0, arrival_s: float = 0.0, priority: int = 0
) -> Sequence:
    return Sequence(
        sequence_id=f"s{tokens}",
        attempt=0,
        tokens=[1] * (tokens + outputs),
        prompt_tokens=tokens,
        namespace=b"n",
        keys=[],
        sampling=Sampling(),
        max_tokens=100,
        stop_token_ids=frozenset({7}),
        arrival_s=arrival_s,
        block_size=4,
        context_tokens=1000,
        computed=computed,
        priority=priority,
        given=tokens,
    )


PREDICTOR = Predictor((0.0, 0.01, 0.0))


def limits(batch: int, tokens: int = 8192, shared_tokens: int = 64) -> StepLimits:
    """Limits whose budgets at 10 ms a token are these."""
    return StepLimits(batch, tokens, 1e6, shared_tokens * 0.01 + 1e-6)


def test_the_budget_of_a_forward_is_one_of_time() -> None:
    assert StepLimits(8, 8192, 0.5, 0.1).budget(0.001, shared=False) == 500
    assert StepLimits(8, 8192, 0.5, 0.1).budget(0.001, shared=True) == 100
    assert StepLimits(8, 8192, 0.5, 0.1).budget(1.0, shared=True) == 16
    assert StepLimits(8, 128, 0.5, 0.1).budget(0.0, shared=False) == 128


def test_decoding_goes_before_prompts_and_shrinks_their_budget() -> None:
    decoding, prompt = sequence(8, computed=8, outputs=1), sequence(100)
    work = plan_step([prompt, decoding], limits(8, 64, 16), PREDICTOR)
    assert [(item.sequence, item.start, item.count) for item in work] == [(decoding, 8, 1), (prompt, 0, 16)]
    assert work[0].draws
    assert not work[1].draws


def test_short_prompts_are_packed_before_a_long_one_that_came_first() -> None:
    long, short, shorter = sequence(500), sequence(20, arrival_s=0.1), sequence(10, arrival_s=0.2)
    work = plan_step([long, short, shorter], limits(8, 64, 16), PREDICTOR)
    assert [(item.sequence, item.count) for item in work] == [(shorter, 10), (short, 20), (long, 34)]


def test_nothing_that_arrives_more_than_four_times_the_work_later_goes_first() -> None:
    long = sequence(100, arrival_s=0.0)
    just_before, just_after = sequence(1, arrival_s=3.9), sequence(1, arrival_s=4.1)
    assert plan_step([long, just_before], limits(1), PREDICTOR)[0].sequence is just_before
    assert plan_step([long, just_after], limits(1), PREDICTOR)[0].sequence is long


def test_priority_beats_length() -> None:
    urgent, short = sequence(100, priority=1), sequence(2)
    assert plan_step([short, urgent], limits(1), PREDICTOR)[0].sequence is urgent


@given(st.lists(st.tuples(st.integers(1, 50), st.integers(0, 1)), max_size=12), st.integers(1, 8), st.integers(1, 64))
def test_plans_stay_within_their_limits(shapes: list[tuple[int, int]], batch: int, budget: int) -> None:
    ready = [sequence(n, computed=n if out else 0, outputs=out) for n, out in shapes]
    work = plan_step(ready, limits(batch, budget), PREDICTOR)
    assert len(work) <= batch
    assert len({item.sequence for item in work}) == len(work)
    prompts = [item for item in work if not item.sequence.decoding]
    assert sum(item.count for item in prompts) <= budget
    assert all(0 < item.count <= item.sequence.pending for item in work)
    assert bool(work) == bool(ready)


def test_order_key_is_remaining_plus_a_quarter_of_arrival() -> None:
    assert order_key(2.0, 4.0) == (0, 3.0)


def test_sealable_blocks_follow_what_is_computed() -> None:
    item = sequence(10)
    item.computed = 9
    first, keys, parent = item.sealable()
    assert (first, len(keys), parent) == (0, 2, b"")
    item.sealed = 2
    item.tokens += [3, 4, 5]
    item.computed = 12
    first, more, parent = item.sealable()
    assert (first, len(more), parent) == (2, 1, keys[-1])


def test_restart_keeps_tokens_and_the_next_output_index() -> None:
    item = sequence(8, computed=10, outputs=3)
    item.restart()
    assert (item.computed, item.pending, item.output_index, item.decoding) == (0, 11, 3, False)


def test_an_answer_ends_at_a_stop_token_or_at_its_length() -> None:
    item = sequence(8, outputs=1)
    assert item.finish_after(7) is Finish.STOP
    assert item.finish_after(1) is None
    item.max_tokens = 1
    assert item.finish_after(1) is Finish.LENGTH
    item.max_tokens, item.context_tokens = 50, 9
    assert item.finish_after(1) is Finish.LENGTH
