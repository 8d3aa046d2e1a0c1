"""The default model: greedy output equals transformers' generate on 24 prompts of 1 to 2,000 tokens.

A first run computes the reference (about a minute); later ones take it from pytest's cache.
"""

from __future__ import annotations

import itertools
import os

import pytest

from headway.engine.contract import Engine
from headway.engine.load import load_engine
from tests.engine.drive import Driver, Running
from tests.reference import NEW_TOKENS, check_equal, model_folder, prompts, reference

pytestmark = [pytest.mark.model, pytest.mark.timeout(900)]

WHOLE = itertools.repeat(1 << 30)
Wanted = list[tuple[list[int], list[float]]]


@pytest.fixture(scope="module")
def engine() -> Engine:
    try:
        folder = model_folder()
    except LookupError as error:
        pytest.skip(str(error))
    return load_engine(str(folder), threads=os.cpu_count())


@pytest.fixture(scope="module")
def wanted(engine: Engine) -> Wanted:
    return [reference(prompt) for prompt in prompts()]


@pytest.fixture(scope="module")
def driver(engine: Engine) -> Driver:
    """Slots for every prompt and its outputs, twice over."""
    return Driver(engine, 2 * sum(-(-(len(prompt) + NEW_TOKENS) // 16) for prompt in prompts()))


@pytest.fixture(scope="module")
def cold(driver: Driver, wanted: Wanted) -> list[Running]:
    """Each prompt prefilled alone in one forward, then all decoded in one batch."""
    running = [driver.start(prompt, NEW_TOKENS) for prompt in prompts()]
    driver.prefill(running)
    driver.run(running, NEW_TOKENS, WHOLE)
    return running


def report(excused: list[str]) -> None:
    for line in excused:
        print(line)


def test_prompts_are_as_promised() -> None:
    lengths = [len(prompt) for prompt in prompts()]
    assert (len(lengths), min(lengths), max(lengths)) == (24, 1, 2000)


def test_cold(cold: list[Running], wanted: Wanted) -> None:
    report(check_equal([sequence.outputs for sequence in cold], wanted))


def test_cached_prefix(driver: Driver, cold: list[Running], wanted: Wanted) -> None:
    """Only the last, partial block of each prompt is computed again, packed, and decoded in a batch."""
    running = [driver.start(p, NEW_TOKENS, shared=s) for p, s in zip(prompts(), cold, strict=True)]
    assert all(sequence.computed >= len(sequence.tokens) - 16 for sequence in running)
    report(check_equal(driver.run(running, NEW_TOKENS, WHOLE), wanted))


def test_chunked_and_mixed_with_decode(engine: Engine, wanted: Wanted) -> None:
    """Short prompts decode while long ones are still in chunks of odd sizes."""
    driver = Driver(engine, sum(-(-(len(prompt) + NEW_TOKENS) // 16) for prompt in prompts()), seed=1)
    running = [driver.start(prompt, NEW_TOKENS) for prompt in prompts()]
    report(check_equal(driver.run(running, NEW_TOKENS, itertools.cycle((61, 128, 7, 200))), wanted))


def test_alone(driver: Driver, wanted: Wanted) -> None:
    """A batch of one takes other paths through the kernels."""
    for at in (0, 12, 18):
        outputs = driver.run([driver.start(prompts()[at], NEW_TOKENS)], NEW_TOKENS, WHOLE)
        report(check_equal(outputs, [wanted[at]]))


def test_second_turn(driver: Driver, cold: list[Running]) -> None:
    """Most of the answer and a question more, over the blocks that prefill and decode left."""
    turns = [[*at.tokens[: at.prompt_tokens + 40], *prompts()[5]] for at in cold[10:14]]
    running = [driver.start(turn, 16, shared=at) for turn, at in zip(turns, cold[10:14], strict=True)]
    assert all(later.computed > at.prompt_tokens for later, at in zip(running, cold[10:14], strict=True))
    report(check_equal(driver.run(running, 16, WHOLE), [reference(turn, 16) for turn in turns]))
