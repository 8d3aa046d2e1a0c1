"""How near an engine comes to float32: perplexity, and the likeliest token, on texts of several kinds."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from headway.core.sampling import Sampling
from headway.engine.contract import Chunk, Draw, Engine
from headway.engine.model import TorchEngine

ROOT = Path(__file__).resolve().parents[2]
# Legal prose, prose for users, prose for developers, code.
TEXTS = ("LICENSE", "README.md", "docs/architecture.md", "headway/core/store.py")
# Rows of a forward: as few as a small batch has, and as many as prefill, which rounded weights compute in another way.
FEW, MANY = 4, 64


class Quality(NamedTuple):
    """top1: share of places where both find the same token likeliest. ppl_ratio: perplexity over that of float32."""

    top1: float
    ppl_ratio: float


def read_texts(folder: Path, tokens: int) -> dict[str, list[int]]:
    """The first so many tokens of each, as the model of that folder reads them."""
    from tokenizers import Tokenizer

    tokenizer: Any = Tokenizer.from_file(str(folder / "tokenizer.json"))
    return {name: tokenizer.encode((ROOT / name).read_text()).ids[:tokens] for name in TEXTS}


def log_probabilities(engine: Engine, ids: list[int], rows: int) -> torch.Tensor:
    """float32 [len(ids), vocabulary], after each token, `rows` of them a forward, each over K and V of the slab: linear
    layers and KV are as when serving; attention of longer chunks and over working copies is not in it.
    """
    assert isinstance(engine, TorchEngine)
    kv_format = engine.card.kv_format
    slots = -(-len(ids) // kv_format.block_size)
    engine.bind(engine.scratch(slots, kv_format.slot_bytes))
    table, draw, found = np.arange(slots, dtype=np.int32), Draw(Sampling(), 0), []
    for start in range(0, len(ids), rows):
        # One token each, so that there are logits after every one of them.
        chunks = [Chunk([token], start + at, table, draw) for at, token in enumerate(ids[start : start + rows])]
        found.append(torch.log_softmax(engine.logits(chunks), -1))
    engine.unbind()
    return torch.cat(found)


def compare(exact: torch.Tensor, other: torch.Tensor, ids: list[int]) -> Quality:
    """Of log probabilities of one text."""
    top1 = float((exact.argmax(-1) == other.argmax(-1)).float().mean())
    following = torch.tensor(ids[1:])[:, None]
    loss, other_loss = (float(-rows[:-1].gather(1, following).mean()) for rows in (exact, other))
    return Quality(top1, float(np.exp(other_loss - loss)))
