"""A scenario of the simulator as a local fleet of real services with simulated engines."""

from __future__ import annotations

import asyncio
import math
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import uvloop

from headway.client.request import Options
from headway.fleet import Fleet, FleetSpec
from headway.replay.drive import Replay, Seen
from headway.sim.policies import Entry
from headway.sim.scenario import Scenario
from headway.sim.trace import Trace, TraceRequest

# Tokens of a block, and bytes of a slot, of the simulated engine's KV.
BLOCK = 16
SLOT_BYTES = 4096


@dataclass(frozen=True)
class Live:
    """A scenario, run by `routers` routers with the policy and the order of `entry`.

    Every worker computes as the scenario's hardware says. Without `scenario.nodes` a prefill and a decode worker share
    a node, as local fleets deal them.
    """

    scenario: Scenario
    entry: Entry
    routers: int = 1
    # Of each request; one that has no end by then has failed.
    deadline_s: float = 3600.0

    @property
    def spec(self) -> FleetSpec:
        scenario, order = self.scenario, self.entry.order
        hardware, limits = scenario.hardware, scenario.limits
        predictor = hardware.predictor
        objective_s = 0.0 if math.isinf(scenario.itl_objective_s) else scenario.itl_objective_s
        router = [
            "--policy", self.entry.name,
            "--local-prefill-tokens", str(scenario.local_prefill_tokens if self.entry.local else 0),
            "--itl-objective-s", str(objective_s),
            "--max-wait-s", str(0.0 if math.isinf(scenario.max_wait_s) else scenario.max_wait_s),
            "--max-in-flight", "100000", "--max-queued", "100000", "--max-request-s", str(self.deadline_s),
            "--pull-latency-s", str(scenario.link_latency_s),
            "--link-bytes-per-s", str(scenario.link_bytes_per_s),
        ]  # fmt: skip
        worker = [
            "--order", order.rule.value, "--ageing", str(order.ageing),
            "--sim-prefill", ",".join(map(str, predictor.prefill)), "--sim-step", ",".join(map(str, predictor.step)),
            "--max-batch", str(hardware.batch), "--chunk-tokens", str(limits.chunk_tokens),
            "--chunk-s", str(limits.chunk_s), "--shared-chunk-s", str(limits.shared_chunk_s),
            "--itl-objective-s", str(limits.itl_s if limits.itl_s < math.inf else 0),
            "--acquire-timeout-s", "3600",
        ]  # fmt: skip
        return FleetSpec(
            scenario.prefill,
            scenario.decode,
            model="sim",
            engine="sim",
            nodes=scenario.nodes or max(scenario.prefill, scenario.decode),
            routers=self.routers,
            slab_bytes=hardware.cache_tokens // BLOCK * SLOT_BYTES,
            worker_flags=worker,
            flags={"router": router},
        )

    def options(self, request: TraceRequest) -> Options:
        """The request's own objective, where the scenario has one."""
        options: Options = {"deadline_s": self.deadline_s}
        objective = self.scenario.objective
        if objective is not None:
            options |= {"ttft_objective_s": objective.seconds(request, self.scenario.hardware), "refuse_late": True}
        return options


During = Callable[[Fleet, Replay], None]


def replay(
    trace: Trace,
    live: Live,
    *,
    during: During | None = None,
    on_done: Callable[[Seen], None],
) -> list[Seen]:
    """Start the fleet, send the trace, stop the fleet. `during` runs in a thread beside. Raises FleetError."""
    with tempfile.TemporaryDirectory(prefix="headway-replay-") as folder, Fleet(live.spec, Path(folder)) as fleet:
        fleet.wait_ready()
        seen: list[Seen] = uvloop.run(_drive(Replay(trace, fleet.addresses, live.options, on_done), fleet, during))
        return seen


async def _drive(run: Replay, fleet: Fleet, during: During | None) -> list[Seen]:
    beside = asyncio.create_task(asyncio.to_thread(during, fleet, run)) if during else None
    seen = await run.run()
    if beside is not None:
        await beside
    return seen
