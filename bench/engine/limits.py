"""What this machine can do at most, by the same library: bytes read a second, multiply-adds a second.

python -m bench.engine.limits THREADS    prints one JSON object
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable

import torch

from headway.engine.linear import make_linear

READ_BYTES = 1 << 30
# Of the default model's largest layer, for a prompt of 512 tokens.
ROWS, OUTPUTS, INPUTS, LAYERS = 512, 3072, 576, 30
REPEATS = 5


def best_s(work: Callable[[], object]) -> float:
    """Of a few: a limit is what was reached once."""
    times = []
    for _ in range(REPEATS):
        started = time.perf_counter()
        work()
        times.append(time.perf_counter() - started)
    return min(times)


@torch.inference_mode()
def limits() -> dict[str, float]:
    """read_gb_per_s; multiply-adds in float32 and bfloat16, in 10⁹ a second."""
    memory = torch.ones(READ_BYTES // 4)
    found = {"read_gb_per_s": READ_BYTES / best_s(memory.sum) / 1e9}
    for dtype in (torch.float32, torch.bfloat16):
        layers = [make_linear(torch.randn(OUTPUTS, INPUTS).to(dtype)) for _ in range(LAYERS)]
        x = torch.randn(ROWS, INPUTS).to(dtype)
        seconds = best_s(lambda layers=layers, x=x: [layer(x) for layer in layers])  # type: ignore[misc]
        name = f"{dtype}".removeprefix("torch.") + "_gmac_per_s"
        found[name] = ROWS * OUTPUTS * INPUTS * LAYERS / seconds / 1e9
    return {name: round(value, 1) for name, value in found.items()}


def main() -> None:
    torch.set_num_threads(int(sys.argv[1]))
    print(json.dumps(limits()))


if __name__ == "__main__":
    main()
