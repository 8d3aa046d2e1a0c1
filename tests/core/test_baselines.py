"""The field's policies: that each picks what its formula says."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import pytest

from headway.core.ask import Ask
from headway.core.backlog import Prompt
from headway.core.baselines import BASELINES
from headway.core.links import Links
from headway.core.load import WorkerLoad
from headway.core.policy import Planner, Way
from tests.core.placing import KEYS, worker

BLOCK = 16
PLANNER = Planner(Links(0.0, 1e3), token_bytes=1, block_size=BLOCK)


def prefills(count: int = 3) -> list[WorkerLoad]:
    return [worker(f"p{at}", node=f"n{at}") for at in range(count)]


def queue(load: WorkerLoad, *seconds: float, tokens: int = 100) -> None:
    for took_s in seconds:
        load.backlog.add(Prompt((load.worker_id, len(load.backlog)), (0, took_s), took_s, tokens), 0.0)


def pick(name: str, ask: Ask, loads: Sequence[WorkerLoad]) -> Way:
    """What a new policy of that name picks; its lots rise, so that the first of equals wins."""
    lots = itertools.count()
    policy = BASELINES[name](PLANNER, lambda: next(lots) / 1e6)
    return policy.pick(ask, [(load, ask.own_tokens(load.worker_id, load.node)) for load in loads], 0.0)


def test_round_robin_takes_turns() -> None:
    loads = prefills()
    loads[0].sent, loads[2].sent = 2, 1
    assert pick("round-robin", Ask(100), loads).load is loads[1]


@pytest.mark.parametrize("name", ["least-loaded", "power-of-two"])
def test_load_is_tokens_whether_they_are_cached_or_not(name: str) -> None:
    loads = prefills(2)
    queue(loads[0], 0.1, tokens=300)
    queue(loads[1], 0.5, 0.5, tokens=100)
    way = pick(name, Ask(100, resident={"n0": 90, "n1": 90}), loads)
    assert way.load is loads[1]
    # It books the whole prompt, cached or not.
    assert way.overlap == 0


def test_prefix_affinity_follows_the_prefix_into_any_queue() -> None:
    loads = prefills()
    queue(loads[1], *[1.0] * 50)
    assert pick("prefix-affinity", Ask(100, resident={"n0": 32, "n1": 48}), loads).load is loads[1]


def test_the_reference_counts_queued_and_own_uncached_blocks() -> None:
    loads = prefills(2)
    queue(loads[0], 0.1, tokens=64)
    # 64 + 36 against 0 + 100, then against 0 + 80.
    assert pick("reference", Ask(101, resident={"n0": 80}), loads).load is loads[0]
    assert pick("reference", Ask(101, resident={"n0": 80, "n1": 40}), loads).load is loads[1]


def test_the_references_conditional_disaggregation_needs_little_left_and_little_of_the_prompt() -> None:
    loads = [*prefills(1), worker("d0", node="d"), worker("d1", node="e")]
    loads[1].memory.committed_tokens = 10
    assert pick("reference-local", Ask(3000, resident={"e": 1000}), loads).load is loads[2]
    assert pick("reference-local", Ask(3000, resident={"e": 800}), loads).load is loads[0]
    assert pick("reference-local", Ask(3500, resident={"e": 1400}), loads).load is loads[0]
    assert pick("reference-local", Ask(3000, resident={"d": 1000}), loads).load is loads[0]


def test_llm_d_weighs_the_prefix_twice_as_much_as_the_queue() -> None:
    loads = prefills(2)
    queue(loads[0], 0.1, 0.1)
    # 2 · 0.6 + 0 against 0 + 1, then 2 · 0.4.
    assert pick("llm-d", Ask(100, resident={"n0": 60}), loads).load is loads[0]
    assert pick("llm-d", Ask(100, resident={"n0": 40}), loads).load is loads[1]


def test_mooncake_transfers_what_is_over_its_threshold() -> None:
    loads = prefills(2)
    queue(loads[0], 5.0)
    pulled = pick("mooncake", Ask(200, resident={"n0": 150, "n1": 90}), loads)
    assert (pulled.load, pulled.pull_from, pulled.overlap) == (loads[1], "n0", 150)
    local = pick("mooncake", Ask(200, resident={"n0": 150, "n1": 110}), loads)
    assert (local.load, local.pull_from, local.overlap) == (loads[1], None, 110)


class TestSgLang:
    def test_a_prompt_goes_where_over_half_of_it_was_sent_else_to_the_smallest_tree(self) -> None:
        loads = prefills()
        policy = BASELINES["sglang"](PLANNER, lambda: 0.0)
        candidates = [(load, 0) for load in loads]

        def goes(keys: Sequence[bytes]) -> str:
            return policy.pick(Ask(len(keys) * BLOCK, keys=keys), candidates, 0.0).load.worker_id

        assert [goes(KEYS[:8]), goes(KEYS[20:24]), goes(KEYS[30:36])] == ["p0", "p1", "p2"]
        # Five of eight; four of eight is not over a half: the smallest tree is p1's.
        assert goes([*KEYS[:5], *KEYS[40:43]]) == "p0"
        assert goes([*KEYS[:4], *KEYS[44:48]]) == "p1"
        # p1's has twelve blocks now.
        assert goes(KEYS[50:51]) == "p2"

    def test_the_match_is_of_tokens(self) -> None:
        """One block of two, of which the second has a single token, is more than half of the prompt."""
        policy = BASELINES["sglang"](PLANNER, lambda: 0.0)
        candidates = [(load, 0) for load in prefills(2)]
        policy.pick(Ask(BLOCK, keys=KEYS[:1]), candidates, 0.0)
        assert policy.pick(Ask(BLOCK + 1, keys=KEYS[:2]), candidates, 0.0).load.worker_id == "p0"
        assert policy.pick(Ask(BLOCK * 2, keys=[KEYS[0], KEYS[9]]), candidates, 0.0).load.worker_id == "p1"

    def test_an_imbalance_of_requests_that_have_not_ended_overrides_the_match(self) -> None:
        loads = prefills(2)
        policy = BASELINES["sglang"](PLANNER, lambda: 0.0)
        candidates = [(load, 0) for load in loads]
        ask = Ask(BLOCK * 4, keys=KEYS[:4])
        assert policy.pick(ask, candidates, 0.0).load is loads[0]
        loads[0].sent = 32
        assert policy.pick(ask, candidates, 0.0).load is loads[0]
        loads[0].sent = 33
        assert policy.pick(ask, candidates, 0.0).load is loads[1]
        loads[0].sent, loads[0].over = 40, 8
        assert policy.pick(ask, candidates, 0.0).load is loads[0]
        # 370 against 337 is not a tenth more.
        loads[0].sent, loads[0].over, loads[1].sent = 370, 0, 337
        assert policy.pick(ask, candidates, 0.0).load is loads[0]

    def test_trees_forget_what_was_sent_longest_ago(self, monkeypatch: pytest.MonkeyPatch) -> None:
        policy = BASELINES["sglang"](PLANNER, lambda: 0.0)
        monkeypatch.setattr(type(policy), "most_tokens", 4 * BLOCK)
        candidates = [(load, 0) for load in prefills(1)]
        policy.pick(Ask(BLOCK * 3, keys=KEYS[:3]), candidates, 0.0)
        policy.pick(Ask(BLOCK * 3, keys=KEYS[10:13]), candidates, 0.0)
        assert [len(tree) for tree in policy._trees.values()] == [4]  # type: ignore[attr-defined]
        assert KEYS[0] in policy._trees["p0"]  # type: ignore[attr-defined]
        assert KEYS[2] not in policy._trees["p0"]  # type: ignore[attr-defined]
