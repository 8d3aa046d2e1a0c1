"""A forward over fake CUDA tensors: no GPU computes it, but every tensor must lie on the GPU and every shape must fit.

Needs a torch that was built with CUDA; a GPU or a driver is not needed.
"""

from __future__ import annotations

import numpy as np
import pytest
import torch
import transformers
from torch._subclasses.fake_tensor import FakeTensorMode

from headway.core.model import ModelCard
from headway.core.sampling import Sampling
from headway.engine.attention import NAME, paged_attention
from headway.engine.contract import Chunk, Draw
from headway.engine.load import kv_format_of
from headway.engine.model import TorchEngine
from headway.engine.stock import StockModel
from tests.engine.tiny import FAMILIES, VOCABULARY

pytestmark = pytest.mark.skipif(torch.version.cuda is None, reason="torch was built without CUDA")
DRAW = Draw(Sampling(), 0)


def chunk(tokens: int, position: int, first_slot: int, draw: Draw | None = DRAW) -> Chunk:
    blocks = -(-(position + tokens) // 16)
    return Chunk([1] * tokens, position, np.arange(first_slot, first_slot + blocks, dtype=np.int32), draw)


@pytest.mark.parametrize("family", sorted(FAMILIES))
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_a_mixed_step_runs_on_the_gpu_alone(family: str, dtype: str, monkeypatch: pytest.MonkeyPatch) -> None:
    transformers.AttentionInterface.register(NAME, paged_attention)
    # A fake tensor has no memory to export.
    monkeypatch.setattr("torch.utils.dlpack.from_dlpack", lambda slab: slab)
    config = FAMILIES[family]()
    kv_format = kv_format_of(config, dtype, 16)
    with FakeTensorMode():
        with torch.device("cuda:0"):
            model = transformers.AutoModelForCausalLM.from_config(config, dtype=getattr(torch, dtype))
            slab = torch.zeros((40, -(-kv_format.slot_bytes // 4096) * 4096), dtype=torch.uint8)
        model.set_attn_implementation(NAME)
        card = ModelCard("fake", bytes(16), 256, VOCABULARY, (), kv_format)
        engine = TorchEngine(StockModel(model.eval()), card, torch.device("cuda:0"))
        engine.bind(slab)
        logits = engine.logits([chunk(40, 0, 0), chunk(5, 20, 5, None), chunk(1, 33, 10), chunk(1, 0, 20)])
    assert (tuple(logits.shape), logits.dtype, str(logits.device)) == ((3, VOCABULARY), torch.float32, "cuda:0")
