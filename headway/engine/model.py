"""The engine that torch runs: all chunks of a step in one packed forward over the slab."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from dataclasses import replace

import torch

from headway.core.model import ModelCard
from headway.core.sampling import ConstraintError
from headway.engine.contract import Chunk, DeviceLost, Drawn, SlabArray
from headway.engine.errors import ModelError
from headway.engine.graphs import CudaRecorder, Graphs
from headway.engine.memory import available_bytes
from headway.engine.pack import pack
from headway.engine.paged import Reader
from headway.engine.pages import Pages
from headway.engine.plan_cpu import plan_cpu
from headway.engine.plan_device import GATHER
from headway.engine.sampling import draw_rows
from headway.engine.steps_device import DeviceSteps, Forward
from headway.engine.working import Copies

# What working copies leave of the memory that the machine can give: for a forward's own, and for others.
RESERVE_BYTES = 512 << 20
# Packs of more rows are filled up by at most an eighth.
EXACT_ROWS = 16


class TorchEngine:
    """An Engine (see contract) around a model whose weights are on `device`."""

    def __init__(
        self, model: Forward, card: ModelCard, device: torch.device, copy_bytes: int = 0, reader: Reader = GATHER
    ) -> None:
        """copy_bytes: that working copies may take beside the slab, on a CPU; 0: as many as the slab has, of what the
        machine can give without its last RESERVE_BYTES. reader: how attention reads the slab on a device that is none.
        """
        self.card = card
        # On a device; a CPU's forwards are this file's.
        self.steps = None if device.type == "cpu" else DeviceSteps(model, device, reader, _graphs(device))
        self._copy_bytes = copy_bytes
        self._model = model
        self.device = device
        # On a GPU all layers are launched long before they are computed.
        self.interruptible = device.type == "cpu"
        self._pages: Pages | None = None
        self._copies: Copies | None = None

    def bind(self, slab: SlabArray) -> None:
        """Use this slab from now on. Raises ValueError where it cannot hold card.kv_format."""
        self.unbind()
        self._pages = Pages(slab, self.card.kv_format, self.device)
        if self.device.type == "cpu":
            if self._copy_bytes:
                self._copies = Copies(self._pages, self._copy_bytes)
            else:
                self._copies = Copies(self._pages, self._pages.slots * self.card.kv_format.slot_bytes, _spare_bytes)

    def unbind(self) -> None:
        """Drop every view of the slab, so that it can be unmapped."""
        self._pages = self._copies = None
        if self.steps is not None:
            self.steps.release()

    def use_threads(self, count: int) -> None:
        """See the contract."""
        torch.set_num_threads(count)

    def forget(self, sequence: Hashable) -> None:
        """See the contract."""
        if self._copies is not None:
            self._copies.forget(sequence)

    def scratch(self, slots: int, stride: int) -> SlabArray:
        """See the contract."""
        return torch.zeros((slots, stride), dtype=torch.uint8, device=self.device)

    def forward(
        self, chunks: Sequence[Chunk], between: Callable[[], None] | None = None
    ) -> list[Drawn | ConstraintError | None]:
        """See the contract. Raises ValueError, before anything is written, where a chunk cannot be computed."""
        try:
            drawn = iter(self._drawn(chunks, between))
        except Exception as error:
            for chunk in chunks:
                # Its copy may lack what this forward was to put there.
                self.forget(chunk.sequence)
            if self.device.type != "cpu" and isinstance(error, RuntimeError):
                _check_works(self.device, error)
            raise
        results = [chunk.kept([next(drawn) for _ in chunk.draws]) if chunk.draw else None for chunk in chunks]
        return self._with_copied(chunks, results) if self._copies and self._copies.made else results

    @torch.inference_mode()
    def logits(self, chunks: Sequence[Chunk], between: Callable[[], None] | None = None) -> torch.Tensor:
        """float32 [draws, vocabulary]: the logits from which each chunk that draws does so, in order."""
        pages = self._checked(chunks)
        if self.steps is not None:
            return self.steps.logits(pages, chunks)
        assert self._copies is not None
        plan = plan_cpu(pages, chunks, self._copies)
        if not plan.batches:
            # A later plan may give away the rows of working copies that this one's batches read.
            plan = plan._replace(between=between)
        return self._model(*pack(chunks, self._more_rows(plan.rows)), plan).float()

    def _drawn(self, chunks: Sequence[Chunk], between: Callable[[], None] | None) -> list[Drawn | ConstraintError]:
        """Of each draw."""
        if self.steps is not None:
            return self.steps.forward(self._checked(chunks), chunks, self.card.vocab_size)
        return draw_rows(self.logits(chunks, between), [draw for chunk in chunks for draw in chunk.draws])

    def _more_rows(self, rows: int) -> int:
        """That fill up the pack: oneDNN makes code for each number of rows, and never lets go of it."""
        if rows <= EXACT_ROWS:
            return 0
        return -rows % (1 << (rows.bit_length() - 4))

    def _with_copied(
        self, chunks: Sequence[Chunk], drawn: Sequence[Drawn | ConstraintError | None]
    ) -> list[Drawn | ConstraintError | None]:
        """Says of each sequence that got a working copy how much was copied."""
        made, token_bytes = (self._copies.made, self._copies.pages.token_bytes) if self._copies else ({}, 0)
        return [
            replace(one, copied_bytes=made[chunk.sequence] * token_bytes)
            if isinstance(one, Drawn) and chunk.sequence in made
            else one
            for chunk, one in zip(chunks, drawn, strict=True)
        ]

    def _checked(self, chunks: Sequence[Chunk]) -> Pages:
        """The slab. Raises ValueError where chunks cannot be computed."""
        if self._pages is None:
            raise ModelError("the engine has no slab; bind one first")
        if not chunks:
            raise ValueError("a forward needs at least one chunk")
        for chunk in chunks:
            if not chunk.tokens or min(chunk.tokens) < 0 or max(chunk.tokens) >= self.card.vocab_size:
                raise ValueError(f"token ids must be 0 to {self.card.vocab_size - 1}, at least one a chunk")
            if not 0 <= chunk.drafts < len(chunk.tokens) or (chunk.drafts and chunk.draw is None):
                raise ValueError("drafts follow a token, and something is drawn after them")
            if chunk.position + len(chunk.tokens) > self.card.context_tokens:
                raise ValueError(f"a sequence cannot be longer than the context of {self.card.context_tokens} tokens")
        return self._pages


def _graphs(device: torch.device) -> Graphs | None:
    return Graphs(CudaRecorder(device), device) if device.type == "cuda" and torch.cuda.is_available() else None


def _spare_bytes() -> int:
    return available_bytes() - RESERVE_BYTES


def _check_works(device: torch.device, error: Exception) -> None:
    """Raises DeviceLost where `error` was no refusal (of memory, say) but left the device of no use to this process."""
    try:
        torch.cuda.synchronize(device)
    except RuntimeError:
        raise DeviceLost(f"{device} does not work any more: {str(error).splitlines()[0]}") from error
