"""Drafts change how many forwards an answer takes, and nothing else: whatever is guessed, the same tokens are drawn."""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest

from headway.core.sampling import Sampling
from headway.engine import model, working
from headway.engine.contract import Chunk, Draw, Engine
from headway.engine.load import load_engine
from headway.engine.plan_device import plan_device
from headway.engine.simulated import SimulatedEngine, expected_tokens, simulated_card
from headway.engine.working import Copies
from tests.engine.drive import Driver, Running
from tests.engine.tiny import FAMILIES, VOCABULARY, save_model

NEW = 32
PROMPTS = [list(range(at, 3 * at)) for at in (1, 5, 20, 41, 60)]
PENALISED = Sampling(
    1.0, seed=7, repetition_penalty=1.3, presence_penalty=0.4, frequency_penalty=0.3, bad_words=((3,), (5, 6), (9, 2))
)
SAMPLINGS = [Sampling(), Sampling(0.9, top_p=0.95, seed=3), Sampling(1.3, top_k=20, seed=5), PENALISED]

# From a sequence and what its answer will be: what is guessed of it next.
Guess = Callable[[Running, Sequence[int]], list[int]]


def never_wrong(running: Running, answer: Sequence[int]) -> list[int]:
    """Up to four tokens."""
    done = len(running.outputs)
    return list(answer[done : min(done + 4, NEW - 1)])


class SometimesWrong:
    """Of up to six tokens each is wrong one time in five; sometimes there are none."""

    def __init__(self) -> None:
        self._draw = random.Random(1)

    def __call__(self, running: Running, answer: Sequence[int]) -> list[int]:
        done = len(running.outputs)
        right = answer[done : min(done + self._draw.randrange(7), NEW - 1)]
        return [(token + (self._draw.random() < 0.2)) % VOCABULARY for token in right]


def run(driver: Driver, guess: Guess, answers: Sequence[Sequence[int]], samplings: Sequence[Sampling]) -> int:
    """All together; checks what each sequence got, and gives the number of forwards after the prompts."""
    running = [driver.start(p, NEW + 8, sampling=s) for p, s in zip(PROMPTS, samplings, strict=True)]
    driver.prefill(running)
    by_sequence = dict(zip(running, answers, strict=True))
    forwards = 0
    while active := [at for at in running if len(at.outputs) < NEW]:
        chunks = []
        for at in active:
            drafts = guess(at, by_sequence[at])
            draw = Draw(at.sampling, len(at.outputs), 0, tuple(at.tokens), at.prompt_tokens)
            chunks.append(Chunk([at.tokens[-1], *drafts], at.computed, at.table, draw, at, len(drafts)))
        for at, drawn in zip(active, driver.engine.forward(chunks), strict=True):
            assert drawn is not None
            new = [drawn.token_id, *(one.token_id for one in drawn.then)]
            at.outputs += new
            at.tokens += new
            at.computed += len(new)
        forwards += 1
    assert [at.outputs for at in running] == [list(answer) for answer in answers]
    for at in running:
        driver.end(at)
    return forwards


@pytest.fixture(scope="module")
def engine(tmp_path_factory: pytest.TempPathFactory) -> Engine:
    return load_engine(str(save_model(tmp_path_factory.mktemp("llama"), FAMILIES["llama"]())), threads=1)


def samplings_of(kind: int) -> list[Sampling]:
    """The same for all, or all kinds in one batch."""
    return [SAMPLINGS[(at if kind < 0 else kind) % len(SAMPLINGS)] for at in range(len(PROMPTS))]


def answers_of(engine: Engine, samplings: Sequence[Sampling]) -> list[list[int]]:
    driver = Driver(engine, 100)
    running = [driver.start(p, NEW, sampling=s) for p, s in zip(PROMPTS, samplings, strict=True)]
    return driver.run(running, NEW, itertools.repeat(1 << 30))


