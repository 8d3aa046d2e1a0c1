"""Weights of 8 and 4 bits: what they become, that both ways of multiplying agree, and that such models stay apart."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest
import torch

from headway.core.model import KvFormat, LayerGroup
from headway.engine import quantised
from headway.engine.contract import Chunk
from headway.engine.lean import LeanDecoder
from headway.engine.linear import take_linear
from headway.engine.load import ModelError, load_engine
from headway.engine.model import TorchEngine
from headway.engine.pages import SCALED, Pages, Plan
from headway.engine.plan_cpu import plan_cpu
from headway.engine.plan_device import plan_device
from headway.engine.quantised import FEW, GROUP, QuantisedLinear, round_linears, rounded_4, rounded_8
from headway.engine.stock import StockModel
from headway.engine.working import Copies
from tests.engine.tiny import FAMILIES, save_model

PlanOf = Callable[[Pages, Sequence[Chunk]], Plan]


def plan_cpu_without_copies(pages: Pages, chunks: Sequence[Chunk]) -> Plan:
    return plan_cpu(pages, chunks, Copies(pages, 0))


def weight(outputs: int = 48, inputs: int = 3 * GROUP) -> torch.Tensor:
    return torch.randn(outputs, inputs, generator=torch.Generator().manual_seed(3))


def test_weights_that_lay_in_4_bits_come_out_as_they_were() -> None:
    steps = torch.randint(0, 16, (48, 3, GROUP), generator=torch.Generator().manual_seed(1))
    steps[..., 0], steps[..., 1] = 0, 15
    there = (steps * 0.125 - 0.75).view(48, -1)
    assert torch.equal(rounded_4(there)[0], there)


def test_each_weight_is_at_most_half_a_step_off_and_what_rounding_its_scale_adds() -> None:
    given = weight()
    grouped = given.view(48, -1, GROUP)
    step = (grouped.amax(-1) - grouped.amin(-1)) / 15
    assert ((rounded_4(given)[0] - given).view_as(grouped).abs().amax(-1) < 0.65 * step).all()
    step = given.abs().amax(1, keepdim=True) / 127
    assert ((rounded_8(given)[0] - given).abs() < 0.8 * step).all()


@pytest.mark.parametrize("bits", [8, 4])
@torch.inference_mode()
def test_few_rows_and_many_are_multiplied_by_the_same_numbers(bits: int) -> None:
    given, bias = weight(), torch.randn(48, generator=torch.Generator().manual_seed(4))
    layer = QuantisedLinear(given, bias, bits)
    exact = rounded_8(given)[0] if bits == 8 else rounded_4(given)[0]
    for rows in (1, FEW[bits], FEW[bits] + 1, 200):
        x = torch.randn(1, rows, 3 * GROUP)
        expected = x @ exact.t() + bias
        found = layer(x)
        assert found.dtype == torch.float32
        # Of inputs, weights, bias and result, each rounded to 8 bits.
        assert float((found - expected).std() / expected.std()) < 0.006


@pytest.mark.parametrize("outputs", [(32, 8, 8), (48, 4, 4), (3, 0, 0)])
@torch.inference_mode()
def test_layers_are_rounded_once_and_side_by_side_as_one_by_one(outputs: tuple[int, ...]) -> None:
    """Also where a layer by itself has outputs that the kernel for 4 bits does not take, and its neighbours fill up."""
    weights = [weight(count) for count in outputs if count]
    modules = [torch.nn.Linear(3 * GROUP, len(part), bias=False) for part in weights]
    for module, part in zip(modules, weights, strict=True):
        module.weight.copy_(part)
    expected = torch.cat([rounded_4(part)[0] for part in weights])
    round_linears(torch.nn.ModuleList(modules), "int4")
    assert torch.equal(torch.cat([module.weight for module in modules]), expected)
    layer = take_linear(*modules, make=quantised.quantised("int4").inner)
    for rows in (1, FEW[4], FEW[4] + 1):
        x = torch.randn(rows, 3 * GROUP)
        found = layer(x)
        assert found.shape == (rows, len(expected))
        assert float((found - x @ expected.t()).std() / (x @ expected.t()).std()) < 0.006


@pytest.mark.parametrize("weights", ["bfloat16", "int8", "int4"])
@pytest.mark.parametrize("name", ["llama", "qwen2", "gpt_neox"])
def test_models_of_any_family_are_served_and_are_not_the_model_in_float32(
    name: str, weights: str, tmp_path: Path
) -> None:
    folder = str(save_model(tmp_path / name, FAMILIES[name]()))
    engine, exact = load_engine(folder, weights=weights), load_engine(folder)
    assert isinstance(engine, TorchEngine)
    assert type(engine._model) is (StockModel if name == "gpt_neox" else LeanDecoder)
    assert engine.card.fingerprint != exact.card.fingerprint
    assert engine.card.kv_format == exact.card.kv_format


def test_k_and_v_in_other_formats_have_fewer_bytes_and_are_other_blocks(tmp_path: Path) -> None:
    folder = str(save_model(tmp_path / "llama", FAMILIES["llama"]()))
    engines = [load_engine(folder, kv_dtype=dtype) for dtype in ("float32", "bfloat16", "int8")]
    engines.append(load_engine(folder, dtype="bfloat16"))
    # 16 numbers a head; of int8 with a scale.
    per_head = [engine.card.kv_format.bytes_per_token / (3 * 2 * 2) for engine in engines]
    assert per_head == [64, 32, 20, 32]
    assert len({(engine.card.fingerprint, engine.card.kv_format) for engine in engines}) == 4


@pytest.mark.parametrize("plan_of", [plan_cpu_without_copies, plan_device])
def test_k_and_v_of_8_bits_are_as_near_as_that_allows(plan_of: PlanOf) -> None:
    """In runs, pieces and steps; each token and head has a scale of its own, so that a large one harms no other."""
    group = LayerGroup(2, 3, 8, 2 * 2 * 3 * (8 + 4))
    kv_format = KvFormat(4, "int8", SCALED, (group,))
    pages = Pages(np.full((9, kv_format.slot_bytes), 0xFF, np.uint8), kv_format, torch.device("cpu"))
    generator = torch.Generator().manual_seed(1)
    new = torch.randn(14, 2, 3, 8, generator=generator) * torch.logspace(-3, 3, 14)[:, None, None, None]
    table, other = np.array([7, 2, 3, 8], np.int32), np.array([5], np.int32)
    chunks = [Chunk(list(range(13)), 0, table, None), Chunk([1], 2, other, None)]
    plan_of(pages, chunks).store(1, new)
    found = torch.stack(pages.gather(1, torch.from_numpy(table.astype(np.int64)), 13), 1).clone()
    step = (new.abs().amax(-1) / 127)[..., None]
    assert ((found - new[:13]).abs() <= 0.51 * step[:13]).all()
    single = torch.stack([pages.read(1, part, torch.tensor([5]))[0, 2] for part in (0, 1)])
    assert ((single - new[13]).abs() <= 0.51 * step[13]).all()


def test_a_torch_that_cannot_multiply_them_is_refused_with_a_sentence(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = str(save_model(tmp_path / "llama", FAMILIES["llama"]()))
    monkeypatch.setattr(quantised, "_multiply_4", lambda x, packed, scales: x.new_ones(len(x), packed.shape[0]))
    with pytest.raises(ModelError, match=r"multiplies weights of 4 bits wrongly .*leave --weights out"):
        load_engine(folder, weights="int4")

    def missing(x: torch.Tensor, packed: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
        raise RuntimeError("no kernel")

    monkeypatch.setattr(quantised, "_multiply_4", missing)
    with pytest.raises(ModelError, match="cannot multiply weights of 4 bits: no kernel; leave --weights out"):
        load_engine(folder, weights="int4")


def test_rounded_weights_of_other_than_float32_models_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="float32 models on a CPU"):
        load_engine(str(tmp_path), weights="int8", dtype="bfloat16")
    with pytest.raises(ValueError, match="weights is int3"):
        load_engine(str(tmp_path), weights="int3")
