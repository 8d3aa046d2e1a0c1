"""Which workers may take a request, and why the others may not."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from headway.core.ask import Ask, Refusal, Why
from headway.core.load import Role, WorkerLoad
from headway.core.policy import Way, ttft_s

# A refusal's least time to try again, seconds.
LEAST_RETRY_S = 0.1
# Of a predicted time, by which it may be wrong when a promise is made.
MARGIN = 0.2
UNNAMED = Refusal(Why.UNFIT, "the request names another")


@dataclass(frozen=True, slots=True)
class Rules:
    """What placement may do.

    A decode worker computes at most `local_prefill_tokens` of a prompt by itself, and only where a step with a chunk
    of it stays within `itl_objective_s`. A worker with `max_queued` prompts, or with more than `max_wait_s` predicted
    seconds of them, gets no more.
    """

    block_size: int
    local_prefill_tokens: int = 0
    itl_objective_s: float = math.inf
    max_queued: int = 512
    max_wait_s: float = math.inf

    def able(self, ask: Ask, loads: Iterable[WorkerLoad]) -> list[WorkerLoad]:
        """Those that are not `refused`, in a few hundred nanoseconds each."""
        least, most, excluded = ask.prompt_tokens // self.block_size + 1, self.max_queued, ask.excluded
        return [
            load
            for load in loads
            if load.ready
            and not load.draining
            and load.total_slots >= least
            and load.reported < most
            and len(load.backlog) < most
            and load.worker_id not in excluded
        ]

    def refused(self, ask: Ask, load: WorkerLoad) -> Refusal | None:
        """Why this worker cannot take the request now; None when it can."""
        if away := self.away(ask, load):
            return away
        # Without these not even one token can be drawn.
        least = ask.prompt_tokens // self.block_size + 1
        if load.total_slots < least:
            return Refusal(Why.SMALL, f"the prompt needs {least} slots, its node has {load.total_slots}")
        if load.queued >= self.max_queued:
            return Refusal(Why.BUSY, f"its queue is full ({load.queued} waiting)", LEAST_RETRY_S)
        return None

    def away(self, ask: Ask, load: WorkerLoad) -> Refusal | None:
        """Why this worker is not there for the request at all; None when it is."""
        if not load.ready:
            return Refusal(Why.AWAY, "not ready")
        if load.draining:
            return Refusal(Why.AWAY, "draining")
        if load.worker_id in ask.excluded:
            return Refusal(Why.AWAY, "failed this request before")
        return None

    def keeps_pace(self, ask: Ask, load: WorkerLoad, own: int) -> bool:
        """Whether a decode worker may compute what is missing beyond `own` tokens beside those that decode there."""
        return load.running <= 0 or self._step_s(ask, load, own) <= self.itl_objective_s

    def unfit(self, ask: Ask, load: WorkerLoad, own: int) -> Refusal | None:
        """Why a decode worker leaves this prompt to the prefill workers, which are there."""
        missing, most = ask.prompt_tokens - own, self.local_prefill_tokens
        if missing > most:
            return Refusal(Why.UNFIT, f"{missing} tokens are left to compute, and it computes at most {most} itself")
        if not self.keeps_pace(ask, load, own):
            step_ms, most_ms = self._step_s(ask, load, own) * 1e3, self.itl_objective_s * 1e3
            return Refusal(
                Why.UNFIT, f"a step with its chunk would take {step_ms:.0f} ms, the objective is {most_ms:g} ms"
            )
        return None

    def unkept(self, ask: Ask, way: Way, now_s: float) -> Refusal | None:
        """Which bound the way would break: that of the queue, its own objective, or that of one who waits there (which
        only a request with an objective of its own respects). None when none.
        """
        backlog = way.load.backlog
        queue_s = backlog.left_s(now_s) if self.max_wait_s < math.inf else 0.0
        if queue_s > self.max_wait_s:
            sentence = f"its queue is {queue_s:.1f} s long, above the limit of {self.max_wait_s:g} s"
            return Refusal(Why.BUSY, sentence, max(LEAST_RETRY_S, queue_s - self.max_wait_s))
        if ask.objective_s is None:
            return None
        first_s, due_s = ttft_s(way), max(0.0, ask.objective_s - now_s)
        if first_s * (1 + MARGIN) > due_s:
            sentence = f"its first token would come after {first_s:.2f} s, and is due after {due_s:.2f} s"
            return Refusal(Why.LATE, sentence, max(LEAST_RETRY_S, min(way.wait_s, first_s - due_s)))
        if backlog.breaks(backlog.with_debt(way.key, ask.tenant), way.compute_s, now_s, MARGIN):
            sentence = "it would make a request late that was promised to be in time"
            return Refusal(Why.LATE, sentence, max(LEAST_RETRY_S, backlog.left_s(now_s)))
        return None

    def no_partner(self, ask: Ask, loads: Iterable[WorkerLoad]) -> Refusal:
        """Why nobody can go on with what a prefill worker would compute."""
        reasons = {
            load.worker_id: refusal
            for load in loads
            if load.role is not Role.PREFILL
            and (refusal := self.refused(ask, load) or (None if partner(ask, load) else UNNAMED))
        }
        if not reasons:
            return Refusal(Why.AWAY, "there is no decode worker")
        why = min((refusal.why for refusal in reasons.values()), key=list(Why).index)
        sentences = "; ".join(f"{worker_id}: {refusal.sentence}" for worker_id, refusal in reasons.items())
        return Refusal(why, f"no decode worker can take it ({sentences})")

    def _step_s(self, ask: Ask, load: WorkerLoad, own: int) -> float:
        """Of a decode step with a chunk of the prompt, which it may share with prompts that are there already.

        The worker would cut the chunk to what its own objective leaves, and its streams would go at that pace for many
        steps: such a prompt is better off with a prefill worker.
        """
        new = min(ask.prompt_tokens - own + load.backlog.tokens, load.limits.chunk_tokens)
        chunk_s = min(load.predictor.prefill_s(new, own), load.limits.shared_chunk_s)
        return chunk_s + load.itl_s(ask.prompt_tokens)


def meant(ask: Ask, load: WorkerLoad) -> bool:
    """Whether the request's hints allow that this worker computes the prompt."""
    if load.role is Role.PREFILL:
        return ask.prefill_worker in ("", load.worker_id)
    return not ask.prefill_worker and ask.decode_worker in ("", load.worker_id)


def partner(ask: Ask, load: WorkerLoad) -> bool:
    """Whether it may go on with what another computed."""
    return load.role is not Role.PREFILL and ask.decode_worker in ("", load.worker_id)


def check_hints(ask: Ask, loads: Mapping[str, WorkerLoad]) -> None:
    """ValueError (a sentence) when a hint cannot be followed."""
    hints = (
        ("prefill_worker", ask.prefill_worker, (Role.PREFILL,)),
        ("decode_worker", ask.decode_worker, (Role.DECODE, Role.MIXED)),
    )
    for name, hint, roles in hints:
        fitting = sorted(load.worker_id for load in loads.values() if load.role in roles)
        if hint and hint not in fitting:
            known = ", ".join(fitting) or "none"
            raise ValueError(f"placement.{name} is {hint!r}, which this fleet does not have; it has {known}")
