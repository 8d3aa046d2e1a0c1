"""The simulated engine: tokens are a pure function of context, whatever the chunks, slots and batches."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from headway.core.sampling import Sampling
from headway.engine.contract import Chunk, Draw, Drawn
from headway.engine.simulated import Latency, SimulatedEngine, expected_tokens, simulated_card

BLOCK = 16


def run(prompt: list[int], cuts: list[int], count: int, seed: int = 0, *, temperature: float = 0.0) -> list[int]:
    """Prefill in chunks that end at `cuts`, then decode `count` tokens, in shuffled slots."""
    engine = SimulatedEngine(simulated_card(), sleep=lambda seconds: None)
    slab = np.full((64, 4096), 255, np.uint8)
    engine.bind(slab)
    slots = np.random.default_rng(seed).permutation(64).astype(np.int32)
    tokens, out = list(prompt), []
    edges = sorted({0, len(prompt), *(cut % len(prompt) for cut in cuts)})
    sampling = Sampling(temperature=temperature, seed=seed)
    for start, end in itertools.pairwise(edges):
        draw = Draw(sampling, 0) if end == len(prompt) else None
        result = engine.forward([Chunk(tokens[start:end], start, slots, draw)])[0]
    for index in range(1, count + 1):
        assert result is not None
        tokens.append(result.token_id)
        out.append(result.token_id)
        chunk = Chunk([tokens[-1]], len(tokens) - 1, slots, Draw(sampling, index))
        result = engine.forward([chunk])[0]
    return out


@given(
    st.lists(st.integers(0, 255), min_size=1, max_size=200),
    st.lists(st.integers(0, 1000), max_size=5),
    st.integers(0, 99),
    st.sampled_from([0.0, 1.0]),
)
def test_any_chunking_gives_the_expected_tokens(
    prompt: list[int], cuts: list[int], seed: int, temperature: float
) -> None:
    sampling = Sampling(temperature=temperature, seed=seed)
    expected = expected_tokens(prompt, 20, lambda index: Draw(sampling, index))
    assert run(prompt, cuts, 20, seed, temperature=temperature) == expected


def test_one_wrong_byte_in_any_block_changes_the_answer() -> None:
    engine = SimulatedEngine(simulated_card())
    slab = np.zeros((8, 4096), np.uint8)
    engine.bind(slab)
    slots = np.arange(8, dtype=np.int32)
    prompt = list(range(100))
    engine.forward([Chunk(prompt, 0, slots, None)])
    steps = [[Chunk([token], 100, slots, Draw(Sampling(), 0))] for token in range(8)]

    def answers() -> list[int]:
        return [drawn.token_id for step in steps for drawn in engine.forward(step) if drawn]

    undisturbed = answers()
    for block in range(6):
        slab[block, 120] ^= 1
        assert answers() != undisturbed, f"a wrong byte in block {block} went unnoticed"
        slab[block, 120] ^= 1
    assert answers() == undisturbed


@pytest.mark.parametrize(("asked", "named"), [(None, 0), (0, 0), (3, 1)])
def test_log_probabilities_come_where_they_are_asked_for(asked: int | None, named: int) -> None:
    engine = SimulatedEngine(simulated_card())
    engine.bind(np.zeros((1, 4096), np.uint8))
    draw = Draw(Sampling(), 0, top_logprobs=asked)
    (drawn,) = engine.forward([Chunk([1, 2], 0, np.zeros(1, np.int32), draw)])
    assert isinstance(drawn, Drawn)
    assert (drawn.logprob is None) == (asked is None)
    assert len(drawn.top_logprobs) == named


def test_latency_follows_its_formula() -> None:
    slots = np.zeros(1, np.int32)
    latency = Latency((1.0, 0.1, 0.01), (2.0, 0.5, 0.001))
    step, first = (Draw(Sampling(), index) for index in (1, 0))
    chunks = [Chunk([1, 2, 3], 10, slots, None), Chunk([1], 100, slots, step), Chunk([1], 200, slots, step)]
    assert latency.of(chunks) == pytest.approx(1.0 + 0.1 * 3 + 0.01 * 3 * 11.5 + 2.0 + 0.5 * 2 + 0.001 * 300)
    # The last token of a prompt that is cached but for that one.
    assert latency.of([Chunk([1], 10, slots, first)]) == pytest.approx(1.0 + 0.1 + 0.01 * 10.5)


class Clock:
    """Time that passes where somebody sleeps, and each time a little longer than asked for."""

    def __init__(self, late_s: float) -> None:
        self.now_s = 0.0
        self._late_s = late_s

    def __call__(self) -> float:
        return self.now_s

    def sleep(self, seconds: float) -> None:
        self.now_s += seconds + self._late_s


def test_a_thread_that_wakes_late_makes_the_simulated_device_no_slower() -> None:
    clock = Clock(late_s=0.004)
    latency = Latency(prefill=(0.05, 0.0, 0.0))
    engine = SimulatedEngine(simulated_card(), latency, sleep=clock.sleep, clock=clock)
    engine.bind(np.zeros((4, 4096), np.uint8))
    chunk = Chunk([1, 2], 0, np.arange(4, dtype=np.int32), None)
    for _ in range(10):
        engine.forward([chunk])
        # The worker's own time between two forwards counts.
        clock.now_s += 0.002
    assert clock.now_s == pytest.approx(10 * (0.05 + 0.002) + 0.004)
    # A device that had nothing to do cannot make up for anything.
    clock.now_s = 100.0
    engine.forward([chunk])
    assert clock.now_s == pytest.approx(100.054)
