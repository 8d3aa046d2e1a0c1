"""Linear layers with their weights in the form that this machine multiplies fastest."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.nn.functional import linear

log = logging.getLogger(__name__)

# Rows that weights are laid out for: what a few sequences decode at once. Longer chunks lose nothing by it.
_ROWS = 8
# Of the largest output: oneDNN adds in another order, and rounds what comes out.
_TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 1e-2}


# From a weight [out, in] and a bias [out] or None; what comes out has the dtype of what goes in.
Make = Callable[[torch.Tensor, torch.Tensor | None], nn.Module]


class PackedLinear(nn.Module):
    """y = x Wᵀ + b on a CPU, with W in oneDNN's own order; x is [..., in]."""

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
    if weight.device.type == "cpu" and weight.dtype in _TOLERANCE and packs(weight.dtype):
        return PackedLinear(weight, bias)
    return PlainLinear(weight, bias)


class Form(NamedTuple):
    """How a model's linear layers are kept: those inside, and the output projection. dtype: of the inputs that those
    inside are fastest with.
    """

    inner: Make
    head: Make
    dtype: torch.dtype


def form_of(dtype: torch.dtype) -> Form:
    """Of weights as they are."""
    return Form(make_linear, make_linear, dtype)


def take_linear(*modules: Any, make: Make = make_linear) -> nn.Module:
    """The layers of `modules` (nn.Linear each) side by side, as one; their own weights are let go of."""
    weights = [module.weight for module in modules]
    weight = weights[0] if len(weights) == 1 else torch.cat(weights)
    biases = [module.bias for module in modules]
    bias = None
    if any(given is not None for given in biases):
        shapes = zip(biases, weights, strict=True)
        bias = torch.cat([w.new_zeros(len(w)) if given is None else given for given, w in shapes])
    made = make(weight.detach(), bias)
    for module in modules:
        module.weight = None
    return made


def change_linears(model: nn.Module, form: Form) -> None:
    """Put layers of this form in the place of every nn.Linear of a model."""
    for module in list(model.modules()):
        for name, child in list(module.named_children()):
            if type(child) is nn.Linear:
                setattr(module, name, take_linear(child, make=form.head if name == "lm_head" else form.inner))


def packs(dtype: torch.dtype = torch.float32) -> bool:
    """Whether oneDNN's packed weights are there and compute what they should; they are private to torch."""
    if dtype not in _packs:
        try:
            # Processors without it would compute it by way of float32.
            fast = dtype == torch.float32 or torch.cpu._is_avx512_bf16_supported()
            _packs[dtype] = fast and _differs(dtype) <= _TOLERANCE[dtype]
        except (AttributeError, RuntimeError, TypeError) as error:
            log.info("event=no_packed_weights dtype=%s reason=%s", dtype, str(error).splitlines()[0])
            _packs[dtype] = False
    return _packs[dtype]


_packs: dict[torch.dtype, bool] = {}


@torch.inference_mode()
def _differs(dtype: torch.dtype) -> float:
    """Of packed from plain, as a share of the largest output, for one row and for many."""
    generator = torch.Generator().manual_seed(1)
    weight, bias = (torch.randn(shape, generator=generator).to(dtype) for shape in ((96, 64), (96,)))
    packed, worst = PackedLinear(weight, bias), 0.0
    for rows in (1, _ROWS, 100):
        x = torch.randn(1, rows, 64, generator=generator).to(dtype)
        expected = linear(x.float(), weight.float(), bias.float())
        worst = max(worst, float((packed(x) - expected).abs().max() / expected.abs().max()))
    return worst
