"""Hardware to simulate: by name, or as `headway calibrate` measured it."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

from headway.core.predict import Predictor
from headway.sim.hardware import STUDY, Hardware, Linear, Mocker

# Shares of the peak rates in the data sheets that engines are taken to reach. An assumption: measure yours.
COMPUTE_SHARE = 0.5
BANDWIDTH_SHARE = 0.6
# Of the memory, what weights and KV may take.
MEMORY_SHARE = 0.9


@dataclass(frozen=True)
class Gpu:
    """Dense bfloat16 FLOP/s, bytes/s and bytes, from NVIDIA's data sheet."""

    flops: float
    bandwidth: float
    memory: float


@dataclass(frozen=True)
class Model:
    """As its paper states it (The Llama 3 Herd of Models, 2024, table 3)."""

    parameters: float
    layers: int
    width: int
    kv_width: int = 8 * 128

    @property
    def token_bytes(self) -> int:
        return 2 * self.layers * self.kv_width * 2


GPUS = {
    "a100": Gpu(312e12, 2.039e12, 80e9),
    "h100": Gpu(989.4e12, 3.35e12, 80e9),
    "h200": Gpu(989.4e12, 4.8e12, 141e9),
    "l40s": Gpu(362e12, 0.864e12, 48e9),
}
MODELS = {"8b": Model(8.03e9, 32, 4096), "70b": Model(70.6e9, 80, 8192)}
PAIRS = {
    "a100-8b": ("a100", 1, "8b"),
    "h100-8b": ("h100", 1, "8b"),
    "l40s-8b": ("l40s", 1, "8b"),
    "a100x4-70b": ("a100", 4, "70b"),
    "h100x4-70b": ("h100", 4, "70b"),
    "h200x4-70b": ("h200", 4, "70b"),
}
NAMES = (STUDY.name, "mocker", *PAIRS)


class HardwareError(Exception):
    """No such hardware; one sentence."""


def hardware(name: str) -> Hardware:
    """A preset, or a file of `headway calibrate`. Raises HardwareError."""
    if name == STUDY.name:
        return STUDY
    if name == "mocker":
        return Mocker()
    if name in PAIRS:
        gpu, count, model = PAIRS[name]
        return _roofline(name, GPUS[gpu], count, MODELS[model])
    if not Path(name).exists():
        raise HardwareError(f"hardware {name!r} is neither a file nor one of {', '.join(NAMES)}")
    return read_hardware(Path(name))


def _roofline(name: str, gpu: Gpu, count: int, model: Model) -> Linear:
    """2 FLOP a parameter and token, 4·layers·width FLOP a pair of tokens that attend; a step reads weights and KV."""
    flops = gpu.flops * count * COMPUTE_SHARE
    bandwidth = gpu.bandwidth * count * BANDWIDTH_SHARE
    weights = 2 * model.parameters
    read_s = weights / bandwidth
    token_s = 2 * model.parameters / flops
    prefill = (read_s, token_s, 4 * model.layers * model.width / flops)
    step = (read_s, token_s, model.token_bytes / bandwidth)
    room = gpu.memory * count * MEMORY_SHARE - weights
    source = "NVIDIA data sheet, Llama 3 paper; half of peak compute and 0.6 of peak bandwidth are assumed"
    return Linear(name, source, Predictor(prefill, step), model.token_bytes, int(room / model.token_bytes))


def write_hardware(path: Path, hardware: Linear) -> None:
    """As JSON. Raises OSError."""
    fields = {
        "name": hardware.name,
        "source": hardware.source,
        "prefill": hardware.predictor.prefill,
        "step": hardware.predictor.step,
        "token_bytes": hardware.token_bytes,
        "cache_tokens": hardware.cache_tokens,
        "batch": hardware.batch,
    }
    path.write_text(json.dumps(fields, indent=2) + "\n")


def read_hardware(path: Path) -> Linear:
    """Raises HardwareError."""
    try:
        fields = json.loads(path.read_text())
        a, b, c = map(float, fields["prefill"])
        d, e, f = map(float, fields["step"])
        return Linear(
            str(fields["name"]),
            str(fields["source"]),
            Predictor((a, b, c), (d, e, f)),
            int(fields["token_bytes"]),
            int(fields["cache_tokens"]),
            int(fields["batch"]),
        )
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise HardwareError(f"{path} is no file of headway calibrate ({type(error).__name__}: {error})") from None
