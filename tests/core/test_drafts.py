"""Drafts: what a sequence's ending was followed by before, and as many of them as pay."""

from __future__ import annotations

import math
import random
from array import array
from collections.abc import Sequence

from hypothesis import given
from hypothesis import strategies as st

from headway.core import drafts
from headway.core.drafts import ENDINGS, MOST_DRAFTS, NOWHERE, Acceptance, Lookup, share_drafts
from headway.core.fit import DraftCost, ForwardWork, Timing

TOKENS = st.lists(st.integers(0, 2), max_size=60)
# Of these tokens no two endings share an entry of tables for so many.
MOST = 1 << 14


def lookup(tokens: list[int], most: int = MOST) -> Lookup:
    return Lookup(tokens, most, Acceptance(0.95))


def latest(tokens: Sequence[int]) -> list[int]:
    """The places after the latest occurrence of each ending, longest first, by looking at all of them."""
    end, found = len(tokens), []
    for size in (4, 3, 2):
        places = [at for at in range(size, end) if tokens[at - size : at] == tokens[end - size : end]]
        found += places[-1:]
    return found


@given(TOKENS)
def test_the_longest_ending_is_found_where_it_was_last(tokens: list[int]) -> None:
    found = lookup(tokens)
    found.advance(1000)
    places = latest(tokens)
    expected: list[int] = []
    if places:
        for at in range(5):
            expected.append([*tokens, *expected][places[0] + at])
    assert found.drafts(5) == expected


@given(TOKENS, TOKENS)
def test_a_prediction_is_followed_as_long_as_it_holds_and_every_one_is_counted(
    prompt: list[int], answer: list[int]
) -> None:
    tokens = list(prompt)
    known = Acceptance(1.0)
    found = Lookup(tokens, MOST, Acceptance(1.0, known))
    expected: list[tuple[int, bool]] = []
    at, run = None, 0
    for token in answer:
        found.advance(1000)
        at = at if at is not None else next(iter(latest(tokens)), None)
        assert found.drafts(1) == ([] if at is None else [tokens[at]])
        if at is not None:
            held = tokens[at] == token
            expected.append((run, held))
            at, run = (at + 1, run + 1) if held else (None, 0)
        tokens.append(token)
    found.advance(1000)
    for own in (found.acceptance, known):
        assert sum(own._seen) == len(expected)
        assert sum(own._held) == sum(held for _, held in expected)


@given(TOKENS, st.integers(1, 7))
def test_tokens_that_come_several_at_once_are_taken_as_if_one_by_one(tokens: list[int], size: int) -> None:
    one, many = [], []
    single, several = lookup(one), lookup(many)
    for at in range(0, len(tokens), size):
        for token in tokens[at : at + size]:
            one.append(token)
            single.advance(1000)
        # Of a step, all but the last were predicted: only such are taken together.
        several.advance(1000)
        predicted = several.drafts(size)
        kept = 0
        while kept < len(tokens[at : at + size]) and tokens[at : at + size][: kept + 1] == predicted[: kept + 1]:
            kept += 1
        together = min(kept + 1, len(tokens[at : at + size]))
        many += tokens[at : at + together]
        several.advance(1000)
        for token in tokens[at + together : at + size]:
            many.append(token)
            several.advance(1000)
    assert single.drafts(9) == several.drafts(9)
    assert single.acceptance._seen == several.acceptance._seen


def test_a_long_prompt_is_taken_in_part_by_part_and_tables_are_bounded() -> None:
    draw = random.Random(1)
    tokens = [draw.randrange(50_000) for _ in range(3 * drafts.MOST_PLACES)]
    tokens += tokens[-300:-290]
    found = lookup(tokens, 10**9)
    taken = []
    while count := found.advance(700):
        taken.append(count)
    assert sum(taken) == len(tokens)
    assert set(taken[:-1]) == {700}
    assert found.drafts(4) == tokens[-300:-296]
    assert all(len(table) == drafts.MOST_PLACES for table in found._tables)


def test_what_shares_an_entry_is_no_match() -> None:
    """All endings in one entry: only what is checked against the tokens counts."""
    found = lookup([1, 2, 3, 9, 8, 7, 1, 2])
    found._tables = [array("i", [NOWHERE]) for _ in ENDINGS]
    found.advance(1000)
    assert found.drafts(1) == []


