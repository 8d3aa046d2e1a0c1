"""Order and chunking of work: shortest first with ageing, decode before prompts, within the budget."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from headway.core.order import Order, Rule
from headway.core.predict import Predictor
from headway.core.sampling import Sampling
from headway.core.sequence import Finish, Sequence
from headway.core.step import StepLimits, Work, plan_step


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
# Each forward costs half a second before its first token.
FIXED = Predictor((0.5, 0.01, 0.0), (0.02, 0.0, 0.0))
Plan = list[Work[Sequence]]


def limits(batch: int, tokens: int = 8192, shared_tokens: int = 64) -> StepLimits:
    """Limits whose budgets at 10 ms a token are these."""
    return StepLimits(batch, tokens, 1e6, shared_tokens * 0.01 + 1e-6)


def plan(ready: list[Sequence], limits: StepLimits, predictor: Predictor = PREDICTOR, ageing: float = 0.1) -> Plan:
    return plan_step(ready, limits, predictor, Order(ageing=ageing))


def test_the_budget_of_a_forward_is_one_of_time() -> None:
    def tokens(limits: StepLimits, predictor: Predictor, *others: Sequence) -> int:
        return plan([sequence(10_000), *others], limits, predictor)[-1].count

    decoding = sequence(8, computed=8, outputs=1)
    fast = Predictor((0.0, 0.001, 0.0))
    assert tokens(StepLimits(8, 8192, 0.5, 0.1), fast) == 500
    assert tokens(StepLimits(8, 8192, 0.5, 0.1), fast, decoding) == 100
    assert tokens(StepLimits(8, 8192, 0.5, 0.1), Predictor((0.0, 1.0, 0.0)), decoding) == 16
    stepping = Predictor((0.0, 0.001, 0.0), (0.1, 0.0, 0.0))
    assert tokens(StepLimits(8, 8192, 0.5, 0.1, itl_s=0.1505), stepping, decoding) == 50
    assert tokens(StepLimits(8, 8192, 0.5, 0.1, itl_s=0.05), stepping, decoding) == 16
    assert tokens(StepLimits(8, 8192, 0.5, 0.1, itl_s=0.05), stepping) == 500
    assert tokens(StepLimits(8, 128, 0.5, 0.1), Predictor()) == 128
    # The forward's own cost is not the chunk's; attention makes later tokens dearer.
    assert tokens(StepLimits(8, 8192, 0.5, 0.1), Predictor((9.0, 0.001, 0.0))) == 500
    assert tokens(StepLimits(8, 8192, 0.5, 0.1), Predictor((0.0, 0.0, 1e-5))) == 316


def test_decoding_goes_before_prompts_and_shrinks_their_budget() -> None:
    decoding, prompt = sequence(8, computed=8, outputs=1), sequence(100)
    work = plan([prompt, decoding], limits(8, 64, 16))
    assert [(item.sequence, item.start, item.count) for item in work] == [(decoding, 8, 1), (prompt, 0, 16)]
    assert work[0].draws
    assert not work[1].draws


def test_a_prompt_has_a_place_beside_a_full_batch() -> None:
    """It would wait for the end of an answer; but no more than one, and none of those that decode beyond the batch."""
    decoding = [sequence(8, computed=8, outputs=1) for _ in range(3)]
    first, second = sequence(10), sequence(11)
    work = plan([*decoding, second, first], limits(2), FIXED)
    assert [item.sequence for item in work] == [*decoding[:2], first]
    assert [item.sequence for item in plan([decoding[0], second, first], limits(2), FIXED)] == [decoding[0], first]


def test_a_short_prompt_goes_alone_where_company_would_only_delay_it() -> None:
    long, short, shorter = sequence(500), sequence(20, arrival_s=0.1), sequence(10, arrival_s=0.2)
    assert [(item.sequence, item.count) for item in plan([long, short, shorter], limits(8, 64))] == [(shorter, 10)]


def test_prompts_share_a_forward_where_its_fixed_cost_outweighs_the_delay() -> None:
    long, short, shorter = sequence(500), sequence(20, arrival_s=0.1), sequence(10, arrival_s=0.2)
    work = plan([long, short, shorter], limits(8), FIXED)
    assert [(item.sequence, item.count) for item in work] == [(shorter, 10), (short, 20)]


def test_prompts_that_cost_nothing_share_a_forward() -> None:
    work = plan([sequence(30), sequence(20), sequence(10)], limits(8), Predictor())
    assert [item.count for item in work] == [30, 20, 10]


def test_nothing_that_arrives_more_than_the_ageing_allows_later_goes_first() -> None:
    long = sequence(100, arrival_s=0.0)
    just_before, just_after = sequence(1, arrival_s=3.9), sequence(1, arrival_s=4.1)
    assert plan([long, just_before], limits(1), ageing=0.25)[0].sequence is just_before
    assert plan([long, just_after], limits(1), ageing=0.25)[0].sequence is long


@given(
    st.lists(st.tuples(st.integers(1, 500), st.floats(0, 1000)), min_size=2, max_size=20),
    st.sampled_from([0.05, 0.1, 0.25, 1.0]),
)
def test_nothing_overtakes_beyond_the_ageing_bound(shapes: list[tuple[int, float]], ageing: float) -> None:
    ready = [sequence(tokens, arrival_s=arrival_s) for tokens, arrival_s in shapes]
    first = plan(ready, limits(1), ageing=ageing)[0].sequence
    for other in ready:
        remaining_s = PREDICTOR.prefill_s(other.pending, other.computed)
        assert first.arrival_s <= other.arrival_s + remaining_s / ageing + 1e-6


def test_priority_beats_length() -> None:
    urgent, short = sequence(100, priority=1), sequence(2)
    assert plan([short, urgent], limits(1))[0].sequence is urgent


def test_arrival_and_wspt_are_orders_too() -> None:
    early, short = sequence(100, arrival_s=1.0), sequence(10, arrival_s=2.0)
    weighty = sequence(18, arrival_s=3.0, priority=1)
    ready = [weighty, short, early]
    by_arrival = plan_step([short, early], limits(1), PREDICTOR, Order(Rule.ARRIVAL))
    assert by_arrival[0].sequence is early
    assert plan_step(ready, limits(1), PREDICTOR, Order(Rule.WSPT))[0].sequence is weighty


def test_a_tenant_in_debt_waits_for_the_others() -> None:
    flood, other = sequence(1), sequence(100)
    flood.tenant, other.tenant = "flood", "other"
    work = plan_step([flood, other], limits(1), PREDICTOR, Order(), {"flood": 2.0, "other": 0.0})
    assert work[0].sequence is other


@given(
    st.lists(st.tuples(st.integers(1, 50), st.integers(0, 1)), max_size=12),
    st.integers(1, 8),
    st.integers(1, 64),
    st.sampled_from([PREDICTOR, FIXED, Predictor()]),
)
def test_plans_stay_within_their_limits(
    shapes: list[tuple[int, int]], batch: int, budget: int, predictor: Predictor
) -> None:
    ready = [sequence(n, computed=n if out else 0, outputs=out) for n, out in shapes]
    work = plan(ready, limits(batch, budget), predictor)
    decoding = min(batch, sum(sequence.decoding for sequence in ready))
    assert sum(item.sequence.decoding for item in work) == decoding
    assert len(work) - decoding <= max(1, batch - decoding)
    assert len({item.sequence for item in work}) == len(work)
    prompts = [item for item in work if not item.sequence.decoding]
    assert sum(item.count for item in prompts) <= budget
    assert all(0 < item.count <= item.sequence.pending for item in work)
    assert all(item.draws == (item.count == item.sequence.pending) for item in work)
    assert bool(work) == bool(ready)
    # Less than a block is worth no place in a forward, unless it is all that is left, or nothing else moves.
    assert all(item.count >= min(16, item.sequence.pending) for item in prompts[1:])


def test_the_key_is_remaining_plus_aged_arrival_plus_debt() -> None:
    assert Order(ageing=0.25).key(2.0, 10, 4.0) == (0, 3.0)
    assert Order(ageing=0.25).key(2.0, 10, 4.0, 1, 0.5) == (-1, 3.5)


def test_a_prompt_whose_prefix_was_just_computed_is_as_short_as_its_rest() -> None:
    chain = [bytes([at]) * 16 for at in range(25)]
    long, other = sequence(100), sequence(80)
    long.keys, other.keys = chain, [b"x" * 16] * 20
    assert plan([long, other], limits(1))[0].sequence is other
    long.may_have(chain[:22])
    assert long.likely == 88
    assert plan([long, other], limits(1))[0].sequence is long
    # All but one token at most, and nothing that it does not begin with.
    long.may_have(chain)
    assert long.likely == 99
    other.may_have(chain)
    assert other.likely == 0


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
