"""Copies between two devices of this host, slot by slot, where there are two."""

from __future__ import annotations

import time
from typing import Any

from bench.gpu_check.pair import device_of
from bench.gpu_check.sizes import Sizes
from bench.report import median
from headway.slab.device import Device, DeviceSegment


def run(name: str, sizes: Sizes) -> dict[str, Any]:
    device = device_of(name)
    others = [index for index in range(device.module.count()) if index != device.index]
    if not others:
        return {"available": False, "reason": "this process sees one device"}
    peer = Device(device.module, others[0])
    size = sizes.staging_slot * sizes.staging_slots
    source, target = DeviceSegment(device, size), DeviceSegment(peer, size)
    try:
        rates = [_copy(source, target, sizes) for _ in range(1 + sizes.rounds)]
    finally:
        target.remove()
        source.remove()
    return {
        "available": True,
        "peer": str(peer),
        "direct": device.module.reaches(peer.index, device.index),
        "slot_bytes": sizes.staging_slot,
        "gb_per_s": round(median(rates[1:]) / 1e9, 2),
    }


def _copy(source: DeviceSegment, target: DeviceSegment, sizes: Sizes) -> float:
    """Bytes a second of all slots, in another order at the target."""
    stream = target.device.module.stream(target.device.index)
    count, used = sizes.staging_slots, sizes.staging_slot
    started = time.monotonic()
    for slot in range(count):
        stream.copy(target.address + (slot * 37 + 11) % count * used, source.address + slot * used, used)
    stream.wait()
    return count * used / (time.monotonic() - started)
