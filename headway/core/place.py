"""Where a request runs: filter → score → pick, by predicted seconds to its first token.

An option is a prefill worker with a decode worker, or a decode worker that prefills by itself; either may first fetch
a prefix that another node has. A decode worker on another node than prefill gets its cache through the nodes' kvstores.
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Sequence

from headway.core.ask import Ask, Option, Promised, Refusal, Why
from headway.core.backlog import Prompt
from headway.core.decode import DecodeChoice
from headway.core.filters import Rules, meant, partner
from headway.core.index import PrefixIndex
from headway.core.load import Role, WorkerLoad
from headway.core.policy import Candidate, Planner, Policy, Way, ttft_s
from headway.core.promises import Promises
from headway.core.reserve import Reservation

APART = Refusal(Why.UNFIT, "the request forces prefill and decode apart")


class Placer:
    """What one router knows and how it decides. Times are of one clock, which the caller reads (`now_s`).

    Reservations keep the loads true between two words of the workers.
    """

    def __init__(self, rules: Rules, policy: Policy, planner: Planner, index: PrefixIndex) -> None:
        self.rules = rules
        self.loads: dict[str, WorkerLoad] = {}
        self.index = index
        self.promises = Promises()
        self.planner = planner
        self.policy = policy
        self._decode = DecodeChoice(planner.links, planner.token_bytes, rules.block_size)

    def add(self, load: WorkerLoad) -> None:
        """A worker came; it shares the memory of its node with those that are there."""
        for other in self.loads.values():
            if other.node == load.node:
                load.memory = other.memory
        self.loads[load.worker_id] = load

    def remove(self, load: WorkerLoad) -> None:
        """The worker is gone; one that has taken its place stays."""
        load.leave_memory()
        if self.loads.get(load.worker_id) is load:
            del self.loads[load.worker_id]

    def overlaps(self, keys: Sequence[bytes]) -> tuple[dict[str, int], dict[str, Promised]]:
        """For Ask.resident and Ask.promised of this chain."""
        block = self.rules.block_size
        return self.index.overlap(keys, block), self.promises.overlap(keys, block)

    def place(self, ask: Ask, now_s: float) -> Option | None:
        """The best option; None when nobody can take it now (`options` says why)."""
        candidates, decodes = self._candidates(ask)
        if not candidates:
            return None
        way = self.policy.pick(ask, candidates, now_s)
        if not self._keeps_pace(ask, way.load):
            # Looked at so late because it is dear, and seldom needed.
            candidates = [candidate for candidate in candidates if self._keeps_pace(ask, candidate[0])]
            if not candidates:
                return None
            way = self.policy.pick(ask, candidates, now_s)
        if self.rules.unkept(ask, way, now_s):
            # What is best for all is too late for this one, or makes another late; what is next may not.
            soonest = self._soonest(ask, candidates, now_s)
            if soonest is None:
                return None
            way = soonest
        return self._option(ask, way, decodes, now_s)

    def options(self, ask: Ask, now_s: float, picked: Option | None) -> list[Option]:
        """Every option with its cost, best first, refused ones last. `picked`: what `place` says."""
        decodes = [load for load in self.rules.able(ask, self.loads.values()) if partner(ask, load)]
        sources = self.planner.sources(ask)
        found: list[Option] = []
        for load in self.loads.values():
            if picked is not None and load.worker_id == picked.worker:
                found.append(picked)
            elif meant(ask, load):
                candidate = (load, ask.own_tokens(load.worker_id, load.node))
                way = self.planner.best(ask, candidate, *sources, now_s)
                refused = self._refused(ask, candidate, decodes) or self.rules.unkept(ask, way, now_s)
                # Who would go on is looked for only where anybody has to: refusals must be cheap.
                option = self._option(ask, way, [] if refused else decodes, now_s)
                found.append(option._replace(refused=refused))
        first = (picked.prefill_worker, picked.decode_worker) if picked else None
        found.sort(key=lambda o: (bool(o.refused), (o.prefill_worker, o.decode_worker) != first, o.cost_s))
        return found

    def reserve(self, name: Hashable, ask: Ask, option: Option, now_s: float) -> Reservation:
        """The request goes where `option` says; what this costs its workers counts from now on."""
        worker, decode = self.loads[option.worker], self.loads[option.decode_worker]
        new = ask.prompt_tokens - option.overlap_tokens
        due_s = math.inf if ask.objective_s is None else ask.objective_s
        ready_s, after = now_s + option.pull_s, None
        if option.pull_from is None:
            after = ask.awaits(worker.worker_id, worker.node, option.overlap_tokens).name
        prompt = Prompt(name, option.key, option.compute_s, new, due_s, ready_s, after, ask.tenant)
        worker.backlog.add(prompt, now_s)
        pulled = option.overlap_tokens // self.rules.block_size if option.pull_from is not None else 0
        self.promises.add(name, worker.worker_id, ask.keys, now_s + option.ttft_s, pulled)
        if option.pull_from is not None:
            size = self.planner.pull_bytes(ask, worker, option.overlap_tokens)
            self.planner.links.between(option.pull_from, worker.node).start(size, now_s)
        return Reservation(name, ask, worker, decode, self.promises)

    def _candidates(self, ask: Ask) -> tuple[list[Candidate], list[WorkerLoad]]:
        """Who may compute the prompt now (decode workers only if `_keeps_pace`), and who may go on with it."""
        able = self.rules.able(ask, self.loads.values())
        prefill, decode = Role.PREFILL, Role.DECODE
        decodes = [load for load in able if load.role is not prefill]
        if ask.decode_worker:
            decodes = [load for load in decodes if load.worker_id == ask.decode_worker]
        if not decodes:
            # Without a partner a prefill worker is of no use.
            return [], decodes
        computing = [load for load in able if meant(ask, load)] if ask.hinted else able
        if ask.force_apart:
            computing = [load for load in computing if load.role is prefill]
        if ask.promised:
            owned = [(load, ask.own_tokens(load.worker_id, load.node)) for load in computing]
        else:
            known = ask.known()
            owned = [(load, known.get(load.node, 0)) for load in computing]
        missing = ask.prompt_tokens - self.rules.local_prefill_tokens
        if missing <= 0:
            return owned, decodes
        found = [pair for pair in owned if pair[1] >= missing or pair[0].role is not decode]
        if len(found) < len(owned) and not self._any_prefill(ask):
            return owned, decodes
        return found, decodes

    def _keeps_pace(self, ask: Ask, load: WorkerLoad) -> bool:
        """Whether nobody's tokens come too late if it computes the prompt."""
        if load.role is not Role.DECODE or not load.running or not self._any_prefill(ask):
            return True
        return self.rules.keeps_pace(ask, load, ask.own_tokens(load.worker_id, load.node))

    def _refused(self, ask: Ask, candidate: Candidate, decodes: Sequence[WorkerLoad]) -> Refusal | None:
        """Why it is none of the candidates; None when it is one."""
        load, own = candidate
        if refused := self.rules.refused(ask, load):
            return refused
        if load.role is Role.PREFILL:
            return None if decodes else self.rules.no_partner(ask, self.loads.values())
        if ask.force_apart:
            return APART
        if load.role is Role.MIXED or not self._any_prefill(ask):
            return None
        return self.rules.unfit(ask, load, own)

    def _any_prefill(self, ask: Ask) -> bool:
        return any(load.role is Role.PREFILL and not self.rules.away(ask, load) for load in self.loads.values())

    def _soonest(self, ask: Ask, candidates: Sequence[Candidate], now_s: float) -> Way | None:
        """Of all ways that keep every bound the one that is soonest; None when none does."""
        sources = self.planner.sources(ask)
        ways = [way for candidate in candidates for way in self.planner.ways(ask, candidate, *sources, now_s)]
        kept = (
            way
            for way in sorted(ways, key=ttft_s)
            if not self.rules.unkept(ask, way, now_s) and self._keeps_pace(ask, way.load)
        )
        return next(kept, None)

    def _option(self, ask: Ask, way: Way, decodes: Sequence[WorkerLoad], now_s: float) -> Option:
        load = way.load
        prefill: str | None = None
        decode = load.worker_id
        if load.role is Role.PREFILL:
            prefill, decode = load.worker_id, ask.decode_worker
            if decodes:
                decode = self._decode.pick(ask, decodes, load.node, now_s).worker_id
        return Option(
            prefill, decode, way.overlap, way.key, way.wait_s, way.compute_s, way.pull_from, way.pull_s, way.delay_s,
            way.cost_s,
        )  # fmt: skip
