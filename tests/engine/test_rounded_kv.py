"""K and V in 8 bits: attention sees what the slab gives back, whenever and however a token was computed."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch

from headway.core.sampling import Sampling
from headway.engine.contract import Chunk, Draw
from headway.engine.load import load_engine
from headway.engine.model import TorchEngine
from headway.engine.plan_device import GATHER
from headway.engine.steps_device import DeviceSteps
from tests.engine.drive import Driver
from tests.engine.tiny import FAMILIES, VOCABULARY, save_model

TOKENS, NEW = 96, 24
# Sizes of chunks; whether their sequence has a name, and so working copies.
CUTS = [((1 << 30,), False), ((3, 17, 5), False), ((40, 1), False), ((1,), False), ((31, 1, 1, 1), True), ((1,), True)]


@pytest.fixture(scope="module", params=["llama", "smollm3"])
def engine(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> TorchEngine:
    """With its own forward, and with that of transformers' modules."""
    folder = save_model(tmp_path_factory.mktemp("models") / request.param, FAMILIES[request.param]())
    engine = load_engine(str(folder), kv_dtype="int8", threads=1)
    assert isinstance(engine, TorchEngine)
    return engine


def tokens(seed: int, count: int) -> list[int]:
    return [int(token) for token in np.random.default_rng(seed).integers(3, VOCABULARY, count)]


def logits(engine: TorchEngine, ids: list[int], sizes: tuple[int, ...], named: bool) -> torch.Tensor:
    """After the last token, computed in chunks of these sizes in turn."""
    driver = Driver(engine, 20)
    sequence, turn, at = driver.start(ids, 0), itertools.cycle(sizes), 0
    while at < len(ids):
        part = ids[at : at + next(turn)]
        chunk = Chunk(part, at, sequence.table, Draw(Sampling(), 0), "one" if named else None)
        found, at = engine.logits([chunk]), at + len(part)
    engine.forget("one")
    return found


@pytest.mark.parametrize("on_device", [False, True])
def test_logits_are_the_same_however_a_prompt_is_cut(
    engine: TorchEngine, on_device: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """But for a number that falls between two steps, and goes to the one or the other. Numbers of a step's own tokens
    that are not rounded change logits by 0.02 of their spread and more.
    """
    if on_device:
        monkeypatch.setattr(engine, "steps", DeviceSteps(engine._model, engine.device, GATHER, None))
    ids = tokens(5, TOKENS)
    whole, *others = [logits(engine, ids, *cut) for cut in CUTS]
    for other, cut in zip(others, CUTS[1:], strict=True):
        assert float((other - whole).square().mean().sqrt()) < 2e-3 * float(whole.std()), cut


def test_an_answer_goes_on_after_a_recompute_as_it_would_have(engine: TorchEngine) -> None:
    driver = Driver(engine, 60)
    prompts = [tokens(seed, 20 + 7 * seed) for seed in range(5)]
    whole = driver.run([driver.start(prompt, NEW) for prompt in prompts], NEW, itertools.repeat(1 << 30))
    for stop in (1, 9, 17):
        sofar = [[*prompt, *outputs[:stop]] for prompt, outputs in zip(prompts, whole, strict=True)]
        again = [driver.start(ids, NEW - stop) for ids in sofar]
        rest = driver.run(again, NEW - stop, itertools.cycle((13, 6)))
        assert rest == [outputs[stop:] for outputs in whole]
        for sequence in again:
            driver.end(sequence)
