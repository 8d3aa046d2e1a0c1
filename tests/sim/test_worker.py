"""Simulated workers against step-by-step accounts of what they should do."""

from __future__ import annotations

import math
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from headway.core.order import Order, Rule
from headway.core.predict import Predictor
from headway.core.step import StepLimits
from headway.sim.clock import Clock
from headway.sim.hardware import Linear
from headway.sim.node import SimNode
from headway.sim.sequence import SimSequence
from headway.sim.trace import TraceRequest
from headway.sim.worker import SimWorker

HARDWARE = Linear("h", "", Predictor((0.5, 0.01, 0.0), (1.0, 0.1, 0.001)), 8, 100_000, batch=4)
WHOLE = StepLimits(batch=1, chunk_tokens=1 << 40, chunk_s=math.inf)


class Bench:
    """A worker of its own, and what it told."""

    def __init__(self, limits: StepLimits = WHOLE, order: Order | None = None, hardware: Linear = HARDWARE) -> None:
        self.clock = Clock()
        self.node = SimNode("n", 1000, lambda *_: None, lambda *_: None)
        self.told: list[tuple[str, int, float]] = []
        self.worker = SimWorker(
            "w", self.node, self.clock, hardware, 10, limits, order or Order(Rule.ARRIVAL),
            *(self._tell(kind) for kind in ("started", "chunk", "drawn", "ended")),
        )  # fmt: skip

    def _tell(self, kind: str) -> Any:
        return lambda sequence: self.told.append((kind, sequence.number, round(self.clock.now_s, 9)))

    def times(self, kind: str) -> dict[int, float]:
        return {number: time for what, number, time in self.told if what == kind}


def sequence(number: int, prompt: int = 100, output: int = 1, arrival_s: float = 0.0, **fields: Any) -> SimSequence:
    return SimSequence(number, TraceRequest(arrival_s, prompt, output, fields.pop("keys", ())), **fields)


def test_whole_prompts_one_after_the_other() -> None:
    bench = Bench()
    for number in range(3):
        bench.worker.submit(sequence(number, 100, arrival_s=number / 10))
    bench.clock.run()
    assert bench.times("drawn") == {0: 1.5, 1: 3.0, 2: 4.5}
    assert bench.times("started") == {0: 0.0, 1: 1.5, 2: 3.0}
    assert bench.worker.busy_s == pytest.approx(4.5)


def test_what_is_given_up_is_not_computed() -> None:
    bench = Bench()
    made = [sequence(number, 100, arrival_s=number / 10) for number in range(3)]
    for item in made:
        bench.worker.submit(item)
    bench.clock.at(0.5, lambda: bench.worker.cancel(made[0]))
    bench.clock.at(0.5, lambda: bench.worker.cancel(made[1]))
    bench.clock.run()
    # What runs is not stopped, and draws nothing; what waits gives way.
    assert bench.times("drawn") == {2: 3.0}
    assert all(item.refused for item in made[:2])


def test_the_order_decides_who_goes_next() -> None:
    bench = Bench(order=Order(ageing=0.0))
    for number, prompt in enumerate((100, 300, 50)):
        bench.worker.submit(sequence(number, prompt))
    bench.clock.run()
    assert list(bench.times("drawn")) == [0, 2, 1]


def test_a_chunk_lets_a_shorter_one_in_between() -> None:
    bench = Bench(StepLimits(batch=1, chunk_tokens=1 << 40, chunk_s=1.0), Order(ageing=0.0))
    bench.worker.submit(sequence(0, 400))
    bench.clock.at(0.1, lambda: bench.worker.submit(sequence(1, 50)))
    bench.clock.run()
    # 100 tokens, then the short one, then three more chunks: each forward costs half a second beside its tokens.
    assert bench.times("drawn") == {0: pytest.approx(7.0), 1: pytest.approx(2.5)}


def test_cached_tokens_are_not_computed_and_computed_ones_are_cached() -> None:
    bench = Bench()
    keys = [bytes([at]) * 16 for at in range(10)]
    bench.worker.submit(sequence(0, 100, keys=keys))
    again = sequence(1, 100, keys=keys[:5] + [b"x" * 16] * 5)
    bench.worker.submit(again)
    bench.clock.run()
    assert again.cached == 50
    assert bench.times("drawn")[1] == pytest.approx(1.5 + 1.0)


