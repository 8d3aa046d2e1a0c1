"""What a worker computes next: the next forward, or a guest of the one that runs."""

from __future__ import annotations

import math
import time
from collections.abc import Iterable, Mapping
from pathlib import Path

from headway.core.fair import NO_DEBTS, Fairness
from headway.core.fit import Timing
from headway.core.guest import Host, plan_guest
from headway.core.leases import REMOTE
from headway.core.order import Order
from headway.core.sequence import Sequence
from headway.core.step import StepLimits, Work, plan_step, prompts_s
from headway.core.timings import Timings
from headway.engine.contract import Chunk
from headway.worker.active import Active
from headway.worker.cores import Share
from headway.worker.drafting import Drafting
from headway.worker.forwards import Step
from headway.worker.leases import Leases

Actives = Mapping[Sequence, Active]

# A last chunk that takes longer than this is worth a message to the joiner beforehand.
OFFER_EARLY_S = 0.005


class Steps:
    """Plans steps over the sequences that are runnable; those of a planned step are stepping from then on.

    `share`: of the node's cores; None: the engine's threads are its own affair. `drafting`: None: there are no drafts.
    """

    def __init__(
        self,
        limits: StepLimits,
        order: Order,
        timings: Timings,
        share: Share | None,
        leases: Leases,
        drafting: Drafting | None = None,
    ) -> None:
        self.order = order
        self.fairness = Fairness()
        # Of the tenants that waited when the last step was planned.
        self.debts: Mapping[str, float] = NO_DEBTS
        self._limits = limits
        self._timings = timings
        self._share = share
        self._leases = leases
        self._drafting = drafting
        self._tenants: set[str] = set()
        self._turns = 0
        # The forward that runs, if guests may go between its layers; and what became runnable since it was planned.
        self._host: Host[Sequence] | None = None
        self._fresh: dict[Active, None] = {}

    @property
    def timing(self) -> Timing:
        """Of forwards with as many threads as the last one had."""
        return self._timings.now

    @property
    def hosts(self) -> bool:
        """Whether the forward that was planned last takes guests."""
        return self._host is not None

    def attached(self, folder: Path) -> None:
        """The kvstore's folder, which the node's workers share."""
        if self._share:
            self._share.attached(folder)

    def next(self, actives: Actives) -> Step | None:
        """The next forward; None where there is nothing to compute."""
        threads = self._share.begin() if self._share else None
        if threads is not None:
            self._timings.use(threads)
        self._fresh.clear()
        runnable = [active for active in actives.values() if active.runnable]
        if len(runnable) > self._limits.batch:
            # They take turns: all at a slower pace, instead of some that stand still until others have ended.
            runnable.sort(key=lambda active: active.turn)
        ready = [active.sequence for active in runnable]
        self._tenants = {sequence.tenant for sequence in ready if not sequence.decoding}
        self.debts = self.fairness.debts(self._tenants)
        work = plan_step(ready, self._limits, self.timing.predictor, self.order, self.debts)
        kept = self._kept(work, runnable, actives)
        if not kept:
            return None
        now = time.monotonic()
        for item in kept:
            active = actives[item.sequence]
            active.started_s = active.started_s or now
            self._offer(item, active)
        if self._limits.layers > 1 and not any(item.sequence.decoding for item in kept):
            self._host = Host(kept, prompts_s(kept, self.timing.predictor), now)
        return self._step(kept, actives, threads)

    def idle(self) -> None:
        """There was nothing to compute."""
        if self._share:
            self._share.idle()

    def became_ready(self, active: Active) -> None:
        """It may be the guest of the forward that runs."""
        if self._host is not None:
            self._fresh[active] = None

    def guest(self, actives: Actives) -> Step | None:
        """What to compute now between two layers of the forward that runs, if anything."""
        host = self._host
        self._fresh = {active: None for active in self._fresh if active.runnable}
        if host is None or not self._fresh:
            return None
        fresh = list(self._fresh)
        sequences = [active.sequence for active in fresh]
        self.debts = self.fairness.debts(self._tenants.union(s.tenant for s in sequences if not s.decoding))
        # Who decodes here, now or after its first token, waits for the host's end.
        waits = any(active.sequence.decoding or not active.joiner for active in fresh)
        within_s = self._limits.itl_s if waits else math.inf
        now, predictor = time.monotonic(), self.timing.predictor
        work = plan_guest(host, sequences, now, self._limits, predictor, self.order, self.debts, within_s)
        if not work:
            # Who is too late or too long now will not be less so later.
            self._fresh = {active: None for active in fresh if active.sequence.decoding}
        kept = self._kept(work, fresh, actives)
        return self._step(kept, actives, None) if kept else None

    def guest_took(self, seconds: float) -> None:
        """A guest is computed; this was the host's loss."""
        if self._host is not None:
            self._host.guests_s += seconds

    def ended(self) -> None:
        """The forward that ran is over."""
        self._host = None

    def charge(self, work: Iterable[Work[Sequence]], seconds: float) -> None:
        """A forward of this work took so long; it goes to the accounts of the tenants whose prompts it computed."""
        prompts = [item for item in work if not item.sequence.decoding]
        new = sum(item.count for item in prompts)
        for item in prompts:
            self.fairness.charge(item.sequence.tenant, seconds * item.count / new)

    def _kept(self, work: list[Work[Sequence]], ready: list[Active], actives: Actives) -> list[Work[Sequence]]:
        """Of the plan what is computed at once. The rest was passed over before: of that, what siblings have sealed
        meanwhile is asked first.
        """
        kept: list[Work[Sequence]] = []
        for item in work:
            active = actives[item.sequence]
            if active.passed_over and not active.replies_due and not item.sequence.decoding:
                self._leases.refresh(active)
            else:
                kept.append(item)
        if len(ready) > len(work):
            picked = {item.sequence for item in work}
            for active in ready:
                if active.sequence not in picked:
                    active.passed_over = True
        return kept

    def _offer(self, item: Work[Sequence], active: Active) -> None:
        """The joiner can have the block table while the last chunk is computed. Not that of a guest: one that is
        withdrawn may get other slots for it.
        """
        here = active.joiner and not active.joiner.startswith(REMOTE)
        if item.draws and here and self.timing.predictor.prefill_s(item.count, item.start) > OFFER_EARLY_S:
            self._leases.offer_to_joiner(active)

    def _drafts(self, work: list[Work[Sequence]], actives: Actives) -> list[list[int]]:
        """Of each item. Beside prompts there are none: what the objective between tokens leaves is theirs."""
        if self._drafting is None or not all(item.sequence.decoding for item in work):
            return [[] for _ in work]
        return self._drafting.drafts([actives[item.sequence] for item in work], self.timing)

    def _step(self, work: list[Work[Sequence]], actives: Actives, threads: int | None) -> Step:
        chunks = []
        for item, drafts in zip(work, self._drafts(work, actives), strict=True):
            active = actives[item.sequence]
            self._turns += 1
            active.stepping, active.turn = True, self._turns
            tokens = [*item.sequence.tokens[item.start : item.start + item.count], *drafts]
            draw = active.draw() if item.draws else None
            named = item.sequence if item.sequence.decoding else None
            chunks.append(Chunk(tokens, item.start, active.slots, draw, named, len(drafts)))
        return Step(work, chunks, threads, self.timing)
