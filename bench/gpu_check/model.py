"""A Llama with random weights on the device, the engine around it, and sequences that run over the slab."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from bench.gpu_check.pair import torch_name
from bench.gpu_check.sizes import Sizes
from headway.core.model import KvFormat, ModelCard
from headway.core.sampling import Sampling
from headway.engine.contract import Chunk, Draw, Engine
from headway.slab.device import Device, DeviceMapping
from headway.slab.host import slot_stride

if TYPE_CHECKING:
    from headway.engine.model import TorchEngine

BLOCK = 16


def config_of(sizes: Sizes) -> Any:
    import transformers

    # Wider than usual, so that logits differ: near ties would fall either way by rounding.
    return transformers.LlamaConfig(**sizes.shape, initializer_range=0.04, bos_token_id=1, eos_token_id=None)


def format_of(sizes: Sizes, dtype: str) -> KvFormat:
    from headway.engine.load import kv_format_of

    return kv_format_of(config_of(sizes), dtype, BLOCK)


def slab_bytes(sizes: Sizes, dtype: str, slots: int) -> int:
    return slots * slot_stride(format_of(sizes, dtype).slot_bytes)


def blocks(tokens: int) -> int:
    return -(-tokens // BLOCK)


def random_model(sizes: Sizes, dtype: str, device: Device) -> Any:
    """The same weights for the same device and dtype."""
    import torch
    from transformers import AttentionInterface, AutoModelForCausalLM

    from headway.engine.attention import NAME, paged_attention
    from headway.engine.quiet import quiet

    AttentionInterface.register(NAME, paged_attention)
    torch.manual_seed(0)
    with quiet(), torch.device(torch_name(device)):
        model = AutoModelForCausalLM.from_config(config_of(sizes), dtype=getattr(torch, dtype))
        model.set_attn_implementation(NAME)
    return model.eval().requires_grad_(False)


def engine_of(model: Any, sizes: Sizes, dtype: str, mapping: DeviceMapping) -> TorchEngine:
    """As it is loaded, proven, and bound to the slab, which is zeroed. Takes the model's weights."""
    import torch

    from headway.engine.lean import read_decoder
    from headway.engine.linear import form_of
    from headway.engine.model import TorchEngine
    from headway.engine.paged_proof import choose_reader
    from headway.engine.plan_device import GATHER
    from headway.engine.proof import expected_logits, prove, tolerance

    kv_format, shape = format_of(sizes, dtype), sizes.shape
    context, vocabulary = shape["max_position_embeddings"], shape["vocab_size"]
    card = ModelCard("random", bytes(16), context, vocabulary, (), kv_format)
    expected = expected_logits(model, card)
    reader = GATHER
    if model.device.type != "cpu":
        reader = choose_reader(kv_format, shape["num_attention_heads"], model.device).reader
    decoder = read_decoder(model, form_of(getattr(torch, dtype)))
    assert decoder is not None
    engine = TorchEngine(decoder, card, torch.device(torch_name(mapping.device)), reader=reader)
    prove(engine, expected, tolerance(dtype, "float", dtype), model.config.model_type)
    stride = slot_stride(kv_format.slot_bytes)
    view = mapping.view(mapping.size // stride, stride)
    torch.utils.dlpack.from_dlpack(view).zero_()
    engine.bind(view)
    return engine


def how_of(engine: TorchEngine) -> dict[str, Any]:
    """How attention reads the slab, how many steps are recorded as graphs, and why none are; of an engine on a GPU."""
    if engine.steps is None:
        return {"attention": "cpu", "graphs": 0, "no_graphs": "on a CPU"}
    graphs = engine.steps.graphs
    refused = "not asked for" if graphs is None else graphs.refused
    return {"attention": engine.steps.reader.name, "graphs": len(graphs or ()), "no_graphs": refused}


@dataclass
class Running:
    """A sequence: its tokens so far, of which `computed` have K and V in the slab."""

    tokens: list[int]
    table: npt.NDArray[np.int32]
    computed: int = 0
    outputs: list[int] = field(default_factory=list)

    def chunk(self, limit: int) -> Chunk:
        """The next at most `limit` tokens."""
        tokens = self.tokens[self.computed : self.computed + limit]
        last = self.computed + len(tokens) == len(self.tokens)
        return Chunk(tokens, self.computed, self.table, Draw(Sampling(), len(self.outputs)) if last else None)


class Tables:
    """Gives out slots in random order, as they lie after a while in service."""

    def __init__(self, slots: int) -> None:
        self._free = np.random.default_rng(3).permutation(slots).astype(np.int32)

    def take(self, tokens: int) -> npt.NDArray[np.int32]:
        count = blocks(tokens)
        taken, self._free = self._free[:count], self._free[count:]
        return taken


def prompt_of(length: int, vocabulary: int, seed: int) -> list[int]:
    return [int(token) for token in np.random.default_rng(seed).integers(0, vocabulary, length)]


def step(engine: Engine, running: Sequence[Running], limit: int = 1 << 30) -> None:
    """One forward with at most `limit` tokens of each sequence."""
    chunks = [sequence.chunk(limit) for sequence in running]
    for sequence, chunk, drawn in zip(running, chunks, engine.forward(chunks), strict=True):
        sequence.computed += len(chunk.tokens)
        if drawn is not None:
            sequence.outputs.append(drawn.token_id)
            sequence.tokens.append(drawn.token_id)
