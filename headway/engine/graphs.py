"""Steps recorded as CUDA graphs: a step of few sequences is hundreds of short kernels, and launching takes longer.

A graph reads its inputs from one buffer and belongs to the shapes of what lies in it: so many rows, tables so wide. A
step of new shapes is launched the first time, which loads and compiles kernels; the second time it is recorded.
"""

from __future__ import annotations

import logging
from collections import OrderedDict
from collections.abc import Callable, Sequence
from typing import NamedTuple, Protocol

import torch

from headway.engine.plan_device import moved, packed, parted

log = logging.getLogger(__name__)

# Graphs that are kept; those used least recently go.
MOST_GRAPHS = 48
# Larger batches are not recorded: they compute long enough to be launched meanwhile.
MOST_ROWS = 256
LEAST_WIDTH = 16
# Root mean square of the difference from the same step as it is launched, in standard deviations of the logits.
_TOLERANCE = 1e-2


class Outputs(NamedTuple):
    """logits: float32 [rows, vocabulary]. table: of sampling_device.greedy. A graph's hold until its next use."""

    logits: torch.Tensor
    table: torch.Tensor


Compute = Callable[[Sequence[torch.Tensor]], Outputs]


class Recorded(NamedTuple):
    """replay: does again what was recorded, from what its inputs hold now; `outputs` have the results then."""

    replay: Callable[[], None]
    outputs: Outputs


class Recorder(Protocol):
    """Records what a function launches on a device. May raise anything; the device works on all the same."""

    def record(self, act: Callable[[], Outputs]) -> Recorded: ...


class CudaRecorder:
    """All graphs take their memory from one pool: only one of them runs at a time."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._pool = torch.cuda.graph_pool_handle()

    def record(self, act: Callable[[], Outputs]) -> Recorded:
        """See Recorder."""
        graph = torch.cuda.CUDAGraph()
        # Other threads of the process may use the device meanwhile.
        with torch.cuda.device(self._device), torch.cuda.graph(graph, self._pool, capture_error_mode="thread_local"):
            outputs = act()
        return Recorded(graph.replay, outputs)


class _Step(NamedTuple):
    inputs: torch.Tensor
    recorded: Recorded


class Graphs:
    """Of one engine over one slab. refused: why nothing is recorded any more; None as long as it is."""

    def __init__(self, recorder: Recorder, device: torch.device, most: int = MOST_GRAPHS) -> None:
        self._recorder, self._device, self._most = recorder, device, most
        self._steps: OrderedDict[tuple[torch.Size, ...], _Step] = OrderedDict()
        self._met: set[tuple[torch.Size, ...]] = set()
        self.refused: str | None = None

    def __len__(self) -> int:
        return len(self._steps)

    def clear(self) -> None:
        """Drop them all, and with them what they know of the slab."""
        self._steps.clear()
        self._met.clear()

    def run(self, vectors: Sequence[torch.Tensor], compute: Compute) -> Outputs:
        """compute(vectors on the device), by a graph where there is one. What `compute` does must depend on nothing but
        the shapes of `vectors` (int64, on the host) and on the numbers in them.
        """
        key = tuple(vector.shape for vector in vectors)
        step = self._steps.get(key)
        if step is None:
            if self.refused is not None or key not in self._met:
                self._met.add(key)
                return compute(moved(vectors, self._device))
            step = self._record(vectors, compute)
            if step is None:
                return compute(moved(vectors, self._device))
            self._steps[key] = step
            if len(self._steps) > self._most:
                self._steps.popitem(last=False)
        self._steps.move_to_end(key)
        step.inputs.copy_(packed(vectors, self._device), non_blocking=True)
        step.recorded.replay()
        return step.recorded.outputs

    def _record(self, vectors: Sequence[torch.Tensor], compute: Compute) -> _Step | None:
        """None where it cannot be recorded, or does something else then; after that nothing is tried any more."""
        try:
            inputs = packed(vectors, self._device).to(self._device)
            # It may be written to the same place.
            wanted = compute(parted(inputs, vectors)).logits.clone()
            recorded = self._recorder.record(lambda: compute(parted(inputs, vectors)))
            recorded.replay()
            difference = _difference(recorded.outputs.logits, wanted)
            if not difference <= _TOLERANCE:
                raise ValueError(f"a recorded step differs from a launched one by {difference:.2g} standard deviations")
        except Exception as error:  # what cannot be recorded shows in many ways
            self.refused = f"{type(error).__name__}: {(str(error).strip().splitlines() or [''])[0]}"
            log.warning("event=no_graphs device=%s reason=%s", self._device, self.refused)
            self.clear()
            return None
        log.info("event=graph rows=%d tables=%s graphs=%d", len(wanted), tuple(vectors[-1].shape), len(self._steps) + 1)
        return _Step(inputs, recorded)


def rows_for(count: int) -> int:
    """Rows of the graph that computes so many: powers of two, then multiples of 8, of 32 past 64."""
    if count <= 16:
        return 1 << (count - 1).bit_length()
    return -(-count // 8) * 8 if count <= 64 else -(-count // 32) * 32


def width_for(blocks: int) -> int:
    """Columns of its block tables: a power of two, so that a sequence that grows seldom needs another graph."""
    return max(LEAST_WIDTH, 1 << (blocks - 1).bit_length())


def _difference(found: torch.Tensor, wanted: torch.Tensor) -> float:
    return float((found - wanted).square().mean().sqrt() / wanted.std().clamp_min(1e-12))
