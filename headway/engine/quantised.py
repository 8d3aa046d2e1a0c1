"""Linear layers whose weights are kept in bfloat16, or in 8 or 4 bits, and multiplied in bfloat16, on a CPU.

Few rows are bound by reading weights: torch's kernels read 8 or 4 bits as they are. Many rows are bound by multiplying:
those use a copy of the same numbers in bfloat16. The output projection stays in float32: from 16 to 32, where logits
lie, bfloat16 has steps of an eighth, which is more than lies between the two likeliest tokens.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.nn.functional import pad

from headway.engine.errors import ModelError
from headway.engine.linear import Form, make_linear, packs

BFLOAT16 = torch.bfloat16
# Inputs that share a scale and a zero in 4 bits: those of GGUF's Q4_1, which come out as they were.
GROUP = 32
# Rows up to which reading fewer bytes pays, by bits (measured with AVX-512: at 8 rows both ways take as long).
FEW = {8: 4, 4: 7}
# torch's kernel for 4 bits takes outputs by so many; what is missing is filled up.
_OUTPUTS = 16
_TILES = 2


class HalfLinear(nn.Module):
    """y = x Wᵀ + b with W in bfloat16, as it is multiplied where the processor can; y in the dtype of x."""

    def __init__(self, weight: torch.Tensor, bias: torch.Tensor | None) -> None:
        super().__init__()
        # float32 is faster where bfloat16 has no instructions.
        self._dtype = BFLOAT16 if packs(BFLOAT16) else torch.float32
        rounded = weight.to(BFLOAT16).to(self._dtype)
        self._layer = make_linear(rounded, None if bias is None else bias.detach().to(self._dtype)).forward

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y: torch.Tensor = self._layer(x if x.dtype == self._dtype else x.to(self._dtype))
        return y if y.dtype == x.dtype else y.to(x.dtype)


class QuantisedLinear(nn.Module):
    """y = x Ŵᵀ + b with Ŵ near W [out, in], of 8 or 4 bits; y in the dtype of x."""

    def __init__(self, weight: torch.Tensor, bias: torch.Tensor | None, bits: int) -> None:
        super().__init__()
        self.out_features, self.in_features = weight.shape
        rounded, *self._narrow = rounded_8(weight) if bits == 8 else rounded_4(weight)
        self._call: Any = torch._weight_int8pack_mm if bits == 8 else _multiply_4
        self._few = FEW[bits]
        self._bias = None if bias is None else bias.detach().to(BFLOAT16)
        self._many = HalfLinear(rounded, bias).forward

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if x.dim() > 2:
            return self.forward(x.reshape(-1, self.in_features)).view(*x.shape[:-1], self.out_features)
        if len(x) > self._few:
            return self._many(x)
        y: torch.Tensor = self._call(x.to(BFLOAT16), *self._narrow)[:, : self.out_features]
        return (y if self._bias is None else y + self._bias).to(x.dtype)


def rounded_8(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """A scale for each output, symmetric. → what the weight becomes, int8 [out, in], scales bfloat16 [out]."""
    scale = (weight.abs().amax(1) / 127).clamp_(min=1e-9).to(BFLOAT16)
    steps = (weight / scale[:, None].float()).round_().clamp_(-127, 127)
    return steps * scale[:, None].float(), steps.to(torch.int8), scale


def rounded_4(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """A scale and a zero for GROUP inputs of each output. → what the weight becomes, and the two as the kernel takes
    them: uint8 [outputs, in / 2], bfloat16 [in / GROUP, outputs, 2], of a whole multiple of _OUTPUTS.
    """
    grouped = weight.float().view(len(weight), -1, GROUP)
    low, high = grouped.amin(-1, keepdim=True), grouped.amax(-1, keepdim=True)
    scale = ((high - low) / 15).clamp_(min=1e-9).to(BFLOAT16)
    zero = (low + 8 * scale.float()).to(BFLOAT16)
    steps = ((grouped - zero.float()) / scale.float() + 8).round_().clamp_(0, 15)
    rounded = ((steps - 8) * scale.float() + zero.float()).view_as(weight)
    more = (0, 0, 0, -len(weight) % _OUTPUTS)
    packed = torch.ops.aten._convert_weight_to_int4pack_for_cpu(
        pad(steps.view_as(weight).to(torch.int32), more), _TILES
    )
    return rounded, packed, pad(torch.cat([scale, zero], -1).transpose(0, 1), more).contiguous()


def quantised(weights: str) -> Form:
    """Of "bfloat16", "int8" or "int4". Raises ModelError where this torch cannot multiply them."""
    if weights != "bfloat16":
        _check(8 if weights == "int8" else 4)
    dtype = BFLOAT16 if packs(BFLOAT16) else torch.float32
    return Form(lambda weight, bias: _make(weights, weight, bias), make_linear, dtype)


def round_linears(model: nn.Module, weights: str) -> None:
    """Each linear layer's weights become what they are in that form, so that a proof can tell rounding from faults."""
    for name, module in model.named_modules():
        if type(module) is nn.Linear and not name.endswith("lm_head"):
            module.weight.copy_(_rounded(weights, module.weight))


def _rounded(weights: str, weight: torch.Tensor) -> torch.Tensor:
    if weights == "bfloat16":
        return weight.to(BFLOAT16)
    return rounded_8(weight)[0] if _bits(weights, weight) == 8 else rounded_4(weight)[0]


def _make(weights: str, weight: torch.Tensor, bias: torch.Tensor | None) -> nn.Module:
    if weights == "bfloat16":
        return HalfLinear(weight, bias)
    return QuantisedLinear(weight, bias, _bits(weights, weight))


def _bits(weights: str, weight: torch.Tensor) -> int:
    """8 also where inputs are no whole groups. Outputs do not matter: side by side or one by one, layers are rounded
    alike.
    """
    return 4 if weights == "int4" and weight.shape[1] % GROUP == 0 else 8


def _multiply_4(x: torch.Tensor, packed: torch.Tensor, scales_and_zeros: torch.Tensor) -> torch.Tensor:
    y: torch.Tensor = torch.ops.aten._weight_int4pack_mm_for_cpu(x, packed, GROUP, scales_and_zeros)
    return y


def _check(bits: int) -> None:
    """Whether torch's kernels, which are private to it, are there and compute what they should."""
    generator = torch.Generator().manual_seed(1)
    weight = torch.randn(64, 2 * GROUP, generator=generator)
    try:
        made = QuantisedLinear(weight, None, bits)
        x = torch.randn(FEW[bits], 2 * GROUP, generator=generator)
        expected = x @ weight.t()
        difference = float((made(x) - expected).std() / expected.std())
    except (AttributeError, RuntimeError, TypeError) as error:
        reason = str(error).splitlines()[0]
        raise ModelError(f"this torch cannot multiply weights of {bits} bits: {reason}; leave --weights out") from None
    if not difference < 0.25:
        message = f"this torch multiplies weights of {bits} bits wrongly (off by {difference:.2g}); leave --weights out"
        raise ModelError(message)
