"""Attention over the slab, as transformers calls it: K and V go to their slots, each chunk sees its own sequence."""

from __future__ import annotations

from typing import Any

import torch
from torch.nn.functional import scaled_dot_product_attention

from headway.engine.errors import ModelError
from headway.engine.pages import Plan, Span

NAME = "headway_paged"
# Rows of a chunk whose scores lie in memory at once.
SLICE = 128
# Keywords that transformers may pass along and that change nothing here: RoPE has been applied, rows are causal.
_HARMLESS: dict[str, tuple[object, ...]] = {
    "dropout": (0.0,),
    "is_causal": (True,),
    "use_cache": (False,),
    "output_attentions": (False,),
    "output_hidden_states": (False,),
    "output_router_logits": (False,),
    "return_dict": (True,),
}
_IGNORED = frozenset({"position_ids", "cache_position"})


def paged_attention(
    module: Any,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    headway_plan: Plan | None = None,
    **keywords: Any,
) -> tuple[torch.Tensor, None]:
    """RoPE applied: query [1, heads, rows, dim], key, value [1, kv_heads, rows, dim] → ([1, rows, heads, dim], None).

    Raises ModelError on anything that it does not implement, rather than leave it out.
    """
    if headway_plan is None:
        raise ModelError("this model does not hand its keyword arguments on to its attention")
    _check(attention_mask, keywords)
    pages = headway_plan.pages
    shape = (1, pages.heads, query.shape[2], pages.dim)
    if key.shape != shape or value.shape != shape:
        raise ModelError(f"a layer has K and V of shape {tuple(key.shape)} and {tuple(value.shape)}, not {shape}")
    new = torch.stack([key[0].transpose(0, 1), value[0].transpose(0, 1)], 1)
    return attend(headway_plan, module.layer_idx, query[0].transpose(0, 1), new, scaling)[None].to(query.dtype), None


def attend(plan: Plan, layer: int, query: torch.Tensor, new: torch.Tensor, scaling: float | None) -> torch.Tensor:
    """RoPE applied: query [rows, heads, dim], K and V [rows, 2, kv_heads, dim] → [rows, heads, dim], as the slab's."""
    if layer and plan.between is not None:
        plan.between()
    pages, shape = plan.pages, query.shape
    if plan.rows < len(query):
        query, new = query[: plan.rows], new[: plan.rows]
    if query.dtype != pages.dtype:
        query, new = query.to(pages.dtype), new.to(pages.dtype)
    new = plan.store(layer, new)
    if len(plan.batches) == 1 and plan.batches[0].rows is None and plan.rows == shape[0]:
        return plan.batches[0].attend(layer, query, new, scaling)
    out = query.new_empty(shape)
    out[plan.rows :] = 0
    by_head, k_new, v_new = query.transpose(0, 1), new[:, 0].transpose(0, 1), new[:, 1].transpose(0, 1)
    for span in plan.spans:
        rows = slice(span.start, span.stop)
        if span.cold:
            k, v = k_new[:, rows], v_new[:, rows]
        else:
            k, v = (part.transpose(0, 1) for part in pages.gather(layer, span.blocks, span.length))
        seen = _attend_half if pages.plain_products and span.stop - span.start > 1 else _attend
        out[rows] = seen(by_head[:, rows], k, v, span, scaling).transpose(0, 1)
    for batch in plan.batches:
        out[slice(plan.rows) if batch.rows is None else batch.rows] = batch.attend(layer, query, new, scaling)
    return out


def _attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, span: Span, scaling: float | None) -> torch.Tensor:
    """q [heads, rows, dim], k and v [kv_heads, length, dim] → [heads, rows, dim].

    Query heads that share a KV head lie side by side, so the group is an axis of its own: nothing is repeated.
    """
    heads, rows, dim = q.shape
    grouped = q.reshape(k.shape[0], -1, rows, dim)
    if rows == 1:
        grouped = grouped.transpose(1, 2)  # the group takes the place of the rows: all see the whole sequence
    shape = (k.shape[0], grouped.shape[1], span.length, dim)
    done = scaled_dot_product_attention(
        grouped,
        k.unsqueeze(1).expand(shape),
        v.unsqueeze(1).expand(shape),
        attn_mask=span.mask,
        is_causal=span.cold and rows > 1,
        scale=scaling,
    )
    return done.reshape(heads, rows, dim)


def _attend_half(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, span: Span, scaling: float | None) -> torch.Tensor:
    """As _attend, for bfloat16 on a CPU, where plain products are up to twice as fast as torch's fused attention."""
    heads, rows, dim = q.shape
    before = span.length - rows
    out = q.new_empty((k.shape[0], heads // k.shape[0], rows, dim))
    grouped = q.reshape(out.shape)
    for start in range(0, rows, SLICE):
        stop = min(rows, start + SLICE)
        seen, count = before + stop, stop - start
        part = grouped[:, :, start:stop].reshape(len(k), -1, dim)
        scores = torch.bmm(part, k[:, :seen].transpose(1, 2)).float().mul_(scaling or dim**-0.5)
        # All rows see what lies before them; of their own tokens each sees those up to itself.
        own = scores.view(len(k), -1, count, seen)[..., seen - count :]
        own += torch.full((count, count), -torch.inf).triu_(1)
        shares = torch.softmax(scores, -1).to(q.dtype)
        out[:, :, start:stop] = torch.bmm(shares, v[:, :seen]).view(len(k), -1, count, dim)
    return out.view(heads, rows, dim)


def _check(attention_mask: torch.Tensor | None, keywords: dict[str, Any]) -> None:
    if attention_mask is not None:
        raise ModelError("this model masks its attention by itself, which paged attention does not implement")
    for name, given in keywords.items():
        if given is not None and name not in _IGNORED and given not in _HARMLESS.get(name, ()):
            raise ModelError(f"this model asks its attention for {name}, which paged attention does not implement")
