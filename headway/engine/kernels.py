"""Kernels in Triton's language: comes with torch's build for CUDA, nothing else is compiled.

Offsets into the slab are 64-bit.
"""

# It is a language of its own, without types.
# mypy: ignore-errors

import triton
import triton.language as tl


@triton.jit(do_not_specialize=["tile_count", "table_width", "out_rows"])
def attend_tiles(
    query, keys, values, key_scales, value_scales, table, tiles, out, sums, scale,
    tile_count, table_width, out_rows, query_row, query_head, slot, token, head, scale_slot, scale_token,
    GROUP: tl.constexpr, DIM: tl.constexpr, SIZE: tl.constexpr, ROWS: tl.constexpr, TOKENS: tl.constexpr,
    WIDE: tl.constexpr, SPLITS: tl.constexpr, SCALED: tl.constexpr, EXACT: tl.constexpr,
):  # fmt: skip
    """out: [rows, heads, DIM], or of SPLITS > 1 float32 [SPLITS, rows, heads, DIM] with sums [SPLITS, rows, heads]:
    log2 of the sum that the softmax divides by, −inf where a program saw nothing. scale: times log2(e). slot, token,
    head, …: strides, in numbers. GROUP: query heads of a KV head; SIZE: of a block; WIDE: DIM, filled up. Only tiles
    of one row may be split: of more, a row might see nothing of a program's share.
    """
    tile, kv_head, split = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    sequence = tl.load(tiles + tile)
    first = tl.load(tiles + tile_count + tile)
    target = tl.load(tiles + 2 * tile_count + tile)
    count = tl.load(tiles + 3 * tile_count + tile).to(tl.int32)
    position = tl.load(tiles + 4 * tile_count + tile).to(tl.int32)
    row = tl.arange(0, ROWS)
    at, of_group = row // GROUP, row % GROUP
    d = tl.arange(0, WIDE)
    there = (at < count)[:, None] & (d < DIM)[None, :]
    q_head = kv_head * GROUP + of_group
    q = tl.load(query + ((first + at) * query_row + q_head * query_head)[:, None] + d[None, :], mask=there, other=0.0)
    if EXACT:
        q = q.to(tl.float32)
    end = position + count
    share = tl.cdiv(tl.cdiv(end, SPLITS), TOKENS) * TOKENS
    start = split * share
    stop = tl.minimum(end, start + share)
    top = tl.full([ROWS], float("-inf"), tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    summed = tl.zeros([ROWS, WIDE], tl.float32)
    for begin in range(start, stop, TOKENS):
        t = begin + tl.arange(0, TOKENS)
        inside = t < stop
        block = tl.load(table + sequence * table_width + t // SIZE, mask=inside, other=0).to(tl.int64)
        place = block * slot + (t % SIZE) * token + kv_head * head
        lies = inside[:, None] & (d < DIM)[None, :]
        k = tl.load(keys + place[:, None] + d[None, :], mask=lies, other=0.0)
        v = tl.load(values + place[:, None] + d[None, :], mask=lies, other=0.0)
        if SCALED:
            place = block * scale_slot + (t % SIZE) * scale_token + kv_head
            k = k.to(tl.float32) * tl.load(key_scales + place, mask=inside, other=0.0)[:, None]
            v = v.to(tl.float32) * tl.load(value_scales + place, mask=inside, other=0.0)[:, None]
        if EXACT:
            k, v = k.to(tl.float32), v.to(tl.float32)
        scores = tl.dot(q, tl.trans(k), input_precision="ieee") * scale
        seen = inside[None, :] & (t[None, :] <= (position + at)[:, None])
        scores = tl.where(seen, scores, float("-inf"))
        higher = tl.maximum(top, tl.max(scores, 1))
        shares = tl.exp2(scores - higher[:, None])
        less = tl.exp2(top - higher)
        total = total * less + tl.sum(shares, 1)
        summed = summed * less[:, None] + tl.dot(shares.to(v.dtype), v, input_precision="ieee")
        top = higher
    any_seen = total > 0
    total = tl.where(any_seen, total, 1.0)
    result = summed / total[:, None]
    line = (split * out_rows + target + at) * (tl.num_programs(1) * GROUP) + q_head
    tl.store(out + line[:, None] * DIM + d[None, :], result.to(out.dtype.element_ty), mask=there)
    if SPLITS > 1:
        tl.store(sums + line, tl.where(any_seen, top + tl.log2(total), float("-inf")), mask=at < count)


@triton.jit(do_not_specialize=["lines"])
def put_together(
    parts, sums, out, lines, DIM: tl.constexpr, WIDE: tl.constexpr, SPLITS: tl.constexpr
):  # fmt: skip
    """parts float32 [SPLITS, lines, DIM], sums float32 [SPLITS, lines] → out [lines, DIM]; one program a line."""
    line = tl.program_id(0).to(tl.int64)
    split, d = tl.arange(0, SPLITS), tl.arange(0, WIDE)
    weight = tl.load(sums + split * lines + line)
    weight = tl.exp2(weight - tl.max(weight, 0))
    lies = (d < DIM)[None, :]
    part = tl.load(parts + ((split * lines + line) * DIM)[:, None] + d[None, :], mask=lies, other=0.0)
    result = tl.sum(part * weight[:, None], 0) / tl.sum(weight, 0)
    tl.store(out + line * DIM + d, result.to(out.dtype.element_ty), mask=d < DIM)


# TRITON_INTERPRET=1 was set: on a CPU, slowly, and with wrong products in bfloat16.
INTERPRETED = not isinstance(attend_tiles, triton.runtime.jit.JITFunction)
