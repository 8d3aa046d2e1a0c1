"""Paged attention against a dense reference, on random tables, lengths and chunkings; and what it refuses."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from headway.core.model import KvFormat, LayerGroup
from headway.engine import attention
from headway.engine.attention import paged_attention
from headway.engine.contract import Chunk
from headway.engine.errors import ModelError
from headway.engine.paged import Gathered
from headway.engine.pages import ORDER, Pages, Plan, Span
from headway.engine.plan_cpu import plan_cpu
from headway.engine.plan_device import moved, plan_device, vectors, with_vectors
from headway.engine.working import Copies

DIM = 8


def pages_of(block_size: int, kv_heads: int, slots: int, layers: int = 2) -> tuple[Pages, np.ndarray]:
    group = LayerGroup(layers, kv_heads, DIM, layers * 2 * kv_heads * DIM * 4)
    kv_format = KvFormat(block_size, "float32", ORDER, (group,))
    slab = np.full((slots, kv_format.slot_bytes + 64), 0xFF, np.uint8)
    return Pages(slab, kv_format, torch.device("cpu")), slab


def dense(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float) -> torch.Tensor:
    """Causal attention in float64; q [heads, tokens, dim], k and v [kv_heads, tokens, dim]."""
    repeat = q.shape[0] // k.shape[0]
    k, v = k.double().repeat_interleave(repeat, 0), v.double().repeat_interleave(repeat, 0)
    scores = q.double() @ k.transpose(1, 2) * scale
    hidden = torch.ones(scores.shape[1:], dtype=torch.bool).triu(1)
    return scores.masked_fill(hidden, -torch.inf).softmax(-1) @ v


@st.composite
def cases(draw: st.DrawFn) -> tuple[int, int, int, list[list[int]], bool, int]:
    """block size, KV heads, query heads a KV head, chunk sizes of each sequence, slots in order or not, seed."""
    sequences = draw(st.lists(st.lists(st.integers(1, 23), min_size=1, max_size=4), min_size=1, max_size=4))
    return (
        draw(st.sampled_from([1, 4, 16])),
        draw(st.integers(1, 3)),
        draw(st.integers(1, 3)),
        sequences,
        draw(st.booleans()),
        draw(st.integers(0, 1 << 16)),
    )


def plain(pages: Pages, chunks: Sequence[Chunk]) -> Plan:
    """Without working copies."""
    return plan_cpu(pages, chunks, Copies(pages, 0))


class WithCopies:
    """Sequences are known by their block tables; few copies have room where `most_bytes` is small."""

    def __init__(self, most_bytes: int) -> None:
        self._most_bytes = most_bytes
        self._copies: Copies | None = None

    def __call__(self, pages: Pages, chunks: Sequence[Chunk]) -> Plan:
        if self._copies is None or self._copies.pages is not pages:
            self._copies = Copies(pages, self._most_bytes)
        named = [replace(chunk, sequence=int(chunk.slots[0])) for chunk in chunks]
        return plan_cpu(pages, named, self._copies)


@pytest.mark.parametrize("plan_of", [plain, plan_device, WithCopies(1 << 30), WithCopies(100_000)])
@settings(max_examples=120, deadline=None)
@given(case=cases())
def test_equals_dense_attention(
    plan_of: Callable[..., Plan], case: tuple[int, int, int, list[list[int]], bool, int]
) -> None:
    block_size, kv_heads, group, sequences, scattered, seed = case
    torch.manual_seed(seed)
    lengths = [sum(sizes) for sizes in sequences]
    needed = [-(-length // block_size) for length in lengths]
    pages, _ = pages_of(block_size, kv_heads, sum(needed) + 2)
    order = np.random.default_rng(seed).permutation(pages.slots) if scattered else np.arange(pages.slots)
    tables = np.split(order.astype(np.int32)[: sum(needed)], np.cumsum(needed)[:-1])
    q = [torch.randn(kv_heads * group, length, DIM) for length in lengths]
    k = [torch.randn(kv_heads, length, DIM) for length in lengths]
    v = [torch.randn(kv_heads, length, DIM) for length in lengths]
    wanted = [dense(*qkv, 0.3) for qkv in zip(q, k, v, strict=True)]
    done = [0] * len(sequences)
    for turn in range(max(len(sizes) for sizes in sequences)):
        active = [at for at, sizes in enumerate(sequences) if turn < len(sizes)]
        cuts = {at: slice(done[at], done[at] + sequences[at][turn]) for at in active}
        chunks = [Chunk([0] * sequences[at][turn], done[at], tables[at], None) for at in active]
        pack = [torch.cat([part[at][:, cuts[at]] for at in active], dim=1)[None] for part in (q, k, v)]
        plan = plan_of(pages, chunks)
        for layer in range(2):  # the second layer must not disturb the first
            sign = 1.0 if layer == 0 else -1.0
            out, _ = paged_attention(
                SimpleNamespace(layer_idx=layer), pack[0], pack[1], sign * pack[2], None, 0.3, headway_plan=plan
            )
            row = 0
            for at in active:
                count = sequences[at][turn]
                found = sign * out[0, row : row + count].transpose(0, 1).double()
                assert torch.allclose(found, wanted[at][:, cuts[at]], atol=1e-5)
                row += count
        for at in active:
            done[at] += sequences[at][turn]


@pytest.mark.parametrize("before", [0, 7])
@pytest.mark.parametrize("rows", [2, 4, 11])
def test_products_in_bfloat16_equal_dense_attention(rows: int, before: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attention, "SLICE", 4)
    generator = torch.Generator().manual_seed(rows)
    length = before + rows
    q, k, v = (torch.randn(heads, length, DIM, generator=generator).to(torch.bfloat16) for heads in (6, 2, 2))
    span = Span(0, rows, length, torch.zeros(0, dtype=torch.int64), None)
    found = attention._attend_half(q[:, before:], k, v, span, 0.3)
    assert found.dtype == torch.bfloat16
    assert torch.allclose(found.double(), dense(q, k, v, 0.3)[:, before:], atol=0.03)


def test_sequences_of_one_length_decode_together(monkeypatch: pytest.MonkeyPatch) -> None:
    pages, _ = pages_of(4, 1, 64)
    lengths = [30, 3, 31, 4, 9]
    chunks = [Chunk([0], length - 1, np.arange(8, dtype=np.int32), None) for length in lengths]
    monkeypatch.setattr("headway.engine.paged.BATCH_TOKENS", 64)
    plan = plan_device(pages, chunks)
    batches = [batch for batch in plan.batches if isinstance(batch, Gathered)]
    assert [batch.lengths.tolist() for batch in batches] == [[31, 30], [9, 4, 3]]
    assert [batch.rows.tolist() for batch in batches] == [[2, 0], [4, 3, 1]]
    assert [tuple(batch.table.shape) for batch in batches] == [(2, 8), (3, 3)]


def test_all_that_the_host_says_of_a_forward_goes_over_in_one_copy() -> None:
    pages, _ = pages_of(4, 1, 64)
    table = np.arange(8, dtype=np.int32)
    chunks = [Chunk([0] * 6, 3, table, None), Chunk([0], 20, table, None), Chunk([0], 5, table, None)]
    plan = plan_device(pages, chunks)
    went = moved(vectors(plan), torch.device("cpu"))
    assert len({vector.untyped_storage().data_ptr() for vector in went}) == 1
    again = with_vectors(plan, went)
    assert [vector.tolist() for vector in vectors(again)] == [vector.tolist() for vector in vectors(plan)]
    assert again.spans[0].mask is plan.spans[0].mask


def call(**keywords: Any) -> None:
    pages, _ = pages_of(4, 1, 4)
    plan = plain(pages, [Chunk([1, 2], 0, np.array([3], np.int32), None)])
    given: dict[str, Any] = {"attention_mask": None, "scaling": 1.0, "headway_plan": plan} | keywords
    heads = given.pop("kv_heads", 1)
    qkv = (torch.ones(1, 1, 2, DIM), torch.ones(1, heads, 2, DIM), torch.ones(1, heads, 2, DIM))
    paged_attention(SimpleNamespace(layer_idx=0), *qkv, **given)


@pytest.mark.parametrize(
    "keywords",
    [
        {"sliding_window": 4},
        {"softcap": 50.0},
        {"s_aux": torch.ones(1)},
        {"position_bias": torch.ones(1)},
        {"dropout": 0.1},
        {"is_causal": False},
        {"output_attentions": True},
        {"something_new": 1},
        {"attention_mask": torch.ones(1, 1, 2, 2)},
        {"headway_plan": None},
        {"kv_heads": 2},
    ],
    ids=lambda keywords: next(iter(keywords)),
)
def test_what_it_does_not_implement_is_refused(keywords: dict[str, Any]) -> None:
    with pytest.raises(ModelError):
        call(**keywords)


def test_keywords_that_ask_for_nothing_are_fine() -> None:
    call(sliding_window=None, softcap=None, dropout=0.0, is_causal=True, position_ids=torch.zeros(1, 2))


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_masks_are_made_for_those_who_read_them(dtype: str) -> None:
    """Products in bfloat16 hide what follows by themselves."""
    group = LayerGroup(2, 1, DIM, 2 * 2 * DIM * 4)
    kv_format = KvFormat(4, dtype, ORDER, (group,))
    pages = Pages(np.zeros((9, kv_format.slot_bytes), np.uint8), kv_format, torch.device("cpu"))
    table = np.arange(9, dtype=np.int32)
    spans = plain(
        pages, [Chunk([0] * 5, 3, table, None), Chunk([0] * 5, 0, table, None), Chunk([0], 7, table, None)]
    ).spans
    assert [span.mask is not None for span in spans] == [dtype != "bfloat16", False, False]
    assert pages.plain_products == (dtype == "bfloat16")


def test_consecutive_slots_are_written_as_one_run() -> None:
    pages, _ = pages_of(4, 1, 12)
    table = np.array([5, 6, 7, 2, 9], np.int32)
    plan = plain(pages, [Chunk([0] * 17, 2, table, None)])
    assert [tuple(run) for run in plan.runs] == [(2, 10, 6), (10, 14, 2)]
    assert [tuple(piece) for piece in plan.pieces] == [(0, 2, 5, 2), (14, 17, 9, 0)]


def test_gather_leaves_out_what_lies_past_the_end() -> None:
    pages, slab = pages_of(4, 1, 3)
    plan = plain(pages, [Chunk([0] * 5, 0, np.array([2, 0], np.int32), None)])
    plan.store(1, torch.stack([torch.ones(5, 1, DIM), torch.full((5, 1, DIM), 2.0)], 1))
    key, value = pages.gather(1, plan.spans[0].blocks, 5)
    assert key.shape == (5, 1, DIM)
    assert bool((key == 1).all())
    assert bool((value == 2).all())
    assert (slab[1] == 0xFF).all()
