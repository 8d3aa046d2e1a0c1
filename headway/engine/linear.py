"""Linear layers with their weights in the form that this machine multiplies fastest."""

from __future__ import annotations

import logging
from typing import Any

import torch
from torch import nn
from torch.nn.functional import linear

log = logging.getLogger(__name__)

# Rows that weights are laid out for: what a few sequences decode at once. Longer chunks lose nothing by it.
_ROWS = 8
# Of the largest output: oneDNN adds in another order.
_TOLERANCE = 1e-4


class PackedLinear(nn.Module):
    """y = x Wᵀ + b, float32 on a CPU, with W in oneDNN's own order; x is [..., in]."""

    def __init__(self, weight: torch.Tensor, bias: torch.Tensor | None) -> None:
        super().__init__()
        self.out_features, self.in_features = weight.shape
        self._packed: Any = torch.ops.mkldnn._reorder_linear_weight(weight.detach(), _ROWS)
        self._bias = None if bias is None else bias.detach()
        self._call: Any = torch.ops.mkldnn._linear_pointwise.default

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        result: torch.Tensor = self._call(x, self._packed, self._bias, "none", [], "")
        return result


class PlainLinear(nn.Module):
    """The same as torch computes it, wherever the weights are."""

    def __init__(self, weight: torch.Tensor, bias: torch.Tensor | None) -> None:
        super().__init__()
        self.out_features, self.in_features = weight.shape
        self._weight, self._bias = weight, bias

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return linear(x, self._weight, self._bias)


def make_linear(weight: torch.Tensor, bias: torch.Tensor | None = None) -> nn.Module:
    """The fastest of them that works here, for a weight [out, in]."""
    if weight.device.type == "cpu" and weight.dtype == torch.float32 and packs():
        return PackedLinear(weight, bias)
    return PlainLinear(weight, bias)


def take_linear(*modules: Any) -> nn.Module:
    """The layers of `modules` (nn.Linear each) side by side, as one; their own weights are let go of."""
    weights = [module.weight for module in modules]
    weight = weights[0] if len(weights) == 1 else torch.cat(weights)
    biases = [module.bias for module in modules]
    bias = None
    if any(given is not None for given in biases):
        shapes = zip(biases, weights, strict=True)
        bias = torch.cat([w.new_zeros(len(w)) if given is None else given for given, w in shapes])
    made = make_linear(weight.detach(), bias)
    for module in modules:
        module.weight = None
    return made


def pack_linears(model: nn.Module) -> None:
    """Put packed weights in the place of every nn.Linear's of a float32 model on a CPU, where they work."""
    if not packs():
        return
    for module in list(model.modules()):
        for name, child in list(module.named_children()):
            if type(child) is nn.Linear:
                setattr(module, name, take_linear(child))


def packs() -> bool:
    """Whether oneDNN's packed weights are there and compute what they should; they are private to torch."""
    global _packs
    if _packs is None:
        try:
            _packs = _differs() <= _TOLERANCE
        except (AttributeError, RuntimeError, TypeError) as error:
            log.info("event=no_packed_weights reason=%s", str(error).splitlines()[0])
            _packs = False
    return _packs


_packs: bool | None = None


@torch.inference_mode()
def _differs() -> float:
    """Of packed from plain, as a share of the largest output, for one row and for many."""
    generator = torch.Generator().manual_seed(1)
    weight, bias = torch.randn(96, 64, generator=generator), torch.randn(96, generator=generator)
    packed, worst = PackedLinear(weight, bias), 0.0
    for rows in (1, _ROWS, 100):
        x = torch.randn(1, rows, 64, generator=generator)
        expected = linear(x, weight, bias)
        worst = max(worst, float((packed(x) - expected).abs().max() / expected.abs().max()))
    return worst
