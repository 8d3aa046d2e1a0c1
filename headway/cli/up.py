"""`headway up`."""

from __future__ import annotations

import argparse
import signal
import sys
import tempfile
from types import FrameType

from headway import models
from headway.fleet import Fleet, FleetSpec


def run(arguments: argparse.Namespace) -> int:
    """Keeps a supervised fleet running until SIGINT or SIGTERM."""
    spec = spec_of(arguments)
    if spec.engine != "sim":
        models.resolve(spec.model)
    signal.signal(signal.SIGTERM, _interrupt)
    with tempfile.TemporaryDirectory(prefix="headway-") as temporary:
        fleet = Fleet(spec, arguments.run_dir or temporary)
        names = ", ".join(name for name, _, _ in spec.workers)
        _say(f"starting {len(spec.kvstores)} kvstore, {names} and the router; logs in {fleet.run_dir}")
        with fleet:
            _say("loading the model")
            view = fleet.wait_ready()
            _say(f"serving {view.model} (context {view.context_tokens} tokens) at {fleet.address}; Ctrl-C stops it")
            _say(f'try: headway generate "Once upon a time" --address {fleet.address}')
            try:
                signal.pause()
            except KeyboardInterrupt:
                _say("stopping")
    return 0


def spec_of(arguments: argparse.Namespace) -> FleetSpec:
    """`--mixed` alone means no other workers."""
    asked = (arguments.prefill, arguments.decode, arguments.mixed)
    others = 0 if arguments.mixed and asked[:2] == (None, None) else 1
    prefill, decode, mixed = (
        default if count is None else count for count, default in zip(asked, (others, others, 0), strict=True)
    )
    return FleetSpec(
        prefill=prefill,
        decode=decode,
        mixed=mixed,
        model=arguments.model,
        engine=arguments.engine,
        port=arguments.port,
        slab_bytes=arguments.slab_bytes,
        threads=arguments.threads,
        supervise=True,
    )


def _interrupt(_number: int, _frame: FrameType | None) -> None:
    raise KeyboardInterrupt


def _say(text: str) -> None:
    print(f"headway: {text}", file=sys.stderr, flush=True)
