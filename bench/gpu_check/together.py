"""Prefill and decode on one device: two processes beside each other, against one mixed worker with the same work.

The mixed worker packs a chunk of a prompt into each decode step. Two processes hold the weights twice, and without MPS
they take turns on the device.
"""

from __future__ import annotations

import time
from contextlib import ExitStack
from typing import Any

from bench.gpu_check.model import Running, Tables, blocks, engine_of, prompt_of, random_model, slab_bytes, step
from bench.gpu_check.pair import Talk, child, device_of
from bench.gpu_check.sizes import Sizes
from bench.gpu_check.steps import dtype_on
from bench.report import median, percentile
from headway.slab.device import DeviceMapping, DeviceSegment

CHUNK = 256


def run(name: str, sizes: Sizes) -> dict[str, Any]:
    dtype = dtype_on(name)
    _, length, steps, batch = sizes.together
    slots = blocks(length + 1) + batch * blocks(sizes.context + steps)
    segment = DeviceSegment(device_of(name), slab_bytes(sizes, dtype, slots))
    try:
        two = _timed(segment, sizes, slots, dtype, ("prefill", "decode"))
        one = _timed(segment, sizes, slots, dtype, ("mixed",))
    finally:
        segment.remove()
    prompts, length, steps, batch = sizes.together
    return {
        "work": {"prompts": prompts, "prompt_tokens": length, "decode_steps": steps, "decode_batch": batch},
        "two_processes": two,
        "mixed": one,
        "two_processes_beat_mixed": two["seconds"] < one["seconds"] and two["itl_p99_ms"] <= one["itl_p99_ms"],
    }


def _timed(segment: DeviceSegment, sizes: Sizes, slots: int, dtype: str, roles: tuple[str, ...]) -> dict[str, Any]:
    """Seconds until all work is done, and how even the decode steps were."""
    with ExitStack() as stack:
        workers = [stack.enter_context(child(work, segment, sizes, slots, dtype, role)) for role in roles]
        for worker in workers:
            worker.hear()
        started = time.monotonic()
        for worker in workers:
            worker.tell("go")
        answers = [worker.hear() for worker in workers]
        seconds = max(ended for ended, _ in answers) - started
    gaps = [gap for _, gaps in answers for gap in gaps]
    return {
        "seconds": round(seconds, 3),
        "itl_p50_ms": round(median(gaps) * 1e3, 2),
        "itl_p99_ms": round(percentile(gaps, 0.99) * 1e3, 2),
    }


def work(talk: Talk, mapping: DeviceMapping, sizes: Sizes, slots: int, dtype: str, role: str) -> None:
    """Answers when ready; once told, does its share and answers (when it ended, seconds of each decode step)."""
    engine = engine_of(random_model(sizes, dtype, mapping.device), sizes, dtype, mapping)
    prompts, length, steps, batch = sizes.together
    vocabulary, context, tables = sizes.shape["vocab_size"], sizes.context, Tables(slots)
    prompt_table = tables.take(length + 1)
    decoding = [
        Running(prompt_of(context, vocabulary, at), tables.take(context + steps), computed=context - 1)
        for at in range(batch)
    ]
    waiting = [Running(prompt_of(length, vocabulary, at), prompt_table) for at in range(prompts)]
    # Warm up on the last prompt, which nobody looks at.
    step(engine, [Running(prompt_of(length, vocabulary, 99), prompt_table)], CHUNK)
    talk.answer(None)
    talk.asked()
    gaps = []
    for left in (waiting, []) if role == "prefill" else ([],):
        while left:
            step(engine, left[:1])
            left.pop(0)
    if role != "prefill":
        if role == "decode":
            waiting = []
        for _ in range(steps):
            began = time.monotonic()
            step(engine, [*decoding, *waiting[:1]], CHUNK)
            gaps.append(time.monotonic() - began)
            waiting = [sequence for sequence in waiting if not sequence.outputs]
        while waiting:
            step(engine, waiting[:1], CHUNK)
            waiting = [sequence for sequence in waiting if not sequence.outputs]
    talk.answer((time.monotonic(), gaps))
    engine.unbind()
