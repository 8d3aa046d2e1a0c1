"""What an engine holds after ten thousand short requests is what it held before."""

from __future__ import annotations

import gc
import random
from pathlib import Path

import pytest

from headway.engine.load import load_engine
from headway.engine.model import TorchEngine
from tests.engine.drive import Driver
from tests.engine.tiny import FAMILIES, save_model

REQUESTS, AT_ONCE, WARM = 10_000, 50, 1_000
# The allocator's own coming and going.
GROWTH_BYTES = 8 << 20


def resident_bytes(process: str = "self") -> int:
    status = Path(f"/proc/{process}/status").read_text()
    return int(status.split("VmRSS:")[1].split()[0]) * 1024


def serve(driver: Driver, count: int, draw: random.Random) -> None:
    """Prompts of 2 to 40 tokens, four tokens out, AT_ONCE together; slots and names are given back."""
    for _ in range(count // AT_ONCE):
        prompts = [[draw.randrange(3, 190) for _ in range(draw.randrange(2, 40))] for _ in range(AT_ONCE)]
        running = [driver.start(prompt, 4) for prompt in prompts]
        for _ in range(4):
            driver.step(running, 1 << 30)
        for sequence in running:
            driver.end(sequence)


@pytest.mark.timeout(300)
def test_ten_thousand_short_requests_leave_an_engine_as_they_found_it(tmp_path: Path) -> None:
    engine = load_engine(str(save_model(tmp_path / "llama", FAMILIES["llama"]())))
    assert isinstance(engine, TorchEngine)
    driver, draw = Driver(engine, AT_ONCE * 4), random.Random(1)
    slots = driver.free_slots
    serve(driver, WARM, draw)
    gc.collect()
    before = resident_bytes()
    serve(driver, REQUESTS, draw)
    gc.collect()
    assert resident_bytes() - before < GROWTH_BYTES
    assert driver.free_slots == slots
    assert engine._copies is not None
    engine._copies.clean()
    assert not engine._copies._by_sequence
    assert all(shelf.idle for shelf in engine._copies._shelves)


def test_packs_have_few_sizes_and_little_to_fill_them_up(tmp_path: Path) -> None:
    """Code that is made for a number of rows stays for good."""
    engine = load_engine(str(save_model(tmp_path / "llama", FAMILIES["llama"]())))
    assert isinstance(engine, TorchEngine)
    sizes = {rows: rows + engine._more_rows(rows) for rows in range(1, 8193)}
    assert all(rows <= size <= rows * 9 / 8 for rows, size in sizes.items())
    assert len(set(sizes.values())) < 100
    assert all(sizes[rows] == rows for rows in range(1, 17))
