"""Working copies: made once, given back, bounded, and never of another sequence."""

from __future__ import annotations

import itertools
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from headway.core.model import KvFormat, LayerGroup
from headway.engine import together, working
from headway.engine.load import load_engine
from headway.engine.pages import ORDER, Pages
from headway.engine.together import Batch, batches_of
from headway.engine.working import Copies, Shelf
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


def blocks(first: int, tokens: int) -> Callable[[], torch.Tensor]:
    return lambda: torch.arange(first, first - (-tokens // BLOCK))


def test_a_copy_is_made_once_and_again_when_it_is_outgrown_or_behind(
    pages: Pages, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(working, "LEAST_ROOM", 8)
    copies, made = Copies(pages, 1 << 20), []
    for position in (5, 6, 7, 8, 9, 12, 13):
        copies.clean()
        step = copies.step("a", 0, position, blocks(20, position + 1))
        assert step is not None
        assert step.length == position + 1
        made.append(dict(copies.made))
    assert made == [{"a": 5}, {}, {}, {"a": 8}, {}, {"a": 12}, {}]


def test_a_copy_holds_what_the_slab_has(pages: Pages) -> None:
    step = Copies(pages, 1 << 20).step("a", 0, 6, blocks(20, 7))
    assert step is not None
    shelf, row = step.copy.shelf, step.copy.row
    for layer in range(LAYERS):
        expected = torch.tensor([20.0] * 4 + [21.0] * 2) + layer / 10
        torch.testing.assert_close(shelf.keys[layer][row, 0, :6], expected)
        torch.testing.assert_close(shelf.values[layer][row, :6, 0], -expected)


def test_rows_come_back_and_a_broken_sequences_leavings_harm_nobody(pages: Pages) -> None:
    copies = Copies(pages, 1 << 20)
    first = copies.step("broken", 0, 30, blocks(0, 31))
    assert first is not None
    for keys, values in zip(first.copy.shelf.keys, first.copy.shelf.values, strict=True):
        keys[0, :, :31] = values[0, :31] = float("nan")
    copies.forget("broken")
    copies.forget("unknown")
    copies.clean()
    step, longer = copies.step("b", 0, 5, blocks(0, 6)), copies.step("c", 1, 20, blocks(40, 21))
    assert step is not None
    assert longer is not None
    assert step.copy.row == first.copy.row
    (batch,) = batches_of([step, longer], 2)
    query = torch.ones(2, 2, DIM)
    new = torch.ones(2, 2, HEADS, DIM)
    assert bool(torch.isfinite(batch.attend(0, query, new, 1.0)).all())


def test_memory_is_bounded_and_what_has_no_copy_still_runs(pages: Pages) -> None:
    row = Shelf(pages, 256).bytes_of(64)
    copies = Copies(pages, row)
    assert copies.step("a", 0, 25, blocks(0, 26)) is not None
    assert copies.step("b", 0, 25, blocks(0, 26)) is None
    assert copies.step(None, 0, 5, blocks(0, 6)) is None
    copies.forget("a")
    copies.clean()
    # The row that it had is there already, and costs nothing.
    assert copies.step("b", 0, 25, blocks(0, 26)) is not None
    assert copies.bytes == row


def test_a_copy_that_grows_out_of_what_is_allowed_goes_and_comes_when_there_is_room(
    pages: Pages, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(working, "PAGE_BYTES", 64)
    shelf = Shelf(pages, 256)
    most = shelf.bytes_of(256) + shelf.bytes_of(64)
    copies = Copies(pages, most)
    without = []
    for position in range(255):
        copies.clean()
        for name in ("a", "b"):
            if copies.step(name, 0, position, blocks(0, position + 1)) is None:
                without.append((name, position))
        assert copies.bytes <= most
    assert without[0] == ("b", 128)
    assert not [position for name, position in without if name == "a"]
    copies.forget("a")
    copies.clean()
    assert copies.step("b", 0, 255, blocks(0, 256)) is not None
    assert copies.bytes <= most


def test_no_more_is_taken_than_the_machine_has_left(pages: Pages) -> None:
    row, room = Shelf(pages, 256).bytes_of(64), [0]
    copies = Copies(pages, 1 << 30, lambda: room[0])
    assert copies.step("a", 0, 9, blocks(0, 10)) is None
    room[0] = row
    assert copies.step("a", 0, 9, blocks(0, 10)) is not None
    room[0] = row - 1
    assert copies.step("b", 0, 9, blocks(0, 10)) is None
    # What is there already may be used.
    assert copies.step("a", 0, 10, blocks(0, 11)) is not None


def test_idle_copies_give_way(pages: Pages) -> None:
    short, long = Shelf(pages, 256), Shelf(pages, 1024)
    copies = Copies(pages, max(short.bytes_of(256), long.bytes_of(640)))
    assert copies.step("a", 0, 200, blocks(0, 201)) is not None
    assert copies.step("long", 0, 600, blocks(0, 601)) is None
    copies.forget("a")
    copies.clean()
    assert copies.step("long", 0, 600, blocks(0, 601)) is not None
    assert copies.bytes == long.bytes_of(640)


MEASURE = """
import re, sys
from pathlib import Path
import numpy as np, torch
from headway.core.model import KvFormat, LayerGroup
from headway.engine.pages import ORDER, Pages
from headway.engine.together import Batch, batches_of
from headway.engine.working import Copies, Shelf

def resident(shelves):
    found, spans = 0, [(shelf.flat[0].data_ptr(), len(shelf.flat) * shelf.flat[0].nbytes) for shelf in shelves]
    for mapping in re.split(r"^(?=[0-9a-f]+-[0-9a-f]+ )", Path("/proc/self/smaps").read_text(), flags=re.M)[1:]:
        start, end = (int(part, 16) for part in mapping.split()[0].split("-"))
        if any(start < first + size and first < end for first, size in spans):
            found += int(mapping.split("Rss:")[1].split()[0]) * 1024
    return found

torch.set_num_threads(1)
layers, heads, dim = 4, 3, 64
kv_format = KvFormat(16, sys.argv[1], ORDER, (LayerGroup(layers, heads, dim, layers * 2 * heads * dim * 4),))
pages = Pages(np.zeros((200, kv_format.slot_bytes), np.uint8), kv_format, torch.device("cpu"))
pages.pairs[0].zero_()
blocks = torch.zeros(130, dtype=torch.int64)
for layer in range(layers):
    pages.gather(layer, blocks, 2000)
at, copies = 0, Copies(pages, 0)
query, new = (torch.zeros(5, *shape, dtype=pages.dtype) for shape in ((heads, dim), (2, heads, dim)))
def step(lengths):
    made = [copies.step(length, row, length + at, lambda: blocks) for row, length in enumerate(lengths)]
    for batch in copies.together([one for one in made if one], 5):
        for layer in range(layers):
            batch.attend(layer, query, new, None)
# One that is gone, whose memory is given back; then neighbours of which one is shorter by far, rows that grow, and one
# that outgrows its own.
step([1900])
assert copies.bytes == 0
copies.most_bytes = 1 << 40
step([1900, 1950, 1960])
copies.forget(1950)
copies.clean()
copies.most_bytes = copies.bytes
assert copies.step("short", 0, 100, lambda: blocks) is not None
assert 0 < resident(copies._shelves) <= copies.bytes < copies.most_bytes
copies.forget("short")
copies.most_bytes = 1 << 40
for at in range(150):
    copies.clean()
    step([1100, 1030, 1800, 300, 180])
print(copies.bytes, resident(copies._shelves))
"""


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_what_is_counted_is_what_the_kernel_counts(dtype: str) -> None:
    """In a process of its own: a neighbour's memory that is only read costs none."""
    done = subprocess.run(
        [sys.executable, "-c", MEASURE, dtype], capture_output=True, text=True, check=True, timeout=120
    )
    counted, taken = map(int, done.stdout.split())
    assert counted > 10 << 20
    assert 0.85 * counted <= taken <= counted


def test_what_a_step_needs_is_carried_on_and_not_made_anew(pages: Pages, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(together, "LENGTHS", 4)
    copies, kept = Copies(pages, 1 << 30), []
    for at in range(6):
        copies.clean()
        steps = [copies.step(name, row, 5 + at + row, blocks(0, 12)) for row, name in enumerate("ab")]
        (batch,) = copies.together([step for step in steps if step], 2)
        kept.append(batch)
        fresh = batches_of([step for step in steps if step], 2)[0]
        assert isinstance(batch, Batch)
        for name in ("_put", "_mask", "_shown"):
            assert torch.equal(getattr(batch, name), getattr(fresh, name)), (at, name)
        assert [part.shape for part in batch._keys] == [part.shape for part in fresh._keys]
    assert all(batch is kept[0] for batch in kept)
    # One goes, or the pack changes: then they are others.
    copies.clean()
    step = copies.step("a", 0, 11, blocks(0, 12))
    assert step is not None
    assert copies.together([step], 1)[0] is not kept[0]


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
