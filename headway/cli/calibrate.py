"""`headway calibrate`: how fast this machine is with a model, as hardware for `headway simulate`."""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path

from headway.core.fit import Timing
from headway.models import resolve
from headway.sim.hardware import Linear
from headway.sim.presets import write_hardware
from headway.worker.measure import measure

GIB = 1 << 30


def run(arguments: argparse.Namespace) -> int:
    # torch takes a second to import; no other command needs it.
    from headway.engine.load import ModelError, load_engine

    threads = arguments.threads or os.cpu_count() or 1
    try:
        engine = load_engine(str(resolve(arguments.model)), threads=threads, device=arguments.device)
    except (ModelError, LookupError, ValueError, OSError) as error:
        print(f"headway calibrate: {error}", file=sys.stderr)
        return 1
    timing = Timing()
    measure(engine, timing, arguments.seconds)
    predictor, card = timing.predictor, engine.card
    hardware = Linear(
        name=f"{card.name} on {arguments.device}",
        source=f"headway calibrate, {threads} threads",
        predictor=predictor,
        token_bytes=card.kv_format.bytes_per_token,
        cache_tokens=int(arguments.slab_gib * GIB / card.kv_format.bytes_per_token),
        batch=64,
    )
    print(f"prefill {_formula(predictor.prefill, ('prompt', 'new token', 'token pair'))}")
    print(f"step    {_formula(predictor.step, ('step', 'sequence', 'KV token'))}")
    print(f"mean error {timing.prefill.error:.0%} and {timing.step.error:.0%}")
    try:
        write_hardware(Path(arguments.output), hardware)
    except OSError as error:
        print(f"headway calibrate: the result cannot be written: {error}", file=sys.stderr)
        return 1
    print(f"wrote {arguments.output}; try: headway simulate --hardware {arguments.output}")
    return 0


def add_arguments(command: argparse.ArgumentParser) -> None:
    command.add_argument("--model", default="smollm2", help="an added model, or a folder (default: %(default)s)")
    command.add_argument("--device", default="cpu", help="cpu, or cuda:N (default: %(default)s)")
    command.add_argument("--threads", type=int, default=0, metavar="N", help="0, the default: all cores")
    command.add_argument("--seconds", type=float, default=20.0, help="to measure for (default: %(default)s)")
    command.add_argument("--slab-gib", type=float, default=1.0, help="KV memory of a node (default: %(default)s)")
    command.add_argument("--output", default="hardware.json", metavar="FILE", help="(default: %(default)s)")


def _formula(coefficients: tuple[float, float, float], units: tuple[str, str, str]) -> str:
    return " + ".join(f"{value * 1e3:.3g} ms a {unit}" for value, unit in zip(coefficients, units, strict=True))
