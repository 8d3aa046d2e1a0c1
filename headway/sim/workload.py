"""Made-up traces: sessions, shared system prompts, agents, bursts and spikes; all parameters are here."""

from __future__ import annotations

import hashlib
import math
import random
from collections.abc import Iterator
from dataclasses import dataclass, replace

from headway.core.keys import KEY_BYTES
from headway.sim.trace import Trace, TraceRequest

BLOCK = 512


@dataclass(frozen=True)
class Workload:
    """Sessions begin at `sessions_per_s` on average, for `seconds`; gaps between them are Gamma with coefficient of
    variation `burstiness` (1: Poisson).

    A session starts with one of `system_prompts` prompts of `system_tokens` tokens (popularity falls as 1/rank), has a
    geometric number of turns with mean `turns`; each turn adds a log-normal number of tokens to the context (median
    `turn_tokens`, sigma of the logarithm `spread`), the answer too (median `output_tokens`), and comes after a pause of
    mean `pause_s`, exponential. From `spike_at_s` on, for `spike_s`, sessions come `spike` times as fast.
    """

    name: str
    sessions_per_s: float
    seconds: float = 600.0
    burstiness: float = 1.0
    system_prompts: int = 20
    system_tokens: int = 2048
    turns: float = 4.0
    turn_tokens: int = 400
    output_tokens: int = 200
    pause_s: float = 30.0
    spread: float = 1.0
    spike: float = 1.0
    spike_at_s: float = 0.0
    spike_s: float = 0.0


# chat and agents have the mean lengths of the public Mooncake traces (FAST 2025: 12 k in and 343 out, 8.6 k in and 182
# out) within a factor of two; the others are chat, with bursts and with a spike.
WORKLOADS = {
    "chat": Workload("chat", 1.0, turn_tokens=1500, output_tokens=250),
    "agents": Workload(
        "agents", 0.3, system_prompts=5, system_tokens=4096, turns=15.0, turn_tokens=300, output_tokens=100, pause_s=3.0
    ),
    "bursts": Workload("bursts", 1.0, burstiness=4.0, turn_tokens=1500, output_tokens=250),
    "spike": Workload("spike", 1.0, turn_tokens=1500, output_tokens=250, spike=10.0, spike_at_s=300.0, spike_s=5.0),
}


def make_trace(workload: Workload, seed: int = 0) -> Trace:
    """The trace of a workload; the same seed gives the same trace."""
    draw = random.Random(f"{workload.name} {seed}")
    requests = [request for start in _starts(workload, draw) for request in _session(workload, draw, start)]
    requests.sort(key=lambda request: request.arrival_s)
    return Trace(workload.name, BLOCK, requests)


def scaled(workload: Workload, rate: float | None, seconds: float | None) -> Workload:
    """With `rate` requests a second on average, and of another length, where given."""
    if seconds is not None:
        workload = replace(workload, seconds=seconds)
    return workload if rate is None else replace(workload, sessions_per_s=rate / workload.turns)


def _starts(workload: Workload, draw: random.Random) -> Iterator[float]:
    """Arrivals at a varying rate: gaps of unit mean, passed at the pace of the moment."""
    shape = 1 / workload.burstiness**2
    now_s = 0.0
    while True:
        spiking = workload.spike_at_s <= now_s < workload.spike_at_s + workload.spike_s
        rate = workload.sessions_per_s * (workload.spike if spiking else 1.0)
        gap_s = draw.gammavariate(shape, 1 / shape) / rate
        if not spiking and workload.spike_s and now_s < workload.spike_at_s < now_s + gap_s:
            # The gap would jump into the spike: it goes on from there, faster.
            now_s = workload.spike_at_s
            continue
        now_s += gap_s
        if now_s >= workload.seconds:
            return
        yield now_s


def _session(workload: Workload, draw: random.Random, start_s: float) -> Iterator[TraceRequest]:
    ranks = range(1, workload.system_prompts + 1)
    system = draw.choices(ranks, [1 / rank for rank in ranks])[0]
    name = draw.getrandbits(64)
    tokens, arrival_s = workload.system_tokens, start_s
    while True:
        tokens += _length(draw, workload.turn_tokens, workload.spread)
        output = _length(draw, workload.output_tokens, workload.spread)
        yield TraceRequest(arrival_s, tokens, output, _keys(workload, system, name, tokens))
        tokens += output
        arrival_s += draw.expovariate(1 / workload.pause_s)
        if draw.random() < 1 / workload.turns or arrival_s >= workload.seconds:
            return


def _length(draw: random.Random, median: int, spread: float) -> int:
    return max(1, round(draw.lognormvariate(math.log(median), spread)))


def _keys(workload: Workload, system: int, session: int, tokens: int) -> list[bytes]:
    """Blocks of the system prompt are those of all its sessions, later ones of this session's alone."""
    shared = workload.system_tokens // BLOCK
    names = [f"{system} {at}" if at < shared else f"{session} {at}" for at in range(-(-tokens // BLOCK))]
    return [hashlib.blake2b(name.encode(), digest_size=KEY_BYTES).digest() for name in names]
