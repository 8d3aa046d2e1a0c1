"""A lease: the slots that one request uses, who holds them, and what of them is sealed."""

from __future__ import annotations

import enum
from dataclasses import dataclass, field

from headway.core.blocks import Block

# The session of the store itself, while it writes fetched blocks into a lease's slots.
PULL = "pull"
# A joiner with this prefix is not a worker of this node but the kvstore of the node that it names.
REMOTE = "@"


class Problem(enum.Enum):
    """Why an operation was refused."""

    NO_SLOTS = "no slots in time"
    TOO_LARGE = "can never fit"
    RECLAIMED = "the slots are needed by older requests"
    CANCELLED = "cancelled by its worker"
    INVALID = "makes no sense"
    UNKNOWN = "no such lease"
    NOT_YOURS = "not a holder of this lease"
    BROKEN_CHAIN = "not the next blocks of the chain"


@dataclass(frozen=True, slots=True)
class Refused:
    """A refusal, in a sentence that says what to change."""

    problem: Problem
    message: str

    @property
    def retryable(self) -> bool:
        return self.problem not in (Problem.TOO_LARGE, Problem.BROKEN_CHAIN, Problem.INVALID)


@dataclass(frozen=True, slots=True)
class Granted:
    """The block table (one slot a block, reserve included) and the leading tokens that are in the slab.

    `pulling`: blocks are being fetched into the slots, which the holder leaves alone until it hears of the end of it.
    """

    lease_id: int
    slots: list[int]
    cached_tokens: int
    pulling: bool = False


@dataclass(frozen=True, slots=True)
class Changed:
    """(block, slot): the block now lies in that slot. `cached_tokens` as in Granted."""

    changes: list[tuple[int, int]]
    cached_tokens: int


@dataclass(frozen=True, slots=True)
class Added:
    slots: list[int]


@dataclass(frozen=True, slots=True)
class Done:
    pass


@dataclass(frozen=True, slots=True)
class Source:
    """Where a lease's missing blocks come from: tiers below the slab, then the kvstore at `address` ("": no other).

    `blocks` leading blocks that it is believed to have; or `follow`: all of this request's prefill there, as it is
    computed, its partial last block included. `prefill_token_s`: seconds to compute a token instead; 0: not known.
    """

    address: str
    blocks: int = 0
    follow: bool = False
    prefill_token_s: float = 0.0


Result = Granted | Changed | Added | Done | Refused


@dataclass(slots=True, eq=False)
class Lease:
    """slots: [ sealed: cached blocks, shared | own: written by the holder, nobody else's ]

    holders: sessions of live workers. suspended: sessions that may still read and write but cannot be asked; while
    nobody else holds the lease its own slots are quarantined, and its blocks stay. losers: slots of duplicate seals, by
    the session that may still use them until its next operation; by "" when several may, until the lease ends.
    """

    lease_id: int
    owner: str
    joiner: str
    keys: list[bytes]
    tokens: int
    arrival_s: float
    slots: list[int]
    blocks: list[Block]
    request: tuple[str, int] = ("", 0)
    holders: set[str] = field(default_factory=set)
    suspended: set[str] = field(default_factory=set)
    losers: dict[str, list[int]] = field(default_factory=dict)
    # Until when a lease without holder waits for its joiner; None when it does not.
    held_until_s: float | None = None
    reclaiming: bool = False
    # What is fetched into its own slots; until then its holders leave them alone. None when nothing is (any more).
    source: Source | None = None

    @property
    def remote(self) -> bool:
        """Decode goes on at another node."""
        return self.joiner.startswith(REMOTE)

    @property
    def age(self) -> tuple[float, int]:
        """Smaller is older."""
        return (self.arrival_s, self.lease_id)

    @property
    def own(self) -> list[int]:
        """Slots of blocks that are not sealed."""
        return self.slots[len(self.blocks) :]

    @property
    def private_slots(self) -> int:
        """Own slots and losers of duplicate seals: all that no block of the cache lies in."""
        return len(self.own) + sum(len(losers) for losers in self.losers.values())

    @property
    def live(self) -> bool:
        """Somebody uses it, or is about to."""
        return bool(self.holders) or self.held_until_s is not None
