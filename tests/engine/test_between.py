"""Between two layers of a forward another one may run: neither computes anything else for it."""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import numpy as np
import numpy.typing as npt
import pytest

from headway.core.sampling import Sampling
from headway.engine.contract import Chunk, Draw, Engine
from headway.engine.load import load_engine
from headway.engine.simulated import SimulatedEngine, simulated_card
from tests.engine.tiny import FAMILIES, save_model

LONG, SHORT = [3 + at % 50 for at in range(70)], [9, 8, 7, 6, 5]
SLOTS = 16
# A model of the common shape, and one that its own modules compute.
KINDS = {"lean": "llama", "stock": "granite"}


@pytest.fixture(scope="module", params=sorted(KINDS))
def engine(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Engine:
    family = KINDS[request.param]
    return load_engine(str(save_model(tmp_path_factory.mktemp(family), FAMILIES[family]())))


def bound(engine: Engine) -> npt.NDArray[np.uint8]:
    """A slab full of NaN."""
    slab = np.full((SLOTS, -(-engine.card.kv_format.slot_bytes // 4096) * 4096), 0xFF, np.uint8)
    engine.bind(slab)
    return slab


def chunk(tokens: list[int], position: int, slots: range, draws: bool = True, name: str | None = None) -> Chunk:
    draw = Draw(Sampling(), 0, top_logprobs=3) if draws else None
    return Chunk(tokens, position, np.array(slots, np.int32), draw, name)


def layers(engine: Engine) -> int:
    return sum(group.layers for group in engine.card.kv_format.groups)


@pytest.mark.parametrize("begun", [0, 33])
def test_a_guest_and_its_host_compute_what_they_compute_alone(engine: Engine, begun: int) -> None:
    """begun: tokens of both that earlier chunks computed, so that attention gathers them from the slab."""
    host_slots, guest_slots = range(8), range(8, 13)
    other = [40 + token for token in LONG[:begun]] + SHORT
    host = [chunk(LONG[begun:], begun, host_slots)]
    guest = [chunk(other[begun:], begun, guest_slots)]

    def start() -> npt.NDArray[np.uint8]:
        slab = bound(engine)
        if begun:
            engine.forward([chunk(LONG[:begun], 0, host_slots, draws=False)])
            engine.forward([chunk(other[:begun], 0, guest_slots, draws=False)])
        return slab

    alone = start()
    expected = [engine.forward(host), engine.forward(guest)]
    for when in range(layers(engine) - 1):
        shared, found = start(), []
        calls = itertools.count()

        def between(when: int = when, found: list[object] = found, calls: Iterator[int] = calls) -> None:
            if next(calls) == when:
                found.append(engine.forward(guest))

        assert [engine.forward(host, between), *found] == expected
        assert next(calls) == layers(engine) - 1, "between any two layers, never after the last one"
        assert (shared == alone).all()


def test_no_one_is_let_in_where_a_sequence_takes_a_step(engine: Engine) -> None:
    bound(engine)
    engine.forward([chunk(LONG, 0, range(8))])
    asked: list[None] = []
    engine.forward(
        [chunk([4], len(LONG), range(8), name="a"), chunk(SHORT, 0, range(8, 10))], lambda: asked.append(None)
    )
    assert asked == []
    engine.forward([chunk([4], len(LONG), range(8), name="a")], lambda: asked.append(None))
    assert asked == []


def test_an_error_between_two_layers_is_the_callers(engine: Engine) -> None:
    bound(engine)

    def fail() -> None:
        raise LookupError("not the engine's")

    with pytest.raises(LookupError):
        engine.forward([chunk(SHORT, 0, range(2))], fail)
    assert engine.forward([chunk(SHORT, 0, range(2))]) == engine.forward([chunk(SHORT, 0, range(2))])


def test_who_is_interruptible_says_so(engine: Engine) -> None:
    assert engine.interruptible
    simulated = SimulatedEngine(simulated_card())
    assert not simulated.interruptible
    simulated.bind(np.zeros((4, 4096), np.uint8))
    asked: list[None] = []
    simulated.forward([chunk(SHORT, 0, range(2))], lambda: asked.append(None))
    assert asked == []