@given(TOKENS, st.integers(1, 9))
def test_parts_are_taken_in_as_the_whole_is(tokens: list[int], most: int) -> None:
    whole, parts = lookup(tokens), lookup(tokens)
    whole.advance(1000)
    while parts.advance(most):
        pass
    assert parts._tables == whole._tables


def ready(chance: float) -> Lookup:
    """Predicts something, which so far has held so often."""
    found = Lookup([1, 2, 3, 1, 2], 1000, Acceptance(0.999))
    for run in (0, 1, 2, 4, 8):
        for at in range(400):
            found.acceptance.observe(run, at * chance % 1 + chance >= 1)
    found.advance(1000)
    return found


def test_drafts_come_where_they_gain_more_tokens_a_second_than_the_step_has() -> None:
    sure, unsure, none = ready(0.95), ready(0.1), lookup([1, 2, 3])
    assert share_drafts([(sure, 99), (none, 99)], 0.02, 0.001, math.inf)[0] == MOST_DRAFTS
    assert share_drafts([(sure, 5), (none, 99)], 0.02, 0.002, math.inf) == [5, 0]
    assert share_drafts([(sure, 0)], 0.02, 0.002, math.inf) == [0]
    # One more row for a tenth of a step must hold more than one time in ten.
    assert share_drafts([(unsure, 99)], 0.02, 0.003, math.inf) == [0]
    assert share_drafts([(unsure, 99)], 0.02, 0.0005, math.inf)[0] >= 1
    # With eight beside it, which wait for it, it must gain more than a ninth of what they gain in that time.
    assert share_drafts([(sure, 99), *[(none, 99)] * 8], 0.02, 0.002, math.inf)[0] >= 1
    assert share_drafts([(sure, 99), *[(none, 99)] * 20], 0.02, 0.002, math.inf)[0] == 0
    # Nothing is known of what a step takes.
    assert share_drafts([(sure, 99)], 0.0, 0.0, math.inf) == [0]


@given(
    st.lists(st.tuples(st.sampled_from([0.0, 0.2, 0.6, 0.95]), st.integers(0, 20)), min_size=1, max_size=8),
    st.floats(0.001, 0.1),
    st.floats(1e-5, 0.05),
    st.floats(0.001, 0.2),
)
def test_the_step_stays_within_its_time_and_gains(
    given_: list[tuple[float, int]], step_s: float, row_s: float, most_s: float
) -> None:
    sequences = [(READY[chance], room) for chance, room in given_]
    counts = share_drafts(sequences, step_s, row_s, most_s)
    assert all(0 <= count <= min(room, MOST_DRAFTS) for count, (_, room) in zip(counts, given_, strict=True))
    drafted = sum(counts)
    assert not drafted or step_s + drafted * row_s <= most_s * (1 + 1e-9)
    gained = 0.0
    for count, (found, _) in zip(counts, sequences, strict=True):
        held = 1.0
        for after in range(count):
            held *= found.chance(after)
            gained += held
    rate = len(sequences) / step_s
    assert (len(sequences) + gained) / (step_s + drafted * row_s) >= rate * (1 - 1e-9)


READY = {chance: ready(chance) for chance in (0.0, 0.2, 0.6, 0.95)}


def test_what_a_draft_costs_is_measured_and_forgotten_where_none_are_tried() -> None:
    cost = DraftCost()
    assert cost.seconds(0.002) == 0.002
    for _ in range(200):
        cost.observe(4, 4 * 0.005, 0.002)
    assert 0.0045 < cost.seconds(0.002) <= 0.005
    # A step that another process stopped for a second is no more than eight times the usual.
    cost.observe(4, 1.0, 0.002)
    assert cost.seconds(0.002) < 0.0055
    for _ in range(3000):
        cost.fade()
    assert cost.seconds(0.002) < 0.0021
    for _ in range(2000):
        cost.observe(4, -0.01, 0.002)
    assert cost.seconds(0.002) == 0.002 / 8


def test_steps_with_drafts_say_what_drafts_cost_and_nothing_of_steps_without() -> None:
    for step in ((0.02, 0.002, 0.0), (0.02, 0.0, 0.0)):
        timing = Timing(step=step)
        before = timing.predictor
        for _ in range(300):
            timing.observe(ForwardWork((), 2, 100, 6), timing.predictor.step_s(2, 100) + 6 * 0.004)
        assert 0.0035 < timing.draft_s <= 0.004
        assert timing.predictor == before
        assert timing.step.count == 0
