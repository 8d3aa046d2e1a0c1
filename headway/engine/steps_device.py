"""Forwards on a device: all is launched without a word to the host, which waits once, for what was drawn."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import NamedTuple, Protocol

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

from headway.core.sampling import ConstraintError
from headway.engine.contract import Chunk, Drawn
from headway.engine.graphs import MOST_ROWS, Graphs, Outputs, rows_for, width_for
from headway.engine.pack import pack
from headway.engine.paged import Reader
from headway.engine.pages import Pages, Plan
from headway.engine.plan_device import moved, plan_device, vectors, with_vectors
from headway.engine.sampling_device import Prepared, draw, greedy, prepare, read

# cuDNN's is not among them: heads that share K and V lie 0 bytes apart.
ANY_STRIDES = [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]


class Forward(Protocol):
    """A model over the slab."""

    def __call__(self, ids: torch.Tensor, positions: torch.Tensor, last: torch.Tensor, plan: Plan) -> torch.Tensor:
        """ids, positions: int64 [rows], of all chunks. → logits [len(last), vocabulary] after the rows `last`."""


class Launched(NamedTuple):
    """What a forward leaves on the device: a table of sampling_device, and logits that the host draws from."""

    table: torch.Tensor
    on_host: torch.Tensor | None


class DeviceSteps:
    """Of one model. graphs: None where steps are launched every time."""

    def __init__(self, model: Forward, device: torch.device, reader: Reader, graphs: Graphs | None) -> None:
        self._model, self._device, self.reader, self.graphs = model, device, reader, graphs
        # Where all recorded steps leave their logits: one of each would take gigabytes.
        self._kept = torch.empty((0, 0), device=device)

    def release(self) -> None:
        """Nothing knows of a slab any more."""
        if self.graphs is not None:
            self.graphs.clear()
        self._kept = torch.empty((0, 0), device=self._device)

    def forward(self, pages: Pages, chunks: Sequence[Chunk], vocabulary: int) -> list[Drawn | ConstraintError]:
        """One of each draw, in order. Raises as Engine.forward."""
        prepared = prepare([draw for chunk in chunks for draw in chunk.draws], vocabulary)
        launched = self.launch(pages, chunks, prepared)
        table, rows = (None if each is None else self._to_host(each) for each in launched)
        if self._device.type == "cuda":
            # No event crosses processes: whoever hears of these blocks may read them at once.
            torch.cuda.current_stream(self._device).synchronize()
        assert table is not None
        return read(table.numpy(), prepared, rows)

    @torch.inference_mode()
    def launch(self, pages: Pages, chunks: Sequence[Chunk], prepared: Prepared) -> Launched:
        """All of a forward but the wait."""
        if self.graphs is not None and len(chunks) <= MOST_ROWS and all(len(chunk.tokens) == 1 for chunk in chunks):
            found = self._recorded(self.graphs, pages, chunks)
            if prepared.plain:
                return Launched(found.table, None)
            return self._drawn(found.logits, prepared, moved(prepared.vectors, self._device))
        inputs, plan = self._inputs(pages, chunks, 1)
        placed = moved([*inputs, *prepared.vectors], self._device)
        logits = self._compute(placed[: len(inputs)], plan).float()
        return self._drawn(logits, prepared, placed[len(inputs) :])

    @torch.inference_mode()
    def logits(self, pages: Pages, chunks: Sequence[Chunk]) -> torch.Tensor:
        """float32 [draws, vocabulary]."""
        inputs, plan = self._inputs(pages, chunks, 1)
        return self._compute(moved(inputs, self._device), plan).float()

    def _drawn(self, logits: torch.Tensor, prepared: Prepared, given: Sequence[torch.Tensor]) -> Launched:
        table = draw(logits, prepared, given)
        return Launched(table, logits[self._rows(prepared.on_host)] if prepared.on_host else None)

    def _recorded(self, graphs: Graphs, pages: Pages, chunks: Sequence[Chunk]) -> Outputs:
        """Of the rows that draw. The batch is filled up with its last sequence, which computes the same once more and
        writes it to the same place: the slab has no slot to spare that is not somebody's.
        """
        count = len(chunks)
        more = [chunks[-1]] * (rows_for(count) - count)
        width = width_for(max(chunk.position // pages.block_size + 1 for chunk in chunks))
        inputs, plan = self._inputs(pages, [*chunks, *more], width)
        inputs[2] = torch.arange(count + len(more))

        def compute(placed: Sequence[torch.Tensor]) -> Outputs:
            logits = self._compute(placed, plan)
            if len(self._kept) < len(logits):
                self._kept = logits.new_empty(logits.shape, dtype=torch.float32)
            kept = self._kept[: len(logits)].copy_(logits)
            return Outputs(kept, greedy(kept))

        logits, table = graphs.run(inputs, compute)
        drawing = [row for row, chunk in enumerate(chunks) if chunk.draw is not None]
        if len(drawing) == count:
            return Outputs(logits[:count], table[:count])
        rows = self._rows(drawing)
        return Outputs(logits[rows], table[rows])

    def _rows(self, rows: list[int]) -> torch.Tensor:
        [there] = moved([torch.tensor(rows, dtype=torch.int64)], self._device)
        return there

    def _inputs(self, pages: Pages, chunks: Sequence[Chunk], width: int) -> tuple[list[torch.Tensor], Plan]:
        """Token ids, positions, rows that draw, then the plan's vectors, all on the host."""
        plan = plan_device(pages, chunks, self.reader, width)
        return [*pack(chunks), *vectors(plan)], plan

    def _compute(self, placed: Sequence[torch.Tensor], plan: Plan) -> torch.Tensor:
        ids, positions, last, *others = placed
        with self._kernels():
            return self._model(ids, positions, last, with_vectors(plan, others))

    def _kernels(self) -> AbstractContextManager[object]:
        """Those attention kernels that take any strides."""
        return sdpa_kernel(ANY_STRIDES) if self._device.type == "cuda" else nullcontext()

    def _to_host(self, numbers: torch.Tensor) -> torch.Tensor:
        """Is there when the stream is done."""
        there = torch.empty(numbers.shape, dtype=numbers.dtype, pin_memory=self._device.type == "cuda")
        return there.copy_(numbers, non_blocking=True)
