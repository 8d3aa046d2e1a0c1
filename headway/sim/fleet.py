"""The simulated fleet: a router with the policy under test, nodes, workers, and the trace that comes at them."""

from __future__ import annotations

import math
import random
from collections.abc import Callable
from dataclasses import replace
from heapq import heappop, heappush

from headway.core.ask import Ask, Option
from headway.core.backlog import Backlog, Prompt
from headway.core.filters import Rules
from headway.core.index import PrefixIndex
from headway.core.keys import join_keys
from headway.core.links import Links
from headway.core.load import Role, WorkerLoad
from headway.core.order import Key
from headway.core.place import Placer
from headway.core.policy import Planner
from headway.core.reserve import Reservation
from headway.sim.clock import Clock
from headway.sim.node import SimNode
from headway.sim.policies import Entry
from headway.sim.scenario import Outcome, Scenario
from headway.sim.sequence import SimSequence
from headway.sim.trace import Trace
from headway.sim.worker import SimWorker


class SimFleet:
    """One run of a policy over a trace. `on_progress` hears how many requests are done."""

    def __init__(
        self, trace: Trace, scenario: Scenario, entry: Entry, on_progress: Callable[[int], None] = lambda done: None
    ) -> None:
        self._trace = trace
        self._scenario = scenario
        self._entry = entry
        self._on_progress = on_progress
        self._clock = Clock()
        self._chance = random.Random(scenario.seed)
        self._noise = random.Random(scenario.seed + 1)
        self._placer = self._make_placer()
        self._nodes: dict[str, SimNode] = {}
        self._workers = {worker.name: worker for worker in self._make_workers()}
        self._placed: dict[int, tuple[Option, Reservation]] = {}
        self._held: list[tuple[Key, int, SimSequence]] = []
        self._done = 0

    def run(self) -> Outcome:
        """Every request of the trace, to its end."""
        sequences = [
            SimSequence(number, request, self._draw_noise()) for number, request in enumerate(self._trace.requests)
        ]
        for sequence in sequences:
            self._clock.at(sequence.arrival_s, _bound(self._arrive, sequence))
        self._clock.run()
        busy_s = [worker.busy_s for worker in self._workers.values()]
        steps = [step for worker in self._workers.values() for step in worker.batch.steps]
        return Outcome(self._entry.name, self._scenario, sequences, busy_s, self._trace.span_s, steps)

    # ------------------------------------------------------------------ making

    def _make_placer(self) -> Placer:
        scenario, entry = self._scenario, self._entry
        links = Links(scenario.link_latency_s, scenario.link_bytes_per_s or math.inf)
        token_bytes = scenario.hardware.token_bytes if scenario.link_bytes_per_s else 0
        planner = Planner(links, token_bytes, self._trace.block_size)
        rules = Rules(
            self._trace.block_size,
            local_prefill_tokens=scenario.local_prefill_tokens if entry.local else 0,
            itl_objective_s=scenario.itl_objective_s,
            max_queued=1 << 62,
            max_wait_s=scenario.max_wait_s,
        )
        return Placer(rules, entry.make(planner, self._chance.random), planner, PrefixIndex(1 << 30))

    def _make_workers(self) -> list[SimWorker]:
        scenario = self._scenario
        names = [(f"p{at}", Role.PREFILL, at) for at in range(scenario.prefill)]
        names += [(f"d{at}", Role.DECODE, at) for at in range(scenario.decode)]
        return [
            self._make_worker(name, role, self._node(f"n{at % scenario.nodes}" if scenario.nodes else name, role))
            for name, role, at in names
        ]

    def _node(self, name: str, role: Role) -> SimNode:
        if name not in self._nodes:
            tokens = self._scenario.hardware.cache_tokens
            if role is Role.DECODE and not self._scenario.nodes:
                tokens = self._scenario.decode_cache_tokens
            blocks = tokens // self._trace.block_size
            self._nodes[name] = SimNode(name, blocks, self._stored, self._removed)
            self._placer.index.snapshot(name)
        return self._nodes[name]

    def _make_worker(self, name: str, role: Role, node: SimNode) -> SimWorker:
        hardware, limits = self._scenario.hardware, self._scenario.limits
        if role is not Role.PREFILL:
            limits = replace(limits, batch=hardware.batch)
        load = WorkerLoad(
            name,
            node.name,
            role,
            replace(limits, batch=hardware.batch),
            ready=True,
            total_slots=hardware.cache_tokens // self._trace.block_size,
            predictor=hardware.predictor,
            backlog=Backlog(limits, self._entry.order),
        )
        self._placer.add(load)
        return SimWorker(
            name, node, self._clock, hardware, self._trace.block_size, limits, self._entry.order,
            self._running, self._chunk, self._drawn, self._ended,
        )  # fmt: skip

    # ------------------------------------------------------------------ the router

    def _arrive(self, sequence: SimSequence) -> None:
        if self._entry.queue_tokens is None:
            self._place(sequence)
            return
        key = self._entry.held.key(0.0, self._uncached(sequence), sequence.arrival_s, sequence.priority)
        heappush(self._held, (key, sequence.number, sequence))
        self._release()

    def _release(self) -> None:
        """A queue at the router: requests wait there while every worker has more than so many tokens to compute."""
        most = self._entry.queue_tokens
        loads = [load for load in self._placer.loads.values() if load.role is Role.PREFILL]
        while self._held and most is not None and any(load.backlog.tokens <= most for load in loads):
            self._place(heappop(self._held)[2])

    def _uncached(self, sequence: SimSequence) -> int:
        """Where most of it is cached, when it arrives."""
        resident, _ = self._placer.overlaps(sequence.request.keys)
        return sequence.request.prompt_tokens - max(resident.values(), default=0)

    def _place(self, sequence: SimSequence) -> None:
        request, placer, now_s = sequence.request, self._placer, self._clock.now_s
        resident, promised = placer.overlaps(request.keys)
        ask = Ask(
            prompt_tokens=request.prompt_tokens,
            keys=request.keys,
            arrival_s=request.arrival_s,
            expected_tokens=request.output_tokens,
            resident=resident,
            promised=promised,
            priority=request.priority,
            tenant=request.tenant,
            objective_s=self._due_s(sequence),
        )
        option = placer.place(ask, now_s)
        if option is None:
            sequence.refused = True
            self._count_done()
            return
        if ask.objective_s is not None:
            self._clock.at(ask.objective_s, _bound(self._too_late, sequence))
        sequence.predicted_s = option.ttft_s
        sequence.computed = option.overlap_tokens
        worker = self._workers[option.worker]
        if option.pull_from is not None:
            self._pull(sequence, worker, option.pull_from, option, resident.get(worker.node.name, 0))
        self._placed[sequence.number] = option, placer.reserve(sequence.number, ask, option, now_s)
        worker.submit(sequence)

    def _due_s(self, sequence: SimSequence) -> float | None:
        objective, request = self._scenario.objective, sequence.request
        return None if objective is None else request.arrival_s + objective.seconds(request, self._scenario.hardware)

    def _too_late(self, sequence: SimSequence) -> None:
        """Its first token is due: without it, it is given up."""
        if sequence.first_token_s is None:
            self._workers[sequence.worker].cancel(sequence)
            self._heard_ended(sequence)
            self._count_done()

    def _pull(self, sequence: SimSequence, worker: SimWorker, source: str, option: Option, own: int) -> None:
        """Asked for when placed, as the link's estimate says; what the source does not have any more does not come."""
        keys = sequence.request.keys[: -(-option.overlap_tokens // self._trace.block_size)]
        keys = keys[: self._nodes[source].leading(keys)]
        self._nodes[source].use(keys)
        sequence.landed = False
        sequence.pulled = option.overlap_tokens - own

        def landed() -> None:
            worker.node.add(keys)
            sequence.landed = True
            worker.wake()

        self._clock.after(option.pull_s, landed)

    # ------------------------------------------------------------------ what happens at workers

    def _running(self, sequence: SimSequence) -> None:
        self._hear_debts(sequence)
        backlog = self._placer.loads[sequence.worker].backlog
        self._hear(lambda: backlog.started(sequence.number, self._clock.now_s))

    def _chunk(self, sequence: SimSequence) -> None:
        """A part of the prompt is computed: what a worker's status says then. It goes on unless another starts."""
        request, load = sequence.request, self._placer.loads[sequence.worker]
        left = request.prompt_tokens - sequence.computed
        seconds = load.predictor.prefill_s(left, sequence.computed)
        key = load.backlog.order.key(seconds, left, request.arrival_s, request.priority)
        prompt = Prompt(sequence.number, key, seconds, left, tenant=request.tenant)

        def heard() -> None:
            # Given up meanwhile, as far as the router knows: that is older than what it hears now.
            if sequence.number in load.backlog:
                load.backlog.report([prompt], {sequence.number}, sequence.number, self._clock.now_s)

        self._hear(heard)

    def _drawn(self, sequence: SimSequence) -> None:
        """The first token is there: the client has it, decode goes on."""
        self._hear_debts(sequence)
        self._hear(lambda: self._heard_computed(sequence))
        if sequence.request.output_tokens < 2:
            sequence.finished_s = self._clock.now_s
            self._ended(sequence)
        else:
            option, _ = self._placed[sequence.number]
            worker = self._workers[option.decode_worker]
            worker.node.add(sequence.request.keys)
            worker.join(sequence)

    def _ended(self, sequence: SimSequence) -> None:
        self._hear(lambda: self._heard_ended(sequence))
        self._count_done()

    def _stored(self, node: str, keys: list[bytes]) -> None:
        joined = join_keys(keys)
        self._hear(lambda: self._placer.index.stored(node, joined))

    def _removed(self, node: str, keys: list[bytes]) -> None:
        joined = join_keys(keys)
        self._hear(lambda: self._placer.index.removed(node, joined))

    def _count_done(self) -> None:
        self._done += 1
        self._on_progress(self._done)

    # ------------------------------------------------------------------ what the router hears of it

    def _hear_debts(self, sequence: SimSequence) -> None:
        backlog, debts = self._placer.loads[sequence.worker].backlog, self._workers[sequence.worker].debts
        self._hear(lambda: backlog.settle(debts))

    def _hear(self, action: Callable[[], object]) -> None:
        if self._scenario.stale_s:
            self._clock.after(self._scenario.stale_s, action)
        else:
            action()

    def _heard_computed(self, sequence: SimSequence) -> None:
        self._placed[sequence.number][1].computed(self._clock.now_s)
        self._release()

    def _heard_ended(self, sequence: SimSequence) -> None:
        _, reservation = self._placed.pop(sequence.number)
        reservation.leave(self._clock.now_s)

    def _draw_noise(self) -> float:
        """Of mean 1."""
        sigma = self._scenario.noise
        return math.exp(self._noise.gauss(-sigma * sigma / 2, sigma)) if sigma else 1.0


def _bound(action: Callable[[SimSequence], None], sequence: SimSequence) -> Callable[[], None]:
    return lambda: action(sequence)
