"""Device to pinned host memory and back: scattered slots through the staging, against one plain asynchronous copy.

Both in turns in one run, medians of GB/s (10^9 bytes). `used`: the host touches every byte meanwhile, as a socket does.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

from bench.gpu_check.pair import device_of
from bench.gpu_check.sizes import Sizes
from bench.report import median
from headway.slab.device import Device, DeviceSegment
from headway.slab.staging import Staging


def run(name: str, sizes: Sizes) -> dict[str, Any]:
    device, size = device_of(name), sizes.staging_slot * sizes.staging_slots
    segment = DeviceSegment(device, size)
    try:
        pinned = device.module.pinned(size)
        pinned[:] = np.random.default_rng(1).integers(0, 256, size, np.uint8)
        staging = Staging(device, segment.address, sizes.staging_slot, sizes.staging_slot)
        order = [int(slot) for slot in np.random.default_rng(2).permutation(sizes.staging_slots)]
        _plain(device, segment.address, pinned.ctypes.data, size)
        _check(staging, order, pinned.reshape(sizes.staging_slots, sizes.staging_slot))
        sink = bytearray(sizes.staging_slot)
        ways: dict[str, Callable[[], None]] = {
            "down_plain": lambda: _plain(device, pinned.ctypes.data, segment.address, size),
            "down_staged": lambda: _drain(staging.outgoing(order)),
            "down_used": lambda: _use(staging.outgoing(order), sink, incoming=False),
            "up_plain": lambda: _plain(device, segment.address, pinned.ctypes.data, size),
            "up_staged": lambda: _drain(staging.incoming(order)),
            "up_used": lambda: _use(staging.incoming(order), sink, incoming=True),
        }
        rates = _rates(ways, size, sizes.rounds)
    finally:
        segment.remove()
    shares = {way: round(rates[f"{way}_staged"] / rates[f"{way}_plain"], 3) for way in ("down", "up")}
    return {"slot_bytes": sizes.staging_slot, "bytes": size, "gb_per_s": rates, "staged_over_plain": shares}


def _rates(ways: dict[str, Callable[[], None]], size: int, rounds: int) -> dict[str, float]:
    """Median GB/s of each way, all in turn in every round; the first round warms up."""
    samples: dict[str, list[float]] = {way: [] for way in ways}
    for number in range(rounds + 1):
        for way, copy in ways.items():
            started = time.monotonic()
            copy()
            if number:
                samples[way].append(size / (time.monotonic() - started) / 1e9)
    return {way: round(median(found), 2) for way, found in samples.items()}


def _plain(device: Device, target: int, source: int, size: int) -> None:
    stream = device.module.stream(device.index)
    stream.copy(target, source, size)
    stream.wait()


def _drain(pieces: Iterator[list[memoryview]]) -> None:
    for _ in pieces:
        pass


def _use(pieces: Iterator[list[memoryview]], sink: bytearray, *, incoming: bool) -> None:
    for views in pieces:
        for view in views:
            if incoming:
                view[:] = sink
            else:
                sink[:] = view


def _check(staging: Staging, order: list[int], wanted: np.ndarray) -> None:
    """Every slot comes out as it was put in."""
    slots = iter(order)
    for views in staging.outgoing(order):
        for view in views:
            if bytes(view) != wanted[next(slots)].tobytes():
                raise AssertionError("a slot came out of the staging with other bytes")
