"""Prefill and decode step times of the engine over the mapped slab, with the stock forward beside prefill."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

from bench.gpu_check.model import Running, Tables, blocks, engine_of, prompt_of, random_model, slab_bytes, step
from bench.gpu_check.pair import Talk, child, device_of, torch_name
from bench.gpu_check.sizes import Sizes
from bench.report import median
from headway.engine.contract import Engine
from headway.slab.device import DeviceMapping, DeviceSegment

REPEATS = 3
WARM = 2


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
    return {"dtype": dtype, "slab_bytes": segment.size, **found}


def measure(talk: Talk, mapping: DeviceMapping, sizes: Sizes, dtype: str, slots: int) -> None:
    model = random_model(sizes, dtype, mapping.device)
    engine = engine_of(model, sizes, dtype, mapping)
    prefills = [_prefill(model, engine, sizes, slots, length, torch_name(mapping.device)) for length in sizes.prefills]
    decodes = [_decode(engine, sizes, slots, batch) for batch in sizes.batches]
    engine.unbind()
    talk.answer({"prefill": prefills, "decode": decodes})


def _prefill(model: Any, engine: Engine, sizes: Sizes, slots: int, length: int, device: str) -> dict[str, Any]:
    import torch

    from headway.engine.attention import NAME

    prompt = prompt_of(length, sizes.shape["vocab_size"], length)
    ours = _median_s(lambda: step(engine, [Running(list(prompt), Tables(slots).take(length + 1))]))
    ids = torch.tensor([prompt], device=device)

    def stock() -> None:
        with torch.inference_mode():
            model(input_ids=ids, use_cache=False, logits_to_keep=1).logits.argmax(-1).tolist()

    model.set_attn_implementation("sdpa")
    theirs = _median_s(stock)
    model.set_attn_implementation(NAME)
    return {
        "tokens": length,
        "step_ms": round(ours * 1e3, 3),
        "tokens_per_s": round(length / ours),
        "stock_sdpa_ms": round(theirs * 1e3, 3),
    }


def _median_s(act: Callable[[], None]) -> float:
    samples = []
    for number in range(1 + REPEATS):
        started = time.monotonic()
        act()
        if number:
            samples.append(time.monotonic() - started)
    return median(samples)


def _decode(engine: Engine, sizes: Sizes, slots: int, batch: int) -> dict[str, Any]:
    """Steps at `context` tokens each. Their K and V are whatever lies in the slab: only the time counts."""
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
    seconds = median(samples[WARM:])
    return {
        "batch": batch,
        "context": length,
        "step_ms": round(seconds * 1e3, 3),
        "tokens_per_s": round(batch / seconds),
    }
