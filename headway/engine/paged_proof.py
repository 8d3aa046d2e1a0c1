"""Which reader attends on this device: the first that equals dense attention there, tried at load, with the reasons."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from typing import NamedTuple

import numpy as np
import torch

from headway.core.model import DTYPE_BYTES, KvFormat, LayerGroup
from headway.engine.attention import attend
from headway.engine.contract import Chunk
from headway.engine.errors import ModelError
from headway.engine.paged import Gather, Reader, Varlen
from headway.engine.pages import SCALE, Pages
from headway.engine.plan_device import moved, plan_device, vectors, with_vectors

log = logging.getLogger(__name__)

# Of the largest difference, where values are about 1; bfloat16 has 8 bits, int8 a scale for each token and head.
_TOLERANCE = {"float32": 1e-4, "float16": 1e-2, "bfloat16": 4e-2, "int8": 4e-2}

Make = Callable[[Pages, int], Reader]


class Choice(NamedTuple):
    """refused: why each of the readers before it was not taken, by name."""

    reader: Reader
    refused: dict[str, str]


def choose_reader(kv_format: KvFormat, heads: int, device: torch.device) -> Choice:
    """For a model with so many query heads. Raises ModelError where attention on this device is wrong in every way."""
    refused: dict[str, str] = {}
    for name, make in _candidates():
        pages = _pages(kv_format, device)
        try:
            reader = make(pages, heads)
            difference = difference_of(reader, pages, heads)
        except Exception as error:  # a compiler, a launch, a missing library: each has its own
            refused[name] = f"{type(error).__name__}: {(str(error).strip().splitlines() or [''])[0]}"
            _check_usable(device, name, refused[name])
            continue
        if difference <= _TOLERANCE[kv_format.dtype]:
            log.info(
                "event=attention reader=%s device=%s difference=%.2g refused=%s", name, device, difference, refused
            )
            return Choice(reader, refused)
        refused[name] = f"differs from dense attention by {difference:.2g}"
    raise ModelError(f"attention over the slab does not work on {device}: {refused}")


def difference_of(reader: Reader, pages: Pages, heads: int) -> float:
    """The largest, of decode and of chunks, over a slab of NaN with scattered tables; `pages` has one layer."""
    size, generator = pages.block_size, torch.Generator().manual_seed(5)
    # Tokens that are there before, and new ones.
    cases = [(0, 1), (size - 1, 1), (size, 1), (3 * size + 4, 1), (17 * size, 1), (2 * size + 3, 37), (5, 2)]
    order, tables = np.random.default_rng(5).permutation(pages.slots).astype(np.int32), []
    for before, new in cases:
        count = -(-(before + new) // size)
        table, order = order[:count], order[count:]
        tables.append(table)
    tokens = [before + new for before, new in cases]
    query, key, value = (
        [torch.randn((count, number, pages.dim), generator=generator) for count in tokens]
        for number in (heads, pages.heads, pages.heads)
    )
    new_kv = [torch.stack(pair, 1) for pair in zip(key, value, strict=True)]
    for (before, _), table, q, kv in zip(cases, tables, query, new_kv, strict=True):
        if before:
            _attended(reader, pages, [Chunk([0] * before, 0, table, None)], q[:before], kv[:before])
    chunks = [Chunk([0] * new, before, table, None) for (before, new), table in zip(cases, tables, strict=True)]
    late = [slice(before, before + new) for before, new in cases]
    packs = [torch.cat([one[cut] for one, cut in zip(part, late, strict=True)]) for part in (query, new_kv)]
    found = _attended(reader, pages, chunks, *packs)
    rounded = [[one.to(pages.dtype) for one in part] for part in (query, key, value)]
    wanted = torch.cat([_dense(*qkv)[cut] for *qkv, cut in zip(*rounded, late, strict=True)])
    difference = float((found.double() - wanted).abs().max())
    return difference if difference == difference else float("inf")


def _candidates() -> Iterator[tuple[str, Make]]:
    yield Varlen.name, lambda pages, heads: Varlen(pages)
    yield "triton", _in_place
    yield Gather.name, lambda pages, heads: Gather()


def _in_place(pages: Pages, heads: int) -> Reader:
    # Triton is there where torch was built for CUDA.
    from headway.engine.kernels import INTERPRETED
    from headway.engine.paged_triton import InPlace

    if pages.device.type != "cuda" and not INTERPRETED:
        raise ValueError(f"Triton makes no kernels for {pages.device}")
    return InPlace(pages, heads, processors_of(pages.device))


def processors_of(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 8


def _pages(kv_format: KvFormat, device: torch.device) -> Pages:
    """One layer of this format, all NaN."""
    group = kv_format.groups[0]
    numbers = 2 * group.kv_heads * group.head_dim * DTYPE_BYTES[kv_format.dtype]
    if kv_format.dtype == "int8":
        numbers += 2 * group.kv_heads * SCALE.itemsize
    one = LayerGroup(1, group.kv_heads, group.head_dim, numbers)
    tried = KvFormat(kv_format.block_size, kv_format.dtype, kv_format.order, (one,))
    slots = 40 + 40 // kv_format.block_size
    return Pages(
        torch.full((slots, -(-tried.slot_bytes // 64) * 64), 0xFF, dtype=torch.uint8, device=device), tried, device
    )


def _attended(reader: Reader, pages: Pages, chunks: list[Chunk], q: torch.Tensor, kv: torch.Tensor) -> torch.Tensor:
    plan = plan_device(pages, chunks, reader)
    plan = with_vectors(plan, moved(vectors(plan), pages.device))
    with torch.inference_mode():
        return attend(plan, 0, q.to(pages.device), kv.to(pages.device), None).cpu()


def _dense(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    """Causal, in float64; [tokens, heads, dim] each."""
    q, k, v = (part.transpose(0, 1).double() for part in (q, k, v))
    k, v = (part.repeat_interleave(len(q) // len(part), 0) for part in (k, v))
    scores = q @ k.transpose(1, 2) * q.shape[2] ** -0.5
    hidden = torch.ones(scores.shape[1:], dtype=torch.bool).triu(1)
    seen: torch.Tensor = scores.masked_fill(hidden, -torch.inf).softmax(-1) @ v
    return seen.transpose(0, 1)


def _check_usable(device: torch.device, name: str, reason: str) -> None:
    """Raises ModelError where what was tried left the device of no use to this process."""
    if device.type != "cuda":
        return
    try:
        torch.cuda.synchronize(device)
    except RuntimeError:
        raise ModelError(f"{device} does not work any more after attention by {name} was tried: {reason}") from None
