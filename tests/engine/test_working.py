"""Working copies: made once, given back, bounded, and never of another sequence."""

from __future__ import annotations

import itertools
from pathlib import Path

import numpy as np
import pytest
import torch

from headway.core.model import KvFormat, LayerGroup
from headway.engine import working
from headway.engine.load import load_engine
from headway.engine.pages import ORDER, Pages
from headway.engine.working import Copies, shelved
from tests.engine.drive import Driver
from tests.engine.tiny import FAMILIES, save_model

LAYERS, HEADS, DIM, BLOCK = 2, 1, 4, 4


@pytest.fixture
def pages() -> Pages:
    group = LayerGroup(LAYERS, HEADS, DIM, LAYERS * 2 * HEADS * DIM * 4)
    kv_format = KvFormat(BLOCK, "float32", ORDER, (group,))
    slab = np.zeros((400, kv_format.slot_bytes), np.uint8)
    made = Pages(slab, kv_format, torch.device("cpu"))
    for layer, pair in enumerate(made.pairs):
        pair[:, 0] = torch.arange(400.0)[:, None, None, None] + layer / 10
        pair[:, 1] = -torch.arange(400.0)[:, None, None, None] - layer / 10
    return made


def blocks(first: int, tokens: int) -> torch.Tensor:
    return torch.arange(first, first - (-tokens // BLOCK))


def test_a_copy_is_made_once_and_again_when_it_is_outgrown_or_behind(
    pages: Pages, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(working, "LEAST_ROOM", 8)
    copies, made = Copies(pages, 1000), []
    for position in (5, 6, 7, 8, 9, 12, 13):
        copies.clean()
        step = copies.step("a", 0, position, blocks(20, position + 1))
        assert step is not None
        assert step.length == position + 1
        made.append(dict(copies.made))
    assert made == [{"a": 5}, {}, {}, {"a": 8}, {}, {"a": 12}, {}]


def test_a_copy_holds_what_the_slab_has(pages: Pages) -> None:
    step = Copies(pages, 1000).step("a", 0, 6, blocks(20, 7))
    assert step is not None
    shelf, row = step.copy.shelf, step.copy.row
    for layer in range(LAYERS):
        expected = torch.tensor([20.0] * 4 + [21.0] * 2) + layer / 10
        torch.testing.assert_close(shelf.keys[layer][row, 0, :6], expected)
        torch.testing.assert_close(shelf.values[layer][row, :6, 0], -expected)


def test_rows_come_back_and_a_broken_sequences_leavings_harm_nobody(pages: Pages) -> None:
    copies = Copies(pages, 1000)
    first = copies.step("broken", 0, 30, blocks(0, 31))
    assert first is not None
    for part in (*first.copy.shelf.keys, *first.copy.shelf.values):
        part.fill_(float("nan"))
    copies.forget("broken")
    copies.forget("unknown")
    copies.clean()
    step, longer = copies.step("b", 0, 5, blocks(0, 6)), copies.step("c", 1, 20, blocks(40, 21))
    assert step is not None
    assert longer is not None
    assert step.copy.row == first.copy.row
    # Row 1 was never anybody's, so what is in it is of this test alone.
    longer.copy.shelf.keys[0][1, :, 20:], longer.copy.shelf.values[0][1, 20:] = 0, 0
    (batch,) = shelved([step, longer], 2)
    query = torch.ones(2, 2, DIM)
    new = torch.ones(2, 2, HEADS, DIM)
    assert bool(torch.isfinite(batch.attend(0, query, new, 1.0)).all())


def test_memory_is_bounded_and_what_has_no_copy_still_runs(pages: Pages, monkeypatch: pytest.MonkeyPatch) -> None:
    """A copy of 26 tokens, with room for 32, has the keys of 32 and the values of 26 in memory."""
    monkeypatch.setattr(working, "LEAST_ROOM", 8)
    copies = Copies(pages, 40)
    assert copies.step("a", 0, 25, blocks(0, 26)) is not None
    assert copies.step("b", 0, 25, blocks(0, 26)) is None
    assert copies.step(None, 0, 5, blocks(0, 6)) is None
    assert copies.step("c", 0, 5, blocks(0, 6)) is not None
    copies.forget("a")
    copies.clean()
    # The row that it had is there already, and costs nothing.
    assert copies.step("b", 0, 25, blocks(0, 26)) is not None


def test_an_engine_says_once_how_much_it_copied_for_a_sequence(tmp_path: Path) -> None:
    driver = Driver(load_engine(str(save_model(tmp_path / "llama", FAMILIES["llama"]()))), 50)
    token_bytes = driver.engine.card.kv_format.bytes_per_token
    running, copied = driver.start(list(range(1, 38)), 6), []
    for _ in range(6):
        driver.step([running], 1 << 30)
        assert driver.drawn[-1] is not None
        copied.append(driver.drawn[-1].copied_bytes)
    assert copied == [0, 37 * token_bytes, 0, 0, 0, 0]


def test_a_forward_that_failed_leaves_no_copy_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its rows may lack the token in some layers."""
    engine = load_engine(str(save_model(tmp_path / "llama", FAMILIES["llama"]())))
    driver = Driver(engine, 50)
    running = driver.start(list(range(1, 38)), 6)
    driver.step([running], 1 << 30)
    driver.step([running], 1 << 30)
    assert running in engine._copies._by_sequence  # type: ignore[attr-defined]
    with monkeypatch.context() as patch:
        patch.setattr("headway.engine.lean.silu", broken)
        with pytest.raises(RuntimeError):
            driver.step([running], 1 << 30)
    driver.step([running], 1 << 30)
    assert driver.drawn[0] is not None
    assert driver.drawn[0].copied_bytes == 38 * engine.card.kv_format.bytes_per_token


def broken(x: torch.Tensor) -> torch.Tensor:
    raise RuntimeError("out of memory")


def test_output_is_the_same_with_copies_of_every_size(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = load_engine(str(save_model(tmp_path / "llama", FAMILIES["llama"]())))
    # More than 16, so that the pack of a step is filled up.
    prompts, found = [list(range(at, 3 * at)) for at in (1, 5, 9, 20, 40, *range(41, 55))], []
    for room, tokens in ((256, 8192), (4, 8), (1, 1), (1 << 20, 1)):
        monkeypatch.setattr(working, "LEAST_ROOM", room)
        monkeypatch.setattr(working, "SHELF_TOKENS", tokens)
        if room > 256:
            monkeypatch.setattr(Copies, "step", lambda *_: None)
        driver = Driver(engine, 400)
        found.append(driver.run([driver.start(prompt, 20) for prompt in prompts], 20, itertools.repeat(1 << 30)))
    assert found[0] == found[1] == found[2] == found[3]
