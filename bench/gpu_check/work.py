"""What a step cannot do without: bytes that a decode step reads, operations that a prefill has. By the shape alone."""

from __future__ import annotations

from bench.gpu_check.sizes import Sizes


def layer_weights(sizes: Sizes) -> int:
    """Numbers in the linear layers of all decoder layers."""
    shape = sizes.shape
    hidden, heads = shape["hidden_size"], shape["num_attention_heads"]
    kv_hidden = hidden // heads * shape["num_key_value_heads"]
    attention, mlp = hidden * (2 * hidden + 2 * kv_hidden), 3 * hidden * shape["intermediate_size"]
    return shape["num_hidden_layers"] * (attention + mlp)


def head_weights(sizes: Sizes) -> int:
    """Numbers in the output projection."""
    return sizes.shape["hidden_size"] * sizes.shape["vocab_size"]


def decode_bytes(sizes: Sizes, batch: int, token_bytes: int, itemsize: int) -> int:
    """That a step of so many sequences reads: all weights but the embeddings of other tokens, and K and V."""
    weights = layer_weights(sizes) + head_weights(sizes) + batch * sizes.shape["hidden_size"]
    return weights * itemsize + batch * sizes.context * token_bytes


def prefill_flops(sizes: Sizes, tokens: int) -> int:
    """Multiplications and additions of linear layers, of causal attention, and of one row of logits."""
    linear = 2 * tokens * layer_weights(sizes) + 2 * head_weights(sizes)
    seen = tokens * (tokens + 1) // 2
    return linear + sizes.shape["num_hidden_layers"] * 4 * sizes.shape["hidden_size"] * seen
