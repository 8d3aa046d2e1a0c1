"""Decoders of the common shape, computed from their own weights without the modules around them.

The shape: token embeddings; layers of RMS norm, attention with rotary positions over one projection each of Q, K, V and
output (Q and K normed by head or not), RMS norm, gated MLP; RMS norm, output projection. transformers' modules cost
about 10 ms a forward beside what they compute; this does not. Parts do not say what is done with them (SmolLM3 has
Llama's, and layers without positions), so only models of KNOWN types are read, if they have the shape; engine.proof
tries them as it tries all. Every other model is served by its own modules.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.nn.functional import rms_norm, silu

from headway.engine.attention import attend
from headway.engine.linear import Form, Make, take_linear
from headway.engine.pages import Plan

# Types whose forward, in transformers' code, is the one below (tests/engine/test_lean.py reads it).
KNOWN = frozenset({"llama", "mistral", "qwen2", "qwen3", "seed_oss"})
_BASE = {"embed_tokens", "layers", "norm", "rotary_emb"}
_LAYER = {"self_attn", "mlp", "input_layernorm", "post_attention_layernorm"}
_ATTENTION = {"q_proj", "k_proj", "v_proj", "o_proj"}
_HEAD_NORMS = {"q_norm", "k_norm"}
_MLP = {"gate_proj", "up_proj", "down_proj", "act_fn"}


# A layer's own forward: a module's call around it costs as much as a small operator.
Linear = Callable[[torch.Tensor], torch.Tensor]
Normed = Callable[[torch.Tensor], torch.Tensor]


@dataclass(frozen=True, slots=True)
class Norm:
    """x / rms(x) · weight, over the last axis."""

    weight: torch.Tensor
    epsilon: float

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        return rms_norm(x, self.weight.shape, self.weight, self.epsilon)


class FlatNorm:
    """The same of float32 on a CPU, as x / √(|x|² + n·ε) · √n·weight: half as many operators as torch's own."""

    def __init__(self, norm: Norm) -> None:
        count = len(norm.weight)
        self._weight = norm.weight * count**0.5
        self._least = torch.tensor((count * norm.epsilon) ** 0.5)

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        length = torch.linalg.vector_norm(x, 2, -1, True).hypot_(self._least)
        return x.div(length).mul_(self._weight)


@dataclass(frozen=True, slots=True)
class Layer:
    """One decoder layer; qkv and gate_up are what the model has as separate projections, side by side."""

    before_attention: Normed
    qkv: Linear
    q_norm: Normed | None
    k_norm: Normed | None
    out: Linear
    before_mlp: Normed
    gate_up: Linear
    down: Linear
    scaling: float


