"""Every family on a GPU, weights and slab: the tokens of transformers' generate, and draws that do not depend on it."""

from __future__ import annotations

import itertools
from pathlib import Path

import numpy as np
import pytest
import torch

from headway.core.sampling import Sampling
from headway.engine.contract import Chunk, Draw
from headway.engine.load import load_engine
from headway.engine.model import TorchEngine
from headway.engine.sampling_device import prepare
from tests.engine.drive import Driver
from tests.engine.test_families import LENGTHS, NEW
from tests.engine.tiny import FAMILIES, VOCABULARY, save_model, stock_model
from tests.reference import check_equal, generate

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no GPU"),
]
GPU = "cuda:0"


def some_prompts() -> list[list[int]]:
    random = np.random.default_rng(3)
    return [[int(token) for token in random.integers(0, VOCABULARY, length)] for length in LENGTHS]


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_greedy_tokens_are_those_of_generate(family: str, tmp_path: Path) -> None:
    folder = save_model(tmp_path / family, FAMILIES[family]())
    stock = stock_model(folder)
    wanted = [generate(stock, prompt, NEW) for prompt in some_prompts()]
    engine = load_engine(str(folder), device=GPU)
    for sizes in ((1 << 30,), (3, 17, 5), (29, 1, 2)):
        driver = Driver(engine, 200, device=GPU)
        running = [driver.start(prompt, NEW) for prompt in some_prompts()]
        assert check_equal(driver.run(running, NEW, itertools.cycle(sizes)), wanted) == []


def test_a_seed_draws_the_same_as_on_the_cpu(tmp_path: Path) -> None:
    folder = save_model(tmp_path / "llama", FAMILIES["llama"]())
    sampling = Sampling(temperature=0.8, top_k=20, top_p=0.9, seed=5, frequency_penalty=0.3)
    outputs = []
    for device in ("cpu", GPU):
        driver = Driver(load_engine(str(folder), device=device), 200, device=device)
        running = [driver.start(prompt, NEW, sampling=sampling) for prompt in some_prompts()[:4]]
        outputs.append(driver.run(running, NEW, itertools.repeat(1 << 30)))
    # A draw that falls on a border may fall either way by rounding.
    same = sum(a == b for pair in zip(*outputs, strict=True) for a, b in zip(*pair, strict=True))
    assert same >= 0.9 * 4 * NEW


def test_decode_steps_are_recorded_and_read_the_slab_in_place(tmp_path: Path) -> None:
    engine = load_engine(str(save_model(tmp_path / "llama", FAMILIES["llama"]())), device=GPU)
    assert isinstance(engine, TorchEngine)
    steps = engine.steps
    assert steps is not None
    assert steps.graphs is not None
    assert steps.reader.name != "gather"
    driver = Driver(engine, 200, device=GPU)
    driver.run([driver.start(prompt, NEW) for prompt in some_prompts()], NEW, itertools.repeat(1 << 30))
    assert steps.graphs.refused is None
    assert len(steps.graphs) > 0


def test_the_host_waits_for_nothing_within_a_step(tmp_path: Path) -> None:
    engine = load_engine(str(save_model(tmp_path / "llama", FAMILIES["llama"]())), dtype="bfloat16", device=GPU)
    assert isinstance(engine, TorchEngine)
    driver = Driver(engine, 200, device=GPU)
    sampling = Sampling(temperature=0.8, top_k=20, top_p=0.9, seed=5, frequency_penalty=0.3)
    running = [driver.start(prompt, NEW, sampling=sampling) for prompt in some_prompts()[:4]]
    driver.run(running, 6, itertools.repeat(1 << 30))
    assert engine.steps is not None
    assert engine._pages is not None
    draw = Draw(sampling, 6, 0, (1, 2, 3), 1, 2)
    for tokens in ([5], [5, 6, 7]):
        chunks = [Chunk(tokens, at.computed, at.table, draw) for at in running]
        prepared = prepare([draw] * len(chunks), VOCABULARY)
        engine.steps.launch(engine._pages, chunks, prepared)
        torch.cuda.set_sync_debug_mode("error")
        try:
            engine.steps.launch(engine._pages, chunks, prepared)
        finally:
            torch.cuda.set_sync_debug_mode("default")
        torch.cuda.synchronize()


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_precision_loads_and_proves_itself(dtype: str, tmp_path: Path) -> None:
    engine = load_engine(str(save_model(tmp_path / "qwen2", FAMILIES["qwen2"]())), dtype=dtype, device=GPU)
    driver = Driver(engine, 200, device=GPU)
    assert all(len(out) == NEW for out in driver.run([driver.start([1, 2, 3], NEW)], NEW, itertools.repeat(9)))
