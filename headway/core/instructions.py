"""What a store asks its service to send, because of an operation of somebody else."""

from __future__ import annotations

from dataclasses import dataclass

from headway.core.leases import Granted, Result


@dataclass(frozen=True, slots=True)
class Reply:
    """The result of an operation that had to wait."""

    session: str
    operation_id: int
    result: Result


@dataclass(frozen=True, slots=True)
class Reclaim:
    """Ask the session to stop using the lease and to release it."""

    session: str
    lease_id: int


@dataclass(frozen=True, slots=True)
class Offer:
    """Tell the session that it holds the lease now, by handoff; `request` is (sequence id, attempt)."""

    session: str
    request: tuple[str, int]
    granted: Granted


@dataclass(frozen=True, slots=True)
class StartPull:
    """Fetch what this lease lacks from another node; the pull holds the lease (as PULL) until it is released."""

    lease_id: int


@dataclass(frozen=True, slots=True)
class StopPull:
    """Nobody needs what is being fetched for this lease: stop writing to its slots, then release it."""

    lease_id: int


@dataclass(frozen=True, slots=True)
class Filled:
    """A lease whose decode worker is on another node has more sealed blocks."""

    request: tuple[str, int]
    lease_id: int


Instruction = Reply | Reclaim | Offer | StartPull | StopPull | Filled
