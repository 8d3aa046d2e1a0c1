"""A sequence at work here: the core's sequence with its lease, its block table and who hears of it."""

from __future__ import annotations

import asyncio
import enum
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np
import numpy.typing as npt

from headway.core.drafts import Lookup
from headway.core.sequence import Finish, Sequence
from headway.engine.contract import Draw, Drawn, Matcher
from headway.v1 import common_pb2, kvstore_pb2


class Phase(enum.Enum):
    """Waiting for a lease, able to run, waiting for the refresh of its lease, or over."""

    ACQUIRING = "acquiring"
    READY = "ready"
    REFRESHING = "refreshing"
    ENDED = "ended"


class Interrupt(enum.Enum):
    """What must happen to a sequence as soon as no forward uses its slots."""

    CANCEL = "cancel"
    RECLAIM = "reclaim"


class Sink(Protocol):
    """Who hears of a sequence's tokens and its failure; called on the event loop. `router_id`: on whose behalf."""

    @property
    def router_id(self) -> str: ...

    def drawn(self, active: Active, drawn: Drawn, output_index: int, finish: Finish | None) -> None: ...

    def failed(self, active: Active, failure: common_pb2.Failure) -> None: ...


@dataclass(slots=True, eq=False)
class Active:
    """joiner: the decode worker (or, with a leading "@", the node) that goes on with the lease; empty: the sequence
    stays here until its end.

    pull: what its kvstore fetches from another node before anything is computed here.
    """

    sequence: Sequence
    sink: Sink
    received_s: float
    joiner: str = ""
    # Came by handoff: its prompt was computed elsewhere.
    joined: bool = False
    pull: kvstore_pb2.PullBlocks | None = None
    pulled_bytes: int = 0
    # Its prompt is being computed on another node: nothing runs here before the router's Begin brings the first token.
    expecting: bool = False
    # Of a constrained sequence, which may not run before it has it.
    matcher: Matcher | None = None
    expiry: asyncio.TimerHandle | None = None
    phase: Phase = Phase.ACQUIRING
    lease_id: int = 0
    slots: npt.NDArray[np.int32] = field(default_factory=lambda: np.zeros(0, np.int32))
    # A forward uses the block table right now: neither change it nor give it up.
    stepping: bool = False
    interrupt: Interrupt | None = None
    # The reply to a seal or an extension is outstanding.
    replies_due: int = 0
    deferred: list[kvstore_pb2.SlotChange] = field(default_factory=list)
    started_s: float = 0.0
    ready_s: float = 0.0
    first_token_s: float = 0.0
    # Its last one, counted over all sequences from 1.
    turn: int = 0
    # Was passed over by a plan: a sibling may have sealed its prefix meanwhile.
    passed_over: bool = False
    # Predicts its tokens, where the worker drafts.
    lookup: Lookup | None = None
    # Its first message (with timings and cache figures) was sent.
    announced: bool = False

    @property
    def capacity(self) -> int:
        """Tokens that the block table has room for."""
        return len(self.slots) * self.sequence.block_size

    @property
    def holds(self) -> bool:
        """Whether it has its lease, and nothing is on its way into the slots."""
        return self.phase in (Phase.READY, Phase.REFRESHING)

    @property
    def runnable(self) -> bool:
        ready = self.phase is Phase.READY and not self.stepping and not self.expecting
        ready = ready and (self.matcher is not None or self.sequence.sampling.constraint is None)
        return ready and len(self.sequence.tokens) <= self.capacity

    def change_slots(self, changes: list[kvstore_pb2.SlotChange]) -> None:
        """Apply now, or after the forward that is using the table."""
        if self.stepping:
            self.deferred += changes
            return
        for change in changes:
            self.slots[change.block] = change.slot

    def draw(self) -> Draw:
        """How the token after all present ones is drawn."""
        sequence = self.sequence
        return Draw(
            sampling=sequence.sampling,
            output_index=sequence.output_index,
            choice=sequence.choice,
            context=sequence.tokens if sequence.sampling.uses_context else (),
            prompt_tokens=sequence.prompt_tokens,
            top_logprobs=sequence.top_logprobs,
            matcher=self.matcher,
        )