def test_what_is_pulled_is_waited_for_and_others_go_first() -> None:
    bench = Bench()
    late = sequence(0, 100, landed=False)
    bench.worker.submit(late)
    bench.worker.submit(sequence(1, 100, arrival_s=1.0))

    def landed() -> None:
        late.landed = True
        bench.worker.wake()

    bench.clock.at(4.0, landed)
    bench.clock.run()
    assert bench.times("drawn") == {1: 1.5, 0: 5.5}


def test_noise_makes_work_longer() -> None:
    bench = Bench()
    bench.worker.submit(sequence(0, 100, noise=2.0))
    bench.clock.run()
    assert bench.times("drawn") == {0: 3.0}


JOINS = st.lists(st.tuples(st.floats(0, 30), st.integers(1, 50), st.integers(2, 12)), min_size=1, max_size=8)


@given(JOINS)
def test_decode_in_closed_form_equals_decode_step_by_step(joins: list[tuple[float, int, int]]) -> None:
    # Nobody comes at the same moment as another, or as a step ends.
    joins = [(at + number * 0.0137 + 0.00123, prompt, output) for number, (at, prompt, output) in enumerate(joins)]
    bench = Bench()
    for number, (at, prompt, output) in enumerate(joins):
        joining = sequence(number, prompt, output)
        bench.clock.at(at, lambda joining=joining: bench.worker.join(joining))  # type: ignore[misc]
    bench.clock.run()
    ended = bench.times("ended")
    expected = step_by_step(joins)
    assert ended.keys() == expected.keys()
    assert all(ended[number] == pytest.approx(expected[number], abs=1e-6) for number in ended)
    assert sum(tokens for _, tokens in bench.worker.batch.steps) == sum(output - 1 for _, _, output in joins)
    assert (len(bench.worker.batch), bench.worker.batch.kv_tokens) == (0, 0)


def step_by_step(joins: list[tuple[float, int, int]]) -> dict[int, float]:
    """One step after the other, as the engine loop does it."""
    coming = sorted((at, number) for number, (at, _, _) in enumerate(joins))
    running: dict[int, list[int]] = {}
    waiting: list[int] = []
    ended: dict[int, float] = {}
    now_s = 0.0
    while coming or waiting or running:
        if not running and not waiting:
            now_s = max(now_s, coming[0][0])
        while coming and coming[0][0] <= now_s + 1e-12:
            waiting.append(coming.pop(0)[1])
        while waiting and len(running) < HARDWARE.batch:
            number = waiting.pop(0)
            running[number] = [joins[number][1] + 1, joins[number][2] - 1]
        now_s += HARDWARE.step_s(len(running), sum(tokens for tokens, _ in running.values()))
        for number in list(running):
            running[number][0] += 1
            running[number][1] -= 1
            if not running[number][1]:
                ended[number] = now_s
                del running[number]
    return ended


def test_a_sequence_waits_for_room_in_the_kv_memory() -> None:
    tight = Linear("t", "", HARDWARE.predictor, 8, 250, batch=4)
    bench = Bench(hardware=tight)
    for number in range(2):
        bench.worker.join(sequence(number, 150, 10))
    bench.clock.run()
    first, second = bench.times("ended").values()
    assert second == pytest.approx(2 * first, rel=0.01)


def test_a_prompt_beside_decoding_ones_shares_their_steps() -> None:
    limits = StepLimits(batch=4, chunk_tokens=1 << 40, chunk_s=1.0, shared_chunk_s=0.25)
    bench = Bench(limits, Order())
    bench.worker.join(sequence(0, 10, 50))
    prompt = sequence(1, 100)
    bench.clock.at(0.5, lambda: bench.worker.submit(prompt))
    bench.clock.run()
    # From the end of the running step on, four forwards of 25 tokens: 0.75 s each, beside a step of about 1.11 s.
    assert bench.times("drawn")[1] == pytest.approx(1.111 + 4 * (0.75 + 1.113), abs=0.02)
    assert max(seconds for seconds, _ in bench.worker.batch.steps) == pytest.approx(1.87, abs=0.02)
