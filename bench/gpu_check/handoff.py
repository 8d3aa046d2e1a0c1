"""Handoff between two processes: from "written and sealed" in one to "told" and to "read" in the other.

What passes is the block table; the slots' bytes stay where they are. The reader proves it by what it reads.
"""

from __future__ import annotations

import time
from typing import Any

import numpy as np

from bench.gpu_check.pair import Child, Talk, child, device_of
from bench.gpu_check.sizes import Sizes
from bench.report import percentile
from headway.slab.device import CopyStream, DeviceMapping, DeviceSegment

STRIDE = 64 << 10
SLOTS = 256
MARK_BYTES = 8


def run(name: str, sizes: Sizes) -> dict[str, Any]:
    segment = DeviceSegment(device_of(name), SLOTS * STRIDE)
    try:
        with child(read, segment) as reader:
            opened = reader.hear()
            stream = segment.device.module.stream(segment.device.index)
            samples = [
                _hand_off(segment, stream, reader, sizes.handoff_slots, number) for number in range(sizes.handoffs)
            ]
            reader.tell(None)
            reader.hear()
    finally:
        segment.remove()
    warm = samples[len(samples) // 10 :]
    told, done = [told for told, _ in warm], [done for _, done in warm]
    return {
        "open_ms": opened["open_ms"],
        "zero_copy": opened["zero_copy"],
        "handoffs": len(warm),
        "slots": sizes.handoff_slots,
        "told_us": {"p50": _us(told, 0.5), "p99": _us(told, 0.99)},
        "read_us": {"p50": _us(done, 0.5), "p99": _us(done, 0.99)},
        # The view that found the marks lies over the very allocation, or is a copy of the slots.
        "bytes_copied": 0 if opened["zero_copy"] else sizes.handoff_slots * STRIDE,
    }


def _us(seconds: list[float], share: float) -> float:
    return round(percentile(seconds, share) * 1e6, 1)


def _hand_off(
    segment: DeviceSegment, stream: CopyStream, reader: Child, slots: int, number: int
) -> tuple[float, float]:
    """Write a mark into each slot, wait for the device, pass the table on. Seconds to told and to read."""
    table = [(number * 31 + at * 7) % SLOTS for at in range(slots)]
    mark = np.frombuffer(number.to_bytes(MARK_BYTES, "little"), np.uint8).copy()
    for slot in table:
        stream.copy(segment.address + slot * STRIDE, mark.ctypes.data, MARK_BYTES)
    stream.wait()
    sealed_s = time.monotonic()
    reader.tell((table, number))
    told_s, read_s = reader.hear()
    return told_s - sealed_s, read_s - sealed_s


def read(talk: Talk, mapping: DeviceMapping) -> None:
    """The other process: for each table, read every slot's mark on the device and compare."""
    import torch

    slab = torch.utils.dlpack.from_dlpack(mapping.view(SLOTS, STRIDE))
    marks = slab[:, :MARK_BYTES].view(torch.int64)[:, 0]
    talk.answer({"open_ms": round(talk.opened_s * 1e3, 3), "zero_copy": slab.data_ptr() == mapping.address})
    while (asked := talk.asked()) is not None:
        told_s = time.monotonic()
        table, number = asked
        found = marks[torch.tensor(table, device=slab.device)].tolist()
        read_s = time.monotonic()
        if set(found) != {number}:
            raise AssertionError(f"handoff {number}: the slots hold {sorted(set(found))[:4]}")
        talk.answer((told_s, read_s))
    talk.answer(None)
