"""Forwards as a device computes them, on a CPU: without a word to the host in between, and by recorded steps."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import pytest
import torch
import transformers

from headway.core.sampling import Sampling
from headway.engine.contract import Chunk, Draw
from headway.engine.graphs import Graphs, Outputs, Recorded, Recorder, rows_for, width_for
from headway.engine.lean import read_decoder
from headway.engine.linear import form_of
from headway.engine.load import kv_format_of
from headway.engine.pages import Pages
from headway.engine.plan_device import GATHER
from headway.engine.sampling_device import prepare
from headway.engine.steps_device import DeviceSteps, Forward
from tests.engine.again import Again
from tests.engine.tiny import FAMILIES, VOCABULARY

CPU = torch.device("cpu")
BLOCK = 16
DRAW = Draw(Sampling(), 0)


def model_on(device: torch.device, dtype: torch.dtype = torch.float32) -> Forward:
    torch.manual_seed(1)
    with device:
        model = transformers.AutoModelForCausalLM.from_config(FAMILIES["llama"](), dtype=dtype)
    decoder = read_decoder(model.eval().requires_grad_(False), form_of(dtype))
    assert decoder is not None
    return decoder


@pytest.fixture(scope="module")
def model() -> Forward:
    return model_on(CPU)


class Rig:
    """A slab whose K and V are random, and steps over it; `launched` steps are never recorded."""

    def __init__(self, model: Forward, recorder: Recorder, slots: int = 800, most: int = 48) -> None:
        self.kv_format = kv_format = kv_format_of(FAMILIES["llama"](), "float32", BLOCK)
        numbers = np.random.default_rng(4).standard_normal((slots, kv_format.slot_bytes // 4)).astype(np.float32)
        self.slab = numbers.view(np.uint8)
        self.pages = Pages(self.slab, kv_format, CPU)
        self.graphs = Graphs(recorder, CPU, most)
        self.steps = DeviceSteps(model, CPU, GATHER, self.graphs)
        self.launched = DeviceSteps(model, CPU, GATHER, None)
        self.random = np.random.default_rng(6)
        self.order = np.random.default_rng(5).permutation(slots).astype(np.int32)

    def chunks(self, positions: Sequence[int], draws: Sequence[Draw | None] | None = None) -> list[Chunk]:
        """One token of each of so many sequences, which have 20 slots each."""
        tokens = [int(token) for token in self.random.integers(0, VOCABULARY, len(positions))]
        draws = draws or [DRAW] * len(positions)
        return [
            Chunk([token], position, self.order[20 * at : 20 * at + 20], draw, at)
            for at, (token, position, draw) in enumerate(zip(tokens, positions, draws, strict=True))
        ]

    def check(self, chunks: list[Chunk]) -> None:
        """Recorded steps draw what launched ones do, and leave the same in the slab."""
        written = [chunk.slots[chunk.position // BLOCK] for chunk in chunks]
        before = self.slab[written]
        wanted, there = self.launched.forward(self.pages, chunks, VOCABULARY), self.slab[written]
        self.slab[written] = before
        assert self.steps.forward(self.pages, chunks, VOCABULARY) == wanted
        assert np.allclose(self.slab[written].view(np.float32), there.view(np.float32), atol=1e-5)
        assert not np.array_equal(there, before)


def test_sizes_of_graphs() -> None:
    assert [rows_for(count) for count in (1, 2, 3, 5, 16, 17, 25, 64, 65, 256)] == [1, 2, 4, 8, 16, 24, 32, 64, 96, 256]
    assert all(count <= rows_for(count) <= 2 * count for count in range(1, 257))
    assert [width_for(blocks) for blocks in (1, 16, 17, 64, 65)] == [16, 16, 32, 64, 128]


def test_every_batch_size_computes_what_launching_computes(model: Forward) -> None:
    recorder = Again()
    rig = Rig(model, recorder)
    random = np.random.default_rng(6)
    counts = [*range(1, 35), 1, 2, 1, 2]
    for count in counts:
        rig.check(rig.chunks([int(at) for at in random.integers(0, 100, count)]))
    assert rig.graphs.refused is None
    # 1, 2, 4, 8, 16, 24, 32, 40: computed first, recorded the second time, and used from then on.
    assert (recorder.records, len(rig.graphs)) == (8, 8)
    assert recorder.replays == len(counts) - 8 + 8  # all but the first of each, and each once more when it is recorded


def test_padding_gives_the_logits_of_the_rows_alone(model: Forward) -> None:
    rig = Rig(model, Again())
    for count in (3, 5, 11):
        chunks = rig.chunks([17 * at for at in range(count)])
        wanted = rig.launched.logits(rig.pages, chunks)
        for _ in range(3):
            with torch.inference_mode():
                found = rig.steps._recorded(rig.graphs, rig.pages, chunks).logits
            assert found.shape == wanted.shape
            assert torch.allclose(found, wanted, atol=1e-4)


def test_a_sequence_that_outgrows_the_tables_of_its_graph_gets_another(model: Forward) -> None:
    recorder = Again()
    rig = Rig(model, recorder)
    for position in range(245, 265):
        rig.check(rig.chunks([position, 3]))
    assert recorder.records == 2


def test_the_graphs_used_least_recently_go(model: Forward) -> None:
    recorder = Again()
    rig = Rig(model, recorder, most=2)
    for count in (1, 1, 2, 2, 1, 4, 4):
        rig.check(rig.chunks(list(range(count))))
    assert (recorder.records, len(rig.graphs)) == (3, 2)
    rig.check(rig.chunks([0]))
    assert recorder.records == 3
    rig.check(rig.chunks([0, 1]))
    assert recorder.records == 4


def test_another_slab_needs_other_graphs(model: Forward) -> None:
    recorder = Again()
    rig = Rig(model, recorder)
    for _ in range(2):
        rig.check(rig.chunks([5, 6]))
    rig.steps.release()
    assert len(rig.graphs) == 0
    for _ in range(2):
        rig.check(rig.chunks([5, 6]))
    assert recorder.records == 2


def test_only_rows_that_draw_are_answered(model: Forward) -> None:
    rig = Rig(model, Again())
    sampled = Draw(Sampling(temperature=1.0, seed=3, frequency_penalty=0.2), 1, 0, (1, 2, 3), 1, 2)
    for _ in range(3):
        chunks = rig.chunks([30, 31, 32, 33, 34], [None, DRAW, sampled, None, sampled])
        rig.check(chunks)
        assert len(rig.steps.forward(rig.pages, chunks, VOCABULARY)) == 3
        rig.check(rig.chunks([30, 31], [None, None]))


def test_other_forwards_are_not_recorded(model: Forward) -> None:
    recorder = Again()
    rig = Rig(model, recorder)
    table = rig.order[400:420]
    for _ in range(3):
        rig.check([*rig.chunks([40, 41]), Chunk([1, 2, 3], 0, table, DRAW)])
    assert recorder.records == 0


class Fails(Recorder):
    def record(self, act: Callable[[], Outputs]) -> Recorded:
        raise RuntimeError("operation not permitted when stream is capturing\nmore")


class Differs(Again):
    def record(self, act: Callable[[], Outputs]) -> Recorded:
        recorded = super().record(act)
        return Recorded(lambda: (recorded.replay(), recorded.outputs.logits.mul_(1.5))[0], recorded.outputs)


@pytest.mark.parametrize(("recorder", "reason"), [(Fails(), "not permitted when stream"), (Differs(), "differs from")])
def test_where_it_cannot_be_recorded_steps_are_launched(
    model: Forward, recorder: Recorder, reason: str, caplog: pytest.LogCaptureFixture
) -> None:
    rig = Rig(model, recorder)
    for count in (2, 2, 2, 3, 3):
        rig.check(rig.chunks(list(range(count))))
    assert rig.graphs.refused is not None
    assert reason in rig.graphs.refused
    assert len(rig.graphs) == 0
    assert len([record for record in caplog.records if "event=no_graphs" in record.getMessage()]) == 1


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_no_word_to_the_host_in_a_step(dtype: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Tensors of the device "meta" have no numbers: what asks for one, or for a shape that depends on one, raises."""
    meta = torch.device("meta")
    monkeypatch.setattr("torch.utils.dlpack.from_dlpack", lambda slab: slab)
    kv_format = kv_format_of(FAMILIES["llama"](), dtype, BLOCK)
    pages = Pages(torch.empty((40, kv_format.slot_bytes), dtype=torch.uint8, device=meta), kv_format, meta)
    steps = DeviceSteps(model_on(meta, getattr(torch, dtype)), meta, GATHER, None)
    table = np.arange(40, dtype=np.int32)
    kinds = [Sampling(temperature=0.7, top_k=3, top_p=0.9, repetition_penalty=1.2), Sampling()]
    draws = [Draw(kind, at, 0, (1, 2), 1, 3) for at, kind in enumerate(kinds)]
    chunks = [
        Chunk([1], 20, table, draws[0]),
        Chunk([1], 100, table, draws[1]),
        Chunk([1] * 20, 0, table, draws[0]),
        Chunk([1] * 20, 33, table, None),
    ]
    prepared = prepare([chunk.draw for chunk in chunks if chunk.draw is not None], VOCABULARY)
    launched = steps.launch(pages, chunks, prepared)
    assert tuple(launched.table.shape) == (3, 3 + 2 * 3)
    with pytest.raises((NotImplementedError, RuntimeError)):
        launched.table.tolist()


def test_unbinding_an_engine_lets_go_of_graphs(model: Forward) -> None:
    from headway.core.model import ModelCard
    from headway.engine.model import TorchEngine

    rig = Rig(model, Again())
    engine = TorchEngine(model, ModelCard("tiny", bytes(16), 256, VOCABULARY, (), rig.kv_format), CPU)
    engine.steps = rig.steps
    engine.bind(rig.slab)
    for _ in range(2):
        engine.forward(rig.chunks([1, 2]))
    assert len(rig.graphs) == 1
    engine.bind(rig.slab)
    assert len(rig.graphs) == 0
    for _ in range(2):
        engine.forward(rig.chunks([1, 2]))
    engine.unbind()
    assert len(rig.graphs) == 0
