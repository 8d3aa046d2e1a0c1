"""Before a model serves: its logits over the slab must equal those of its own, unmodified attention."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from headway.core.model import ModelCard
from headway.core.sampling import Sampling
from headway.engine.attention import NAME
from headway.engine.contract import Chunk, Draw
from headway.engine.errors import ModelError
from headway.engine.model import TorchEngine
from headway.engine.quiet import quiet

# Root mean square of the difference, in standard deviations of the logits; unrelated logits give about 1.4.
_TOLERANCE = {"float": 0.0, "float32": 1e-3, "bfloat16": 0.2, "float16": 0.05, "int8": 0.2, "int4": 0.2}
_TOKENS = 40

Table = npt.NDArray[np.int32]


def tolerance(dtype: str, weights: str, kv_dtype: str) -> float:
    """What computing in these may change, for `prove`."""
    return max(_TOLERANCE[name] for name in (dtype, weights, kv_dtype))


def prove(engine: TorchEngine, expected: torch.Tensor, within: float, kind: str) -> None:
    """Compute one sequence cold, chunked, stepped and beside another; leaves the engine unbound.

    expected: from `expected_logits` of a model of type `kind`; within: from `tolerance`. Raises ModelError where the
    engine's differ by more: catches position encodings, attention and layers that support.py and lean.py do not know
    of.
    """
    try:
        found = _paged(engine, _ids(engine.card))
    except Exception as error:
        raise ModelError(f"models of type {kind} do not run over paged attention: {error}") from error
    finally:
        engine.unbind()
    spread = float(expected.std()) or 1.0
    difference = float((found - expected).square().mean().sqrt()) / spread
    if not difference <= within:
        raise ModelError(
            f"models of type {kind} are not served: over paged attention this one's logits differ"
            f" by {difference:.2g} standard deviations"
        )


def expected_logits(model: Any, card: ModelCard) -> torch.Tensor:
    """float32 [5, vocabulary], of the model's own modules and attention. Raises ModelError."""
    try:
        return _stock(model, _ids(card))
    except Exception as error:
        kind = model.config.model_type
        raise ModelError(f"models of type {kind} do not run: {error}") from error


def _ids(card: ModelCard) -> list[int]:
    count = min(_TOKENS, card.context_tokens)
    return [int(i) for i in np.random.default_rng(7).integers(0, card.vocab_size, count)]


@torch.inference_mode()
def _stock(model: Any, ids: list[int]) -> torch.Tensor:
    """After the first and second token, in the middle, at the end and again at the end."""
    with quiet():
        model.set_attn_implementation("eager")
        try:
            inputs = torch.tensor([ids], device=model.device)
            logits: torch.Tensor = model(input_ids=inputs, use_cache=False).logits[0]
        finally:
            model.set_attn_implementation(NAME)
    return logits[[0, 1, len(ids) // 2 - 1, len(ids) - 1, len(ids) - 1]].float()


def _paged(engine: TorchEngine, ids: list[int]) -> torch.Tensor:
    """The same rows over a slab of NaN: in chunks, steps, beside a second sequence, and at last in one piece."""
    kv_format = engine.card.kv_format
    blocks = -(-len(ids) // kv_format.block_size)
    engine.bind(torch.full((2 * blocks, kv_format.slot_bytes), 0xFF, dtype=torch.uint8, device=engine.device))
    table = np.arange(2 * blocks, dtype=np.int32)[::-1]
    ours, theirs = table[:blocks], table[blocks:]
    draw = Draw(Sampling(), 0)
    half = len(ids) // 2
    rows = [
        engine.logits([Chunk(ids[1:half], 0, theirs, None), Chunk(ids[:1], 0, ours, draw)]),
        engine.logits([Chunk(ids[1:2], 1, ours, draw), Chunk(ids[:2], half - 1, theirs, None)]),
        _stepped(engine, ids, (ours, theirs), draw),
        engine.logits([Chunk(ids[half:], half, ours, draw)]),
        engine.logits([Chunk(ids, 0, ours, draw)]),
    ]
    return torch.cat(rows)


def _stepped(engine: TorchEngine, ids: list[int], tables: tuple[Table, Table], draw: Draw) -> torch.Tensor:
    """Ours from its third token to the middle, the last two as steps of a sequence with a name, beside theirs."""
    (ours, theirs), half = tables, len(ids) // 2
    engine.logits([Chunk(ids[2 : half - 2], 2, ours, draw)])
    engine.logits([Chunk(ids[half - 2 : half - 1], half - 2, ours, draw, 0), Chunk(ids[:1], half + 1, theirs, draw, 1)])
    both = [Chunk(ids[:1], half + 2, theirs, None, 1), Chunk(ids[half - 1 : half], half - 1, ours, draw, 0)]
    return engine.logits(both)
