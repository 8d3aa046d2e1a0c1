"""Prefill and decode step times of the engine over the mapped slab, against what the device can do at most.

A decode step must read the weights and the K and V of its sequences: its time against that of a plain copy of as many
bytes (read and written) in the same run. A prefill must multiply: its rate against that of one large product.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from bench.gpu_check.limits import Limits, measure_limits
from bench.gpu_check.model import Running, Tables, blocks, engine_of, how_of, prompt_of, random_model, slab_bytes, step
from bench.gpu_check.pair import Talk, child, device_of, torch_name
from bench.gpu_check.sizes import Sizes
from bench.gpu_check.work import decode_bytes, prefill_flops
from bench.report import mark, median
from headway.slab.device import DeviceMapping, DeviceSegment

if TYPE_CHECKING:
    from headway.engine.model import TorchEngine

REPEATS = 3
# The first steps are launched and recorded, perhaps twice: when they begin, tables may just get wider.
WARM = 4
STEP_MARK, PREFILL_MARK = 1.5, 0.5
# Shorter prompts are bound by reading the weights, not by multiplying.
LONG = 2048


def dtype_on(name: str) -> str:
    """As workers take it by default."""
    return "bfloat16" if name.startswith("cuda") else "float32"


def run(name: str, sizes: Sizes) -> dict[str, Any]:
    dtype = dtype_on(name)
    decoding = max(sizes.batches) * blocks(sizes.context + WARM + sizes.steps)
    slots = max(decoding, blocks(max(sizes.prefills) + 1))
    segment = DeviceSegment(device_of(name), slab_bytes(sizes, dtype, slots))
    try:
        with child(measure, segment, sizes, dtype, slots) as worker:
            found: dict[str, Any] = worker.hear()
    finally:
        segment.remove()
    return {"dtype": dtype, "slab_bytes": segment.size, **found, "marks": marks(found)}


def marks(found: dict[str, Any]) -> dict[str, Any]:
    """The worst of all batches, and the worst of long prompts (of all, where none is long)."""
    slowest = max(row["time_vs_bytes"] for row in found["decode"])
    rates = [row["vs_matrix_rate"] for row in found["prefill"] if row["tokens"] >= LONG]
    least = min(rates or [row["vs_matrix_rate"] for row in found["prefill"]])
    return {
        "step_time_vs_bytes": mark(slowest, STEP_MARK, "ratio", at_most=True),
        "prefill_vs_matrix_rate": mark(least, PREFILL_MARK, "ratio", at_most=False),
    }


def measure(talk: Talk, mapping: DeviceMapping, sizes: Sizes, dtype: str, slots: int) -> None:
    model, device = random_model(sizes, dtype, mapping.device), torch_name(mapping.device)
    stock = [_stock_s(model, sizes, length, device) for length in sizes.prefills]
    engine = engine_of(model, sizes, dtype, mapping)
    limits = measure_limits(device, dtype, sizes)
    lengths = zip(sizes.prefills, stock, strict=True)
    prefills = [_prefill(engine, sizes, slots, length, stock_s, limits) for length, stock_s in lengths]
    decodes = [_decode(engine, sizes, slots, batch, limits) for batch in sizes.batches]
    how = how_of(engine)
    engine.unbind()
    talk.answer({**how, **limits._asdict(), "prefill": prefills, "decode": decodes})


def _stock_s(model: Any, sizes: Sizes, length: int, device: str) -> float:
    import torch

    from headway.engine.attention import NAME

    ids = torch.tensor([prompt_of(length, sizes.shape["vocab_size"], length)], device=device)

    def stock() -> None:
        with torch.inference_mode():
            model(input_ids=ids, use_cache=False, logits_to_keep=1).logits.argmax(-1).tolist()

    model.set_attn_implementation("sdpa")
    seconds = _median_s(stock)
    model.set_attn_implementation(NAME)
    return seconds


def _prefill(
    engine: TorchEngine, sizes: Sizes, slots: int, length: int, stock_s: float, limits: Limits
) -> dict[str, Any]:
    prompt = prompt_of(length, sizes.shape["vocab_size"], length)
    ours = _median_s(lambda: step(engine, [Running(list(prompt), Tables(slots).take(length + 1))]))
    flops = prefill_flops(sizes, length)
    return {
        "tokens": length,
        "step_ms": round(ours * 1e3, 3),
        "tokens_per_s": round(length / ours),
        "stock_sdpa_ms": round(stock_s * 1e3, 3),
        "flops": flops,
        "vs_matrix_rate": round(flops / ours / limits.flops_per_s, 4),
    }


def _median_s(act: Callable[[], None]) -> float:
    samples = []
    for number in range(1 + REPEATS):
        started = time.monotonic()
        act()
        if number:
            samples.append(time.monotonic() - started)
    return median(samples)


def _decode(engine: TorchEngine, sizes: Sizes, slots: int, batch: int, limits: Limits) -> dict[str, Any]:
    """Steps at `context` tokens each. Their K and V are whatever lies in the slab: only the time counts."""
    seconds = _steps_s(engine, sizes, slots, batch)
    needed = decode_bytes(sizes, batch, engine.card.kv_format.bytes_per_token, limits.itemsize)
    found = {
        "batch": batch,
        "context": sizes.context,
        "step_ms": round(seconds * 1e3, 3),
        "tokens_per_s": round(batch / seconds),
        "bytes": needed,
        "time_vs_bytes": round(seconds * limits.copy_bytes_per_s / needed, 4),
    }
    if engine.steps is not None and engine.steps.graphs is not None:
        graphs, engine.steps.graphs = engine.steps.graphs, None
        found["without_graphs_ms"] = round(_steps_s(engine, sizes, slots, batch) * 1e3, 3)
        engine.steps.graphs = graphs
    return found


def _steps_s(engine: TorchEngine, sizes: Sizes, slots: int, batch: int) -> float:
    tables, steps = Tables(slots), WARM + sizes.steps
    length = sizes.context
    running = [
        Running(prompt_of(length, sizes.shape["vocab_size"], at), tables.take(length + steps), computed=length - 1)
        for at in range(batch)
    ]
    samples = []
    for _ in range(steps):
        started = time.monotonic()
        step(engine, running)
        samples.append(time.monotonic() - started)
    return median(samples[WARM:])
