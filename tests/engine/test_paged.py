"""Attention on a device, by every reader, against dense attention; Triton's kernels are interpreted where no GPU is."""

from __future__ import annotations

import importlib.util
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from headway.core.model import DTYPE_BYTES, KvFormat, LayerGroup
from headway.engine.attention import attend
from headway.engine.contract import Chunk
from headway.engine.errors import ModelError
from headway.engine.paged import Gather, Reader, Varlen
from headway.engine.paged_proof import choose_reader
from headway.engine.pages import ORDER, SCALED, Pages
from headway.engine.plan_device import moved, plan_device, vectors, with_vectors

DEVICE = torch.device("cuda:0" if torch.cuda.is_available() else "cpu")
TRITON = pytest.param("triton", marks=pytest.mark.triton)
TOLERANCE = {"float32": 2e-5, "bfloat16": 4e-2, "float16": 5e-3, "int8": 5e-2}


def format_of(dtype: str, block_size: int, kv_heads: int, dim: int, layers: int) -> KvFormat:
    head_bytes = dim * DTYPE_BYTES[dtype] + (4 if dtype == "int8" else 0)
    group = LayerGroup(layers, kv_heads, dim, layers * 2 * kv_heads * head_bytes)
    return KvFormat(block_size, dtype, SCALED if dtype == "int8" else ORDER, (group,))


def reader_of(name: str, pages: Pages, heads: int, processors: int = 8) -> Reader:
    if name == "gather":
        return Gather()
    from headway.engine.paged_triton import InPlace

    return InPlace(pages, heads, processors)


@dataclass(frozen=True)
class Case:
    dtype: str
    block_size: int
    kv_heads: int
    group: int
    dim: int
    # Chunk sizes of each sequence.
    sequences: list[list[int]]
    processors: int
    width: int
    seed: int


@st.composite
def cases(draw: st.DrawFn) -> Case:
    """Chunks of one token are steps; long first chunks make others see many blocks."""
    chunk = st.one_of(st.just(1), st.integers(1, 40))
    return Case(
        draw(st.sampled_from(["float32", "bfloat16", "float16", "int8"])),
        draw(st.sampled_from([1, 4, 16])),
        draw(st.integers(1, 3)),
        draw(st.sampled_from([1, 2, 3, 7])),
        draw(st.sampled_from([8, 16, 24])),
        draw(st.lists(st.lists(chunk, min_size=1, max_size=4), min_size=1, max_size=4)),
        draw(st.sampled_from([1, 8, 64])),
        draw(st.sampled_from([1, 30])),
        draw(st.integers(0, 1 << 16)),
    )


