"""A worker as the router sees it: what it is, what it has to do, how fast it is."""

from __future__ import annotations

import enum
import math
from dataclasses import dataclass, field
from typing import NamedTuple

from headway.core.backlog import Backlog
from headway.core.predict import Predictor
from headway.core.step import LEAST_CHUNK, UNCUT, StepLimits


class Role(enum.Enum):
    PREFILL = "prefill"
    DECODE = "decode"
    MIXED = "mixed"


class Share(NamedTuple):
    """Sequences that decode, or will as soon as their prompts are computed elsewhere: how many, the KV tokens they hold
    (on average over their lives, where that is known), and what is still to come by their expected ends.
    """

    running: int = 0
    kv_tokens: int = 0
    growth_tokens: int = 0


NOBODY = Share()


@dataclass(slots=True, eq=False)
class Memory:
    """A node's KV memory. `committed_tokens`: what its sequences will have there by their expected ends."""

    committed_tokens: int = 0


@dataclass(slots=True, eq=False)
class WorkerLoad:
    """As its last status described it, corrected by what this router sent it and got back since then.

    `backlog`: prompts not yet computed. `running`: sequences that decode, `coming`: those that will as soon as their
    prompts are computed elsewhere; `kv_tokens`: of both, on average over their lives. This router's own are always
    exact (`join`, `begin`, `part`), those of other routers are as of the last status (`others_are`, all as running).
    `limits`: those of its forwards. `memory` is one for all workers of a node.
    """

    worker_id: str
    node: str
    role: Role
    limits: StepLimits = UNCUT
    ready: bool = False
    draining: bool = False
    total_slots: int = 0
    # Prompts, as the worker counted them last; it does not name all of a long queue.
    reported: int = 0
    predictor: Predictor = field(default_factory=Predictor)
    backlog: Backlog = field(default_factory=Backlog)
    memory: Memory = field(default_factory=Memory)
    running: int = 0
    coming: int = 0
    kv_tokens: int = 0
    # Of `memory`, what this worker's sequences have.
    committed_tokens: int = 0
    # Sequences ever sent there: among equals, the one that got least. `over`: those of them that came to their end.
    sent: int = 0
    over: int = 0
    _others: Share = NOBODY

    @property
    def queued(self) -> int:
        """Prompts that are not computed yet."""
        return max(len(self.backlog), self.reported)

    @property
    def in_flight(self) -> int:
        """Sequences that this router sent there, whether to compute or to decode, until their answers end."""
        return self.sent - self.over

    def join(self, prompt_tokens: int, expected_tokens: int) -> None:
        """A sequence of this router's will decode here."""
        self.coming += 1
        self._hold(prompt_tokens + expected_tokens // 2, prompt_tokens + expected_tokens)

    def begin(self) -> None:
        """One that joined decodes from now on."""
        self.coming -= 1
        self.running += 1

    def part(self, prompt_tokens: int, expected_tokens: int) -> None:
        """One that began is over; the numbers with which it joined."""
        self.running -= 1
        self._hold(-prompt_tokens - expected_tokens // 2, -prompt_tokens - expected_tokens)

    def others_are(self, share: Share) -> None:
        """What other routers have here, says the worker."""
        before, self._others = self._others, share
        self.running += share.running - before.running
        committed = share.kv_tokens + share.growth_tokens - before.kv_tokens - before.growth_tokens
        self._hold(share.kv_tokens - before.kv_tokens, committed)

    def leave_memory(self) -> None:
        """The worker is gone: nothing of it, nor what of it parts later, counts at the node any more."""
        self.memory.committed_tokens -= self.committed_tokens
        self.memory = Memory(self.committed_tokens)

    def step_s(self) -> float:
        """A step of its batch as it is: of as many as have a place in it."""
        share = self._share(self.running)
        return self.predictor.step_s(self.running * share, self.kv_tokens * share)

    def itl_s(self, tokens: int) -> float:
        """Between two tokens with one more sequence, whose context has `tokens`: a step, and more where they take turns
        because the batch has no place for all.
        """
        share = self._share(self.running + 1)
        return self.predictor.step_s((self.running + 1) * share, (self.kv_tokens + tokens) * share) / share

    def steps_of(self, tokens: int, compute_s: float) -> int:
        """Over how many decode steps a prompt of so many tokens, which takes `compute_s` by itself, is spread."""
        most = self.limits.chunk_tokens
        room_s = max(0.0, self.limits.beside_s(self.step_s()))
        if compute_s > room_s:
            most = min(most, max(LEAST_CHUNK, int(tokens * room_s / compute_s)))
        return math.ceil(tokens / most)

    def _share(self, running: int) -> float:
        """Of so many sequences, how many have a place in a step."""
        return min(1.0, self.limits.batch / max(1, running))

    def _hold(self, kv_tokens: int, committed_tokens: int) -> None:
        self.kv_tokens += kv_tokens
        self.committed_tokens += committed_tokens
        self.memory.committed_tokens += committed_tokens