class LeanDecoder:
    """See the module; `read_decoder` makes it."""

    def __init__(
        self,
        embed: torch.Tensor,
        layers: list[Layer],
        norm: Normed,
        head: Linear,
        rotary: nn.Module,
        dtype: torch.dtype,
    ) -> None:
        """dtype: what goes into linear layers."""
        self._embed, self._layers, self._norm, self._head, self._rotary = embed, layers, norm, head, rotary
        self._dtype = dtype
        # [positions, 2, 1, dim], cos and sin
        self._turns = torch.empty(0)

    def __call__(self, ids: torch.Tensor, positions: torch.Tensor, last: torch.Tensor, plan: Plan) -> torch.Tensor:
        """ids, positions: int64 [rows]. → logits [len(last), vocabulary] after the rows `last`."""
        pages, dtype = plan.pages, self._dtype
        x = self._embed[ids]
        cos, sin = self._turn(x, positions)
        for at, layer in enumerate(self._layers):
            qkv = layer.qkv(layer.before_attention(x).to(dtype))
            if qkv.dtype != pages.dtype or layer.q_norm is not None:
                qkv = qkv.to(x.dtype)
            qkv = qkv.view(len(x), -1, pages.dim)
            heads = qkv.shape[1] - 2 * pages.heads
            turned = qkv[:, : heads + pages.heads]
            if layer.q_norm is not None and layer.k_norm is not None:
                turned[:, :heads] = layer.q_norm(turned[:, :heads])
                turned[:, heads:] = layer.k_norm(turned[:, heads:])
            torch.addcmul(turned * cos, turned.roll(pages.dim // 2, -1), sin, out=turned)
            new = qkv[:, heads:].view(len(x), 2, pages.heads, pages.dim)
            seen = attend(plan, at, qkv[:, :heads], new, layer.scaling)
            x = x + layer.out(seen.view(len(x), -1).to(dtype))
            gate, up = layer.gate_up(layer.before_mlp(x).to(dtype)).chunk(2, -1)
            x += layer.down(silu(gate).mul_(up))
        logits: torch.Tensor = self._head(self._norm(x[last]))
        return logits

    def _turn(self, x: torch.Tensor, positions: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """cos and sin, as `_angles` gives them; on a CPU they are kept for all positions that came so far."""
        if x.device.type != "cpu":
            return _angles(self._rotary, x, positions)
        needed = int(positions.max()) + 1
        if needed > len(self._turns):
            every = torch.arange(max(needed, 2 * len(self._turns)))
            self._turns = torch.stack(_angles(self._rotary, x, every), 1)
        cos, sin = self._turns[positions].unbind(1)
        return cos, sin


def read_decoder(model: Any, form: Form) -> LeanDecoder | None:
    """The same model with linear layers of this form, or None where it is of another type or shape. `model` has no
    weights any more after that.
    """
    base = getattr(model, "model", None)
    if model.config.model_type not in KNOWN or base is None:
        return None
    if _children(model) != {"model", "lm_head"} or _children(base) != _BASE:
        return None
    if (
        _norm(base.norm) is None
        or type(model.lm_head) is not nn.Linear
        or not all(_fits(layer) for layer in base.layers)
    ):
        return None
    found = [_layer(layer, form.inner) for layer in base.layers]
    embed, head = base.embed_tokens.weight, take_linear(model.lm_head, make=form.head).forward
    return LeanDecoder(embed, found, _normed(base.norm), head, base.rotary_emb, form.dtype)


def _fits(layer: Any) -> bool:
    """Whether it has the parts of a Layer and no others."""
    if _children(layer) != _LAYER or _children(layer.mlp) != _MLP:
        return False
    attention, inside = layer.self_attn, _children(layer.self_attn)
    if not hasattr(attention, "scaling") or not hasattr(attention, "head_dim"):
        return False
    norms = [_norm(layer.input_layernorm), _norm(layer.post_attention_layernorm)]
    if inside == _ATTENTION | _HEAD_NORMS:
        norms += [by_head := _norm(attention.q_norm), _norm(attention.k_norm)]
        if by_head is None or by_head.weight.shape != (attention.head_dim,):
            return False
    elif inside != _ATTENTION:
        return False
    linears = [getattr(attention, name) for name in sorted(_ATTENTION)]
    linears += [layer.mlp.gate_proj, layer.mlp.up_proj, layer.mlp.down_proj]
    if not all(type(module) is nn.Linear for module in linears) or not isinstance(attention.scaling, float):
        return False
    gated_by_silu = isinstance(layer.mlp.act_fn, nn.SiLU) or type(layer.mlp.act_fn).__name__ == "SiLUActivation"
    return None not in norms and gated_by_silu


def _layer(layer: Any, make: Make) -> Layer:
    attention, mlp = layer.self_attn, layer.mlp
    return Layer(
        before_attention=_normed(layer.input_layernorm),
        qkv=take_linear(attention.q_proj, attention.k_proj, attention.v_proj, make=make).forward,
        q_norm=_normed(attention.q_norm) if hasattr(attention, "q_norm") else None,
        k_norm=_normed(attention.k_norm) if hasattr(attention, "k_norm") else None,
        out=take_linear(attention.o_proj, make=make).forward,
        before_mlp=_normed(layer.post_attention_layernorm),
        gate_up=take_linear(mlp.gate_proj, mlp.up_proj, make=make).forward,
        down=take_linear(mlp.down_proj, make=make).forward,
        scaling=attention.scaling,
    )


def _children(module: nn.Module) -> set[str]:
    return {name for name, _ in module.named_children()}


def _normed(module: Any) -> Normed:
    norm = _norm(module)
    assert norm is not None
    flat = norm.weight.dtype == torch.float32 and norm.weight.device.type == "cpu"
    return FlatNorm(norm) if flat else norm


def _norm(module: Any) -> Norm | None:
    """An RMS norm as Llama's, by what it has."""
    epsilon = getattr(module, "variance_epsilon", None)
    weight = getattr(module, "weight", None)
    return None if epsilon is None or weight is None else Norm(weight, epsilon)


def _angles(rotary: nn.Module, x: torch.Tensor, positions: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """cos and sin, each [rows, 1, dim]; sin with the sign that the rotated half takes."""
    cos, sin = rotary(x[None], positions[None])
    half = sin.shape[-1] // 2
    signed = torch.cat([-sin[0, :, :half], sin[0, :, half:]], -1)
    return cos[0][:, None], signed[:, None]
