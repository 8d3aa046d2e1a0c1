"""Greedy output of every supported family equals transformers' generate, however the work is cut."""

from __future__ import annotations

import itertools
import mmap
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch

from headway.core.sampling import Sampling
from headway.engine.contract import Chunk, Draw, Engine
from headway.engine.graphs import Graphs
from headway.engine.load import ModelError, load_engine, read_model_config
from headway.engine.model import TorchEngine
from headway.engine.paged import Reader
from headway.engine.pages import Pages
from headway.engine.plan_device import GATHER
from headway.engine.steps_device import DeviceSteps
from tests.engine.again import Again
from tests.engine.drive import Driver
from tests.engine.tiny import CONTEXT, FAMILIES, VOCABULARY, save_model, stock_model
from tests.reference import check_equal, generate

NEW = 24
LENGTHS = (1, 2, 7, 15, 16, 17, 31, 33, 48, 100)
WHOLE = itertools.repeat(1 << 30)


@dataclass
class Family:
    engine: Engine
    prompts: list[list[int]]
    wanted: list[tuple[list[int], list[float]]]

    def driver(self) -> Driver:
        return Driver(self.engine, 200)


@pytest.fixture(scope="module", params=sorted(FAMILIES))
def family(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Family:
    folder = save_model(tmp_path_factory.mktemp("models") / request.param, FAMILIES[request.param]())
    random = np.random.default_rng(3)
    prompts = [[int(token) for token in random.integers(0, VOCABULARY, length)] for length in LENGTHS]
    stock = stock_model(folder)
    wanted = [generate(stock, prompt, NEW) for prompt in prompts]
    return Family(load_engine(str(folder), threads=1), prompts, wanted)


def test_card(family: Family) -> None:
    card = family.engine.card
    assert (card.vocab_size, card.context_tokens, card.eos_token_ids) == (VOCABULARY, CONTEXT, (2,))
    group = card.kv_format.groups[0]
    assert group.bytes_per_token == group.layers * 2 * group.kv_heads * group.head_dim * 4
    assert len({tuple(tokens) for tokens, _ in family.wanted}) > len(LENGTHS) // 2  # the tests below can tell apart


def test_cold_and_alone(family: Family) -> None:
    driver = family.driver()
    found = [driver.run([driver.start(prompt, NEW)], NEW, WHOLE)[0] for prompt in family.prompts]
    assert check_equal(found, family.wanted) == []


def test_packed_prefill_and_batched_decode(family: Family) -> None:
    driver = family.driver()
    running = [driver.start(prompt, NEW) for prompt in family.prompts]
    assert check_equal(driver.run(running, NEW, WHOLE), family.wanted) == []


@pytest.mark.parametrize("sizes", [(1,), (3, 17, 5), (16,), (29, 1, 2)])
def test_chunks_of_odd_sizes_mixed_with_decode(family: Family, sizes: tuple[int, ...]) -> None:
    driver = family.driver()
    running = [driver.start(prompt, NEW) for prompt in family.prompts]
    assert check_equal(driver.run(running, NEW, itertools.cycle(sizes)), family.wanted) == []


@pytest.mark.parametrize("sizes", [(1 << 30,), (3, 17, 5), (29, 1, 2)])
def test_a_devices_steps_say_the_same(family: Family, sizes: tuple[int, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    """By gathered K and V, and recorded where they are decode steps."""
    graphs = on_a_device(family.engine, GATHER, monkeypatch)
    driver = family.driver()
    running = [driver.start(prompt, NEW) for prompt in family.prompts]
    assert check_equal(driver.run(running, NEW, itertools.cycle(sizes)), family.wanted) == []
    assert len(graphs) > 0
    assert graphs.refused is None


@pytest.mark.triton
def test_a_devices_steps_in_place_say_the_same(family: Family, monkeypatch: pytest.MonkeyPatch) -> None:
    from headway.engine.paged_triton import InPlace

    driver = family.driver()
    heads = read_model_config(Path(family.engine.card.tokenizer_path)).num_attention_heads
    pages = Pages(driver.slab, family.engine.card.kv_format, torch.device("cpu"))
    graphs = on_a_device(family.engine, InPlace(pages, heads, 8), monkeypatch)
    running = [driver.start(prompt, 4) for prompt in family.prompts[4:6]]
    wanted = [(tokens[:4], margins[:4]) for tokens, margins in family.wanted[4:6]]
    assert check_equal(driver.run(running, 4, itertools.cycle((9, 40, 1))), wanted) == []
    assert graphs.refused is None


def on_a_device(engine: Engine, reader: Reader, monkeypatch: pytest.MonkeyPatch) -> Graphs:
    """The engine's forwards are those of a device from now on."""
    assert isinstance(engine, TorchEngine)
    cpu = torch.device("cpu")
    graphs = Graphs(Again(), cpu)
    monkeypatch.setattr(engine, "steps", DeviceSteps(engine._model, cpu, reader, graphs))
    return graphs


def test_cached_prefix(family: Family) -> None:
    """Whole blocks of a former run are shared; only the rest is computed, also beside the former owner."""
    driver = family.driver()
    first = [driver.start(prompt, NEW) for prompt in family.prompts]
    driver.prefill(first)
    second = [driver.start(p, NEW, shared=s) for p, s in zip(family.prompts, first, strict=True)]
    assert sum(sequence.computed for sequence in second) == sum((length - 1) // 16 * 16 for length in LENGTHS)
    found = driver.run([*first, *second], NEW, itertools.cycle((7, 13)))
    assert check_equal(found, [*family.wanted, *family.wanted]) == []


def test_second_turn_over_decoded_blocks(family: Family) -> None:
    """K and V written by decode steps serve the next turn as those of a prefill do."""
    driver = family.driver()
    prompt, (tokens, _) = family.prompts[-1], family.wanted[-1]
    first = driver.start(prompt, NEW)
    driver.run([first], NEW, WHOLE)
    turn = [*prompt, *tokens[:-4]]
    second = driver.start(turn, NEW, shared=first)
    assert second.computed > len(prompt)
    assert driver.run([second], 4, WHOLE)[0] == tokens[-4:]


def test_a_forward_touches_only_its_own_slots(family: Family) -> None:
    driver = family.driver()
    running = driver.start(family.prompts[-1], NEW)
    driver.run([running], NEW, itertools.cycle((9,)))
    others = np.setdiff1d(np.arange(len(driver.slab)), running.table)
    assert (driver.slab[others] == 0xFF).all()
    used = family.engine.card.kv_format.slot_bytes
    assert (driver.slab[:, used:] == 0xFF).all()


def test_logits_do_not_depend_on_the_company(family: Family) -> None:
    """Logits alone and in a full batch agree far below any margin that matters."""
    driver = family.driver()
    running = [driver.start(prompt, NEW) for prompt in family.prompts]
    draw = Draw(Sampling(), 0)
    chunks = [Chunk(at.tokens, 0, at.table, draw) for at in running]
    together = family.engine.logits(chunks)  # type: ignore[attr-defined]
    alone = torch.cat([family.engine.logits([chunk]) for chunk in chunks])  # type: ignore[attr-defined]
    assert float((together - alone).abs().max()) < 1e-4 * float(alone.std())


def test_seeded_output_is_the_same_cold_chunked_and_cached(family: Family) -> None:
    driver = family.driver()
    sampling = Sampling(temperature=0.9, top_p=0.95, seed=11, repetition_penalty=1.1)
    prompt = family.prompts[-2]
    cold = driver.start(prompt, NEW, sampling=sampling)
    cut = driver.start(prompt, NEW, sampling=sampling)
    outputs = driver.run([cold], NEW, WHOLE)[0]
    cached = driver.start(prompt, NEW, shared=cold, sampling=sampling)
    assert driver.run([cut, cached], NEW, itertools.cycle((5, 11))) == [outputs, outputs]
    other = driver.start(prompt, NEW, sampling=Sampling(temperature=0.9, top_p=0.95, seed=12, repetition_penalty=1.1))
    assert driver.run([other], NEW, WHOLE)[0] != outputs


@pytest.mark.parametrize(
    ("tokens", "position", "blocks", "words"),
    [
        ([], 0, 1, "token ids"),
        ([VOCABULARY], 0, 1, "token ids"),
        ([-1], 0, 1, "token ids"),
        ([1, 2], CONTEXT - 1, 20, "context"),
        ([1] * 17, 0, 1, "block table"),
        ([1], -1, 1, "position"),
    ],
)
def test_bad_chunks_are_refused(family: Family, tokens: list[int], position: int, blocks: int, words: str) -> None:
    driver = family.driver()
    with pytest.raises(ValueError, match=words):
        family.engine.forward([Chunk(tokens, position, np.arange(blocks, dtype=np.int32), None)])
    with pytest.raises(ValueError, match="outside the slab"):
        family.engine.forward([Chunk([1], 0, np.array([len(driver.slab)], np.int32), None)])
    assert (driver.slab == 0xFF).all()


def test_unbind_lets_go_of_the_slab(family: Family) -> None:
    kv_format = family.engine.card.kv_format
    memory = mmap.mmap(-1, 8 * kv_format.slot_bytes)
    family.engine.bind(np.frombuffer(memory, np.uint8).reshape(8, -1))
    family.engine.forward([Chunk(family.prompts[3], 0, np.arange(8, dtype=np.int32), Draw(Sampling(), 0))])
    with pytest.raises(BufferError):
        memory.close()
    family.engine.unbind()
    memory.close()
    with pytest.raises(ModelError, match="bind"):
        family.engine.forward([Chunk([1], 0, np.arange(8, dtype=np.int32), None)])


def test_a_slab_of_another_shape_is_refused(family: Family) -> None:
    with pytest.raises(ValueError, match="the KV format needs"):
        family.engine.bind(np.zeros((4, family.engine.card.kv_format.slot_bytes - 4), np.uint8))
    read_only = np.zeros((4, family.engine.card.kv_format.slot_bytes), np.uint8)
    read_only.flags.writeable = False
    with pytest.raises(ValueError, match="writable"):
        family.engine.bind(read_only)
    with pytest.raises(ValueError, match="writable"):
        family.engine.bind(np.zeros((4, 1 << 20), np.float32))  # type: ignore[arg-type]
