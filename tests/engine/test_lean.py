"""Which models are computed without their modules, and that packed weights are only used where they work."""

from __future__ import annotations

import ast
import importlib
import inspect
import re
from pathlib import Path

import pytest
import torch
from torch.nn.functional import linear
from transformers import AutoModelForCausalLM

from headway.engine import linear as linears
from headway.engine.lean import KNOWN, FlatNorm, LeanDecoder, Norm, _angles, read_decoder
from headway.engine.linear import PackedLinear, PlainLinear, change_linears, form_of, take_linear
from headway.engine.load import load_engine
from headway.engine.model import TorchEngine
from headway.engine.quiet import quiet
from headway.engine.stock import StockModel
from tests.engine.tiny import FAMILIES, save_model


@pytest.mark.parametrize("name", sorted(FAMILIES))
def test_models_of_known_types_are_computed_lean_and_others_by_their_modules(name: str, tmp_path: Path) -> None:
    engine = load_engine(str(save_model(tmp_path / name, FAMILIES[name]())))
    assert isinstance(engine, TorchEngine)
    assert type(engine._model) is (LeanDecoder if name in KNOWN else StockModel)


def test_a_type_that_nobody_has_read_is_not_computed_lean_though_its_parts_are_llamas(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rounded to 8 bits, a proof could take a layer without positions for rounding."""
    folder = str(save_model(tmp_path / "smollm3", FAMILIES["smollm3"]()))
    monkeypatch.setattr("headway.engine.load.prove", lambda *_: None)
    engine = load_engine(folder, weights="int8")
    assert isinstance(engine, TorchEngine)
    assert type(engine._model) is StockModel


# Of a forward, what is Llama's and what changes nothing here: windows are refused before, and dropout is of training.
# Norms of heads are parts that lean.py sees.
HARMLESS = (
    r"sliding_window=[^\n]*?, (?=\*\*)",
    r"\w+ = nn\.functional\.dropout\(\w+, p=self\.residual_dropout, training=self\.training\)\n",
    r"self\.[qk]_norm\((?=self)|(?<=hidden_shape\))\)",
)
READ = {
    "Attention": ("forward",),
    "DecoderLayer": ("forward",),
    "MLP": ("forward",),
    "RMSNorm": ("forward",),
    "RotaryEmbedding": ("forward", "compute_default_rope_parameters"),
    "Model": ("forward",),
    "ForCausalLM": ("forward",),
}


def source(name: str) -> dict[str, str]:
    """What transformers' modules of this type do, by class and method; its own names and HARMLESS parts left out."""
    module = importlib.import_module(f"transformers.models.{name}.modeling_{name}")
    tree = ast.parse(inspect.getsource(module))
    family = next(n.name for n in tree.body if isinstance(n, ast.ClassDef) and n.name.endswith("DecoderLayer"))[:-12]
    found = {}
    for node in tree.body:
        kind = getattr(node, "name", "").removeprefix(family)
        if isinstance(node, ast.FunctionDef) and kind in ("rotate_half", "apply_rotary_pos_emb"):
            found[kind] = code(node, family)
        for inner in node.body if isinstance(node, ast.ClassDef) else ():
            if isinstance(inner, ast.FunctionDef) and inner.name in READ.get(kind, ()):
                found[f"{kind}.{inner.name}"] = code(inner, family)
    # Around layers, masks are made in several ways; what becomes of a token's numbers counts.
    found["Model.forward"] = "\n".join(
        re.findall(r"(?:hidden_states|inputs_embeds)\b.* = [^(\n]*", found["Model.forward"])
    )
    return found


def code(function: ast.FunctionDef, family: str) -> str:
    described = ast.get_docstring(function) is not None
    text = "\n".join(ast.unparse(statement) for statement in function.body[described:]) + "\n"
    text = text.replace(": torch.Tensor = ", " = ")
    for part in (*HARMLESS, family):
        text = re.sub(part, "", text)
    return text


@pytest.mark.parametrize("name", sorted(KNOWN))
def test_the_forward_of_every_known_type_is_llamas(name: str) -> None:
    llama = source("llama")
    assert len(llama) == 10
    assert source(name) == llama


def test_reading_the_forward_tells_others_apart() -> None:
    llama = source("llama")
    for name in ("smollm3", "granite", "gemma", "arcee", "helium"):
        assert source(name) != llama, name


def layer(bias: bool = True, outputs: int = 24) -> torch.nn.Linear:
    torch.manual_seed(outputs)
    return torch.nn.Linear(40, outputs, bias=bias)


@pytest.mark.parametrize("packs", [True, False])
@torch.inference_mode()
def test_layers_side_by_side_are_the_layers_one_after_the_other(packs: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(linears, "_packs", {torch.float32: packs and linears.packs()})
    parts = [layer(), layer(bias=False, outputs=8)]
    for rows in (1, 7, 200):
        x = torch.randn(rows, 40)
        expected = torch.cat([part(x) for part in parts], -1)
        joined = take_linear(*(layer(part.bias is not None, part.out_features) for part in parts))
        assert type(joined) is (PackedLinear if linears.packs() else PlainLinear)
        torch.testing.assert_close(joined(x), expected, atol=1e-5, rtol=1e-5)


def test_packed_weights_that_are_missing_or_wrong_are_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(linears, "_packs", {})
    monkeypatch.setattr(PackedLinear, "forward", lambda self, x: linear(x, x.new_ones(96, 64)))
    assert not linears.packs()
    monkeypatch.setattr(linears, "_packs", {})

    def missing(self: object, weight: torch.Tensor, bias: torch.Tensor | None) -> None:
        raise AttributeError("'_OpNamespace' 'mkldnn' object has no attribute '_reorder_linear_weight'")

    monkeypatch.setattr(PackedLinear, "__init__", missing)
    assert not linears.packs()
    assert isinstance(take_linear(layer()), PlainLinear)


@torch.inference_mode()
def test_every_linear_of_a_model_is_replaced() -> None:
    model = torch.nn.Sequential(layer(), torch.nn.Sequential(layer(outputs=40), torch.nn.ReLU()))
    change_linears(model, form_of(torch.float32))
    assert not any(type(module) is torch.nn.Linear for module in model.modules())
    assert model[0](torch.randn(3, 40)).shape == (3, 24)


@torch.inference_mode()
def test_a_lean_decoder_that_computes_something_else_is_not_used(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = str(save_model(tmp_path / "llama", FAMILIES["llama"]()))
    monkeypatch.setattr("headway.engine.lean.silu", torch.nn.functional.relu)
    engine = load_engine(folder)
    assert isinstance(engine, TorchEngine)
    assert type(engine._model) is StockModel


def test_weights_are_kept_once(tmp_path: Path) -> None:
    """Those of the model's own modules go as they are packed."""
    with quiet():
        model = AutoModelForCausalLM.from_pretrained(str(save_model(tmp_path / "qwen2", FAMILIES["qwen2"]())))
    assert read_decoder(model, form_of(torch.float32)) is not None
    left = {name for name, _ in model.named_parameters()}
    assert not [name for name in left if name.endswith(("proj.weight", "lm_head.weight"))]


def test_the_norm_of_fewer_operators_is_torchs() -> None:
    """Also of numbers so small that only epsilon counts, and of rows by head."""
    generator = torch.Generator().manual_seed(1)
    norm = Norm(torch.randn(40, generator=generator), 1e-5)
    for size in (0.0, 1e-4, 1.0, 1e4):
        x = size * torch.randn(3, 5, 40, generator=generator)
        torch.testing.assert_close(FlatNorm(norm)(x), norm(x), atol=1e-6, rtol=1e-5)


def test_angles_are_those_of_their_positions_whichever_came_first(tmp_path: Path) -> None:
    with quiet():
        model = AutoModelForCausalLM.from_pretrained(str(save_model(tmp_path / "llama", FAMILIES["llama"]())))
    x, decoder = torch.zeros(3, 64), read_decoder(model, form_of(torch.float32))
    assert decoder is not None
    for positions in ([5, 0, 2], [250, 3, 9], [1, 251, 255]):
        at = torch.tensor(positions)
        found, expected = decoder._turn(x, at), _angles(decoder._rotary, x, at)
        assert all(torch.equal(*pair) for pair in zip(found, expected, strict=True))
