"""A small stand-in for the worker's loop: block tables, chunks and batches, over a slab full of NaN."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt
import torch

from headway.core.sampling import Sampling
from headway.engine.contract import Chunk, Draw, Drawn, Engine, SlabArray


@dataclass(eq=False)
class Running:
    """A sequence: prompt and outputs so far, of which `computed` tokens have K and V in the slab."""

    tokens: list[int]
    prompt_tokens: int
    table: npt.NDArray[np.int32]
    sampling: Sampling
    computed: int = 0
    outputs: list[int] = field(default_factory=list)


class Driver:
    """Runs sequences on an engine; tables are scattered over the slab at random. `device` is the engine's."""

    def __init__(self, engine: Engine, slots: int, seed: int = 0, device: str = "cpu") -> None:
        self.engine = engine
        stride = -(-engine.card.kv_format.slot_bytes // 4096) * 4096
        # NaN in every float format
        self.slab = np.full((slots, stride), 0xFF, np.uint8)
        self._bound: SlabArray = self.slab if device == "cpu" else torch.from_numpy(self.slab).to(device)
        self._block = engine.card.kv_format.block_size
        self._free = [int(slot) for slot in np.random.default_rng(seed).permutation(slots)]
        # Of the last forward.
        self.drawn: list[Drawn | None] = []
        engine.bind(self._bound)

    def start(
        self, prompt: Sequence[int], new: int, shared: Running | None = None, sampling: Sampling | None = None
    ) -> Running:
        """A sequence with slots for `new` tokens more; whole blocks in common with `shared` are shared."""
        common = 0 if shared is None else _common(prompt[:-1], shared.tokens[: shared.computed])
        keep = common // self._block
        needed = -(-(len(prompt) + new) // self._block) - keep
        own = np.array([self._free.pop() for _ in range(needed)], np.int32)
        table = own if shared is None else np.concatenate([shared.table[:keep], own])
        return Running(list(prompt), len(prompt), table, sampling or Sampling(), keep * self._block)

    @property
    def free_slots(self) -> int:
        return len(self._free)

    def end(self, sequence: Running) -> None:
        """It is over; its slots, which it shares with nobody, are free."""
        self.engine.forget(sequence)
        self._free += [int(slot) for slot in sequence.table]

    def prefill(self, running: Sequence[Running]) -> None:
        """Each prompt in a forward of its own, to its first token."""
        self.engine.bind(self._bound)
        for sequence in running:
            self.step([sequence], 1 << 30)

    def run(self, running: Sequence[Running], new: int, chunks: Iterator[int]) -> list[list[int]]:
        """All together, prompts in chunks of the given sizes, until each has `new` outputs."""
        self.engine.bind(self._bound)
        while active := [sequence for sequence in running if len(sequence.outputs) < new]:
            self.step(active, next(chunks))
        return [sequence.outputs for sequence in running]

    def step(self, running: Sequence[Running], limit: int) -> None:
        """One forward with at most `limit` tokens of each sequence."""
        chunks = []
        for at in running:
            tokens = at.tokens[at.computed : at.computed + limit]
            last = at.computed + len(tokens) == len(at.tokens)
            draw = Draw(at.sampling, len(at.outputs), 0, tuple(at.tokens), at.prompt_tokens) if last else None
            chunks.append(Chunk(tokens, at.computed, at.table, draw, at))
        self.drawn = self.engine.forward(chunks)
        for at, chunk, drawn in zip(running, chunks, self.drawn, strict=True):
            at.computed += len(chunk.tokens)
            if drawn is not None:
                at.outputs.append(drawn.token_id)
                at.tokens.append(drawn.token_id)


def _common(ours: Sequence[int], theirs: Sequence[int]) -> int:
    """How many tokens the two start with alike."""
    pairs = enumerate(zip(ours, theirs, strict=False))
    return next((at for at, (a, b) in pairs if a != b), min(len(ours), len(theirs)))