def dense(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float) -> torch.Tensor:
    """Causal, in float64; [tokens, heads, dim] each."""
    q, k, v = (part.transpose(0, 1).double() for part in (q, k, v))
    k, v = (part.repeat_interleave(len(q) // len(k), 0) for part in (k, v))
    hidden = torch.ones((q.shape[1],) * 2, dtype=torch.bool).triu(1)
    shares = (q @ k.transpose(1, 2) * scale).masked_fill(hidden, -torch.inf).softmax(-1)
    return (shares @ v).transpose(0, 1)


def attended(
    reader: Reader, pages: Pages, chunks: list[Chunk], layer: int, pack: tuple[torch.Tensor, torch.Tensor], width: int
) -> torch.Tensor:
    plan = plan_device(pages, chunks, reader, width)
    plan = with_vectors(plan, moved(vectors(plan), pages.device))
    with torch.inference_mode():
        return attend(plan, layer, pack[0].to(pages.device), pack[1].to(pages.device), 0.3).cpu()


@pytest.mark.parametrize("name", ["gather", TRITON])
@settings(max_examples=20, deadline=None)
@given(case=cases())
def test_equals_dense_attention(name: str, case: Case) -> None:
    """In two layers, over a slab whose other bytes are NaN."""
    generator = torch.Generator().manual_seed(case.seed)
    lengths = [sum(sizes) for sizes in case.sequences]
    needed = [-(-length // case.block_size) for length in lengths]
    kv_format = format_of(case.dtype, case.block_size, case.kv_heads, case.dim, 2)
    slots = sum(needed) + 2
    slab = torch.full((slots, -(-kv_format.slot_bytes // 64) * 64 + 64), 0xFF, dtype=torch.uint8, device=DEVICE)
    pages = Pages(slab, kv_format, DEVICE)
    order = np.random.default_rng(case.seed).permutation(slots).astype(np.int32)
    tables = np.split(order[: sum(needed)], np.cumsum(needed)[:-1])
    heads = case.kv_heads * case.group
    q = [torch.randn((length, heads, case.dim), generator=generator).to(pages.dtype) for length in lengths]
    kv = [torch.randn((length, 2, case.kv_heads, case.dim), generator=generator).to(pages.dtype) for length in lengths]
    reader = reader_of(name, pages, heads, case.processors)
    done = [0] * len(lengths)
    for turn in range(max(map(len, case.sequences))):
        active = [at for at, sizes in enumerate(case.sequences) if turn < len(sizes)]
        cuts = {at: slice(done[at], done[at] + case.sequences[at][turn]) for at in active}
        chunks = [Chunk([0] * case.sequences[at][turn], done[at], tables[at], None) for at in active]
        packs = torch.cat([q[at][cuts[at]] for at in active]), torch.cat([kv[at][cuts[at]] for at in active])
        for layer, sign in enumerate((1.0, -1.0)):  # the second layer must not disturb the first
            found = attended(reader, pages, chunks, layer, (packs[0], sign * packs[1]), case.width)
            wanted = [dense(q[at], sign * kv[at][:, 0], sign * kv[at][:, 1], 0.3)[cuts[at]] for at in active]
            assert float((found.double() - torch.cat(wanted)).abs().max()) <= TOLERANCE[case.dtype]
        for at in active:
            done[at] += case.sequences[at][turn]


def test_every_row_is_in_one_batch_and_chunks_in_tiles() -> None:
    pytest.importorskip("triton", reason="Triton is not installed (pip install .[triton])")
    kv_format = format_of("float32", 4, 2, 16, 1)
    pages = Pages(np.zeros((40, kv_format.slot_bytes), np.uint8), kv_format, torch.device("cpu"))
    table = np.arange(40, dtype=np.int32)
    chunks = [Chunk([0], 30, table, None), Chunk([0] * 70, 8, table, None), Chunk([0] * 3, 0, table, None)]
    plan = plan_device(pages, chunks, reader_of("triton", pages, 8))
    steps, later = plan.batches
    assert isinstance(steps.rows, torch.Tensor)
    assert isinstance(later.rows, torch.Tensor)
    assert (steps.rows.tolist(), later.rows.tolist()) == ([0], list(range(1, 71)))
    assert [(span.start, span.stop) for span in plan.spans] == [(71, 74)]
    # 64 rows of a tile are 16 tokens for 4 query heads each.
    assert later.tiles.T.tolist() == [[0, 1 + at, at, min(16, 70 - at), 8 + at] for at in range(0, 70, 16)]  # type: ignore[attr-defined]
    alone = plan_device(pages, chunks[:1], reader_of("triton", pages, 8)).batches[0]
    assert alone.rows is None


@pytest.mark.triton
def test_what_programs_saw_of_a_sequence_is_put_together() -> None:
    """Shares that are empty, one token long, and whole; one sequence is all in its first share."""
    lengths, size = [1, 63, 64, 65, 400, 513, 1000], 16
    kv_format = format_of("float32", size, 1, 16, 1)
    pages = Pages(torch.full((200, kv_format.slot_bytes), 0xFF, dtype=torch.uint8, device=DEVICE), kv_format, DEVICE)
    reader = reader_of("triton", pages, 3, processors=32)
    order, generator = np.random.default_rng(2).permutation(200).astype(np.int32), torch.Generator().manual_seed(2)
    tables = np.split(order, np.cumsum([-(-length // size) for length in lengths]))[: len(lengths)]
    q = [3 * torch.randn((length, 3, 16), generator=generator) for length in lengths]
    kv = [torch.randn((length, 2, 1, 16), generator=generator) for length in lengths]
    for length, table, one, pair in zip(lengths, tables, q, kv, strict=True):
        if length > 1:
            attended(reader, pages, [Chunk([0] * (length - 1), 0, table, None)], 0, (one[:-1], pair[:-1]), 1)
    chunks = [Chunk([0], length - 1, table, None) for length, table in zip(lengths, tables, strict=True)]
    plan = plan_device(pages, chunks, reader)
    assert plan.batches[0].splits == 4  # type: ignore[attr-defined]
    last = torch.cat([one[-1:] for one in q]), torch.cat([pair[-1:] for pair in kv])
    found = attended(reader, pages, chunks, 0, last, 1)
    wanted = torch.cat([dense(one, pair[:, 0], pair[:, 1], 0.3)[-1:] for one, pair in zip(q, kv, strict=True)])
    assert float((found.double() - wanted).abs().max()) < 1e-5


@pytest.mark.triton
def test_sequences_are_split_where_they_are_few() -> None:
    from headway.engine.paged_triton import InPlace

    kv_format = format_of("bfloat16", 16, 8, 16, 1)
    pages = Pages(torch.zeros((100, kv_format.slot_bytes), dtype=torch.uint8), kv_format, torch.device("cpu"))
    reader = InPlace(pages, 32, 132)
    assert [reader._splits(8 * batch, 4096) for batch in (1, 2, 4, 16, 33, 64)] == [32, 16, 8, 2, 1, 1]
    assert [reader._splits(8, tokens) for tokens in (16, 128, 256, 1000)] == [1, 1, 2, 4]


@pytest.fixture
def sparse() -> Iterator[Any]:
    """5 GiB of bytes, of which only those that are touched lie anywhere."""
    with tempfile.TemporaryFile() as file:
        file.truncate(5 << 30)
        yield np.memmap(file, np.uint8, "r+")


@pytest.mark.triton
@pytest.mark.parametrize("count", [1, 20])
def test_offsets_past_two_to_the_31st(sparse: Any, count: int) -> None:
    """Slots whose first number lies past 2^31 numbers, and one that lies before; chunks of 1 and 20 tokens."""
    if DEVICE.type == "cuda":
        sparse = torch.zeros(5 << 30, dtype=torch.uint8, device=DEVICE)
    kv_format = format_of("float16", 16, 2, 16, 1)
    pages = Pages(sparse.reshape(5 << 14, 1 << 16), kv_format, DEVICE)
    table = np.array([(5 << 14) - 1, 3, (4 << 14) + 7, 70_000], np.int32)
    assert int(table[0]) * (1 << 15) > 1 << 31
    generator = torch.Generator().manual_seed(3)
    q, kv = torch.randn((60, 4, 16), generator=generator), torch.randn((60, 2, 2, 16), generator=generator)
    q, kv = q.half(), kv.half()
    reader = reader_of("triton", pages, 4)
    before = 60 - count
    attended(reader, pages, [Chunk([0] * before, 0, table, None)], 0, (q[:before], kv[:before]), 1)
    found = attended(reader, pages, [Chunk([0] * count, before, table, None)], 0, (q[before:], kv[before:]), 1)
    wanted = dense(q, kv[:, 0], kv[:, 1], 0.3)[before:]
    assert float((found.double() - wanted).abs().max()) < 5e-3


def test_the_choice_says_why_others_were_refused(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO")
    choice = choose_reader(format_of("bfloat16", 16, 2, 64, 3), 8, DEVICE)
    assert choice.reader.name in ("varlen", "triton", "gather")
    order = ["varlen", "triton", "gather"]
    assert list(choice.refused) == order[: order.index(choice.reader.name)]
    assert all(choice.refused.values())
    assert f"event=attention reader={choice.reader.name}" in caplog.text
    if DEVICE.type == "cpu" and importlib.util.find_spec("triton"):
        assert choice.reader.name == "triton"


@pytest.mark.triton
def test_a_reader_that_is_wrong_is_not_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    import headway.engine.paged_triton as module

    tiled = module.Tiled.attend
    monkeypatch.setattr(module.Tiled, "attend", lambda *given: tiled(*given) * 1.2)
    choice = choose_reader(format_of("float32", 16, 1, 16, 1), 4, DEVICE)
    assert choice.reader.name == "gather"
    assert "differs from dense attention" in choice.refused["triton"]


def test_where_nothing_works_the_model_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: object) -> None:
        raise RuntimeError("no kernel")

    monkeypatch.setattr("headway.engine.paged_proof.difference_of", broken)
    with pytest.raises(ModelError, match=r"does not work on cpu.*no kernel"):
        choose_reader(format_of("float32", 16, 1, 16, 1), 4, torch.device("cpu"))


def test_torchs_varlen_attention_is_asked_as_it_wants_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """It has no kernel for a CPU, so a stand-in with its parameters, that computes what they mean."""
    module = pytest.importorskip("torch.nn.attention.varlen")
    if "block_table" not in module.varlen_attn.__kwdefaults__:
        pytest.skip(f"varlen_attn of torch {torch.__version__} takes no block table")
    monkeypatch.setattr(module, "varlen_attn", _varlen(module))
    kv_format = format_of("bfloat16", 16, 2, 16, 2)
    assert choose_reader(kv_format, 8, torch.device("cpu")).reader.name == "varlen"
    pages = Pages(np.zeros((4, kv_format.slot_bytes), np.uint8), kv_format, torch.device("cpu"))
    chunks = [Chunk([0], 30, np.arange(4, dtype=np.int32), None), Chunk([0] * 9, 8, np.arange(4, dtype=np.int32), None)]
    plan = with_vectors(plan := plan_device(pages, chunks, Varlen(pages)), vectors(plan))
    assert [vector.dtype for vector in plan.batches[0].vectors()] == [torch.int64, *[torch.int32] * 3]  # type: ignore[attr-defined]


def _varlen(module: ModuleType) -> Any:
    def varlen_attn(
        query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, cu_seq_q: torch.Tensor, cu_seq_k: None,
        max_q: int, max_k: int, *, scale: float | None, window_size: tuple[int, int], enable_gqa: bool,
        seqused_k: torch.Tensor, block_table: torch.Tensor,
    ) -> torch.Tensor:  # fmt: skip
        assert {at.dtype for at in (cu_seq_q, seqused_k, block_table)} == {torch.int32}
        assert (window_size, enable_gqa) == ((-1, 0), True)
        assert int(cu_seq_q.diff().max()) == max_q
        assert int(seqused_k.max()) <= max_k
        out = []
        for at, (start, stop) in enumerate(zip(cu_seq_q[:-1].tolist(), cu_seq_q[1:].tolist(), strict=True)):
            length, slots = int(seqused_k[at]), block_table[at].long()
            k, v = (part[slots].flatten(0, 1)[:length].float() for part in (key, value))
            q = query.new_zeros((length, *query.shape[1:])).float()
            q[length - (stop - start) :] = query[start:stop]
            out.append(dense(q, k, v, q.shape[2] ** -0.5 if scale is None else scale)[length - (stop - start) :])
        return torch.cat(out).to(query.dtype)

    return varlen_attn


@pytest.mark.parametrize(
    ("tokens", "position", "slots", "message"),
    [
        (1, 16, [3], "cannot hold 17 tokens"),
        (9, 30, [3, 1], "cannot hold 39 tokens"),
        (1, 16, [3, 8], "outside the slab of 8"),
        (1, 16, [-1, 3], "outside the slab of 8"),
        (1, -1, [3], "position that is not negative"),
        (0, 0, [3], "needs tokens"),
    ],
)
def test_a_chunk_without_its_slots_is_refused_beside_others(
    tokens: int, position: int, slots: list[int], message: str
) -> None:
    kv_format = format_of("float32", 16, 1, 16, 1)
    pages = Pages(np.zeros((8, kv_format.slot_bytes), np.uint8), kv_format, torch.device("cpu"))
    good = Chunk([0], 20, np.arange(4, dtype=np.int32), None)
    with pytest.raises(ValueError, match=message):
        plan_device(pages, [good, Chunk([0] * tokens, position, np.array(slots, np.int32), None), good])
