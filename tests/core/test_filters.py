"""Filters: the fast one and the one that gives reasons say the same."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from headway.core.filters import Rules
from tests.core.test_place import WORKERS, ask, worker

RULES = Rules(block_size=16, max_queued=10)


@given(st.lists(WORKERS, max_size=8), st.sets(st.sampled_from(["p0", "d1", "m2"])), st.integers(1, 400))
def test_able_are_those_that_are_not_refused(workers: list, excluded: set[str], tokens: int) -> None:  # type: ignore[type-arg]
    wanted = ask(excluded=frozenset(excluded), prompt_tokens=tokens)
    able = RULES.able(wanted, workers)
    assert able == [load for load in workers if RULES.refused(wanted, load) is None]


def test_reasons_are_sentences() -> None:
    wanted = ask(excluded=frozenset({"d3"}))
    loads = [
        worker("d0", ready=False),
        worker("d1", draining=True),
        worker("d2", total_slots=3),
        worker("d3"),
        worker("d4", reported=10),
    ]
    sentences = [refusal.sentence for load in loads if (refusal := RULES.refused(wanted, load))]
    assert sentences == [
        "not ready",
        "draining",
        "the prompt needs 7 slots, its node has 3",
        "failed this request before",
        "its queue is full (10 waiting)",
    ]
    assert RULES.no_partner(wanted, loads).sentence.startswith("no decode worker can take it (d0: not ready; d1:")
    assert RULES.no_partner(wanted, []).sentence == "there is no decode worker"
