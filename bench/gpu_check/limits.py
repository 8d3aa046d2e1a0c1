"""What this device does at most, measured beside the engine: bytes of a plain copy, operations of one large product."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any, NamedTuple

from bench.gpu_check.sizes import Sizes
from bench.report import median

ROUNDS = 5
TIMES = 10


class Limits(NamedTuple):
    """copy_bytes_per_s: read and written, together. itemsize: bytes of a number of the model's."""

    copy_bytes_per_s: float
    flops_per_s: float
    itemsize: int


def measure_limits(device: str, dtype: str, sizes: Sizes) -> Limits:
    import torch

    kind = getattr(torch, dtype)
    source = torch.zeros(sizes.copied, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    copy_s = _seconds(device, lambda: target.copy_(source))
    left, right = (torch.randn(2 * (sizes.matrix,), device=device).to(kind) for _ in range(2))
    out = torch.empty_like(left)
    with torch.inference_mode():
        product_s = _seconds(device, lambda: torch.mm(left, right, out=out))
    return Limits(2 * sizes.copied / copy_s, 2 * sizes.matrix**3 / product_s, kind.itemsize)


def _seconds(device: str, act: Callable[[], Any]) -> float:
    """Of one, when many are launched one after another."""
    samples = []
    for number in range(1 + ROUNDS):
        _wait(device)
        started = time.monotonic()
        for _ in range(TIMES):
            act()
        _wait(device)
        if number:
            samples.append((time.monotonic() - started) / TIMES)
    return median(samples)


def _wait(device: str) -> None:
    import torch

    if device != "cpu":
        torch.cuda.synchronize(device)