@pytest.mark.parametrize("kind", [-1, *range(len(SAMPLINGS))])
def test_whatever_is_guessed_the_answer_is_the_same(engine: Engine, kind: int, monkeypatch: pytest.MonkeyPatch) -> None:
    samplings = samplings_of(kind)
    answers = answers_of(engine, samplings)
    driver = Driver(engine, 150, seed=1)
    assert run(driver, never_wrong, answers, samplings) == -(-(NEW - 1) // 5)
    assert run(driver, SometimesWrong(), answers, samplings) < NEW - 1
    # Copies that are outgrown in the middle of drafts, then sequences that get none.
    monkeypatch.setattr(working, "LEAST_ROOM", 4)
    assert run(Driver(engine, 150, seed=2), SometimesWrong(), answers, samplings) < NEW - 1
    monkeypatch.setattr(Copies, "step", lambda *_: None)
    assert run(Driver(engine, 150, seed=3), SometimesWrong(), answers, samplings) < NEW - 1


def test_the_plan_of_a_device_computes_drafts_too(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    samplings = samplings_of(-1)
    answers = answers_of(engine, samplings)
    monkeypatch.setattr(model, "plan_cpu", lambda pages, chunks, copies: plan_device(pages, chunks))
    assert run(Driver(engine, 150), SometimesWrong(), answers, samplings) < NEW - 1


@pytest.mark.parametrize("kv_dtype", ["int8", "bfloat16"])
def test_drafts_over_rounded_kv(kv_dtype: str, tmp_path: Path) -> None:
    engine = load_engine(str(save_model(tmp_path / "llama", FAMILIES["llama"]())), kv_dtype=kv_dtype, threads=1)
    samplings = samplings_of(0)
    run(Driver(engine, 150), SometimesWrong(), answers_of(engine, samplings), samplings)


def test_after_a_draft_that_was_wrong_its_copy_is_not_made_again(engine: Engine) -> None:
    answers = answers_of(engine, samplings_of(0))
    driver = Driver(engine, 100)
    at = driver.start(PROMPTS[3], NEW)
    driver.prefill([at])
    copied = []
    for right in (2, 0, 3, 1):
        done = len(at.outputs)
        drafts = [*answers[3][done : done + right], (answers[3][done + right] + 1) % VOCABULARY]
        draw = Draw(at.sampling, done)
        (drawn,) = engine.forward([Chunk([at.tokens[-1], *drafts], at.computed, at.table, draw, at, len(drafts))])
        assert drawn is not None
        assert len(drawn.then) == right
        new = [drawn.token_id, *(one.token_id for one in drawn.then)]
        at.outputs, at.tokens, at.computed = at.outputs + new, at.tokens + new, at.computed + len(new)
        copied.append(drawn.copied_bytes)
    assert at.outputs == list(answers[3][: len(at.outputs)])
    assert [bytes_ > 0 for bytes_ in copied] == [True, False, False, False]


def test_drafts_without_a_token_before_them_or_a_draw_are_refused(engine: Engine) -> None:
    Driver(engine, 10)
    table = np.arange(4, dtype=np.int32)
    for chunk in (Chunk([1, 2], 0, table, Draw(Sampling(), 0), drafts=2), Chunk([1, 2], 0, table, None, drafts=1)):
        with pytest.raises(ValueError, match="drafts follow a token"):
            engine.forward([chunk])


def test_the_simulated_engine_verifies_drafts() -> None:
    card = simulated_card()
    engine = SimulatedEngine(card)
    driver = Driver(engine, 150)
    samplings = [Sampling(), *(Sampling(1.0, seed=seed) for seed in range(4))]
    answers = [
        expected_tokens(prompt, NEW, lambda index, s=sampling: Draw(s, index))  # type: ignore[misc]
        for prompt, sampling in zip(PROMPTS, samplings, strict=True)
    ]
    assert run(driver, SometimesWrong(), answers, samplings) < NEW - 1
