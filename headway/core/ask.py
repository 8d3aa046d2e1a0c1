"""What is to be placed, and what placement answers."""

from __future__ import annotations

import enum
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from headway.core.order import Key


class Why(enum.Enum):
    """Kinds of refusal: not there; or there but not for this request; too busy for now; too late for its objective; too
    small for ever.
    """

    AWAY = "away"
    UNFIT = "unfit"
    BUSY = "busy"
    LATE = "late"
    SMALL = "small"


class Refusal(NamedTuple):
    """`retry_s`: when it is worth trying again; 0 where waiting does not help."""

    why: Why
    sentence: str
    retry_s: float = 0.0


class Promised(NamedTuple):
    """So many leading tokens of a prompt will be there at `ready_s`, when the prompt `name` is computed."""

    tokens: int
    ready_s: float
    name: Hashable = None


NO_PROMISE = Promised(0, 0.0)


@dataclass(frozen=True, slots=True)
class Ask:
    """A request to place.

    `keys`: the prompt's block keys. `resident`: node → leading tokens of the prompt that it holds; `promised`: worker →
    what it will have computed of it for others. `expected_tokens`: of the answer. Hints name workers;
    `excluded` ones are avoided. `arrival_s` is of a clock that all routers share, `objective_s` (when the first token
    is due; None: whenever it comes) of placement's own.
    """

    prompt_tokens: int
    keys: Sequence[bytes] = ()
    arrival_s: float = 0.0
    expected_tokens: int = 0
    resident: Mapping[str, int] = field(default_factory=dict)
    promised: Mapping[str, Promised] = field(default_factory=dict)
    priority: int = 0
    tenant: str = ""
    objective_s: float | None = None
    prefill_worker: str = ""
    decode_worker: str = ""
    force_apart: bool = False
    excluded: frozenset[str] = frozenset()

    @property
    def hinted(self) -> bool:
        """Whether it names a worker."""
        return bool(self.prefill_worker or self.decode_worker)

    def known(self) -> Mapping[str, int]:
        """node → leading tokens that need not be computed there: those that it has, all but one at most."""
        most = self.prompt_tokens - 1
        if max(self.resident.values(), default=0) > most:
            return {node: min(tokens, most) for node, tokens in self.resident.items()}
        return self.resident

    def own_tokens(self, worker_id: str, node: str) -> int:
        """That need not be computed at this worker: its node has them, or it will have."""
        promised = self.promised.get(worker_id, NO_PROMISE)
        return min(max(self.resident.get(node, 0), promised.tokens), self.prompt_tokens - 1)

    def awaits(self, worker_id: str, node: str, tokens: int) -> Promised:
        """What has to come before so many leading tokens are there; nothing where they are now."""
        return self.promised.get(worker_id, NO_PROMISE) if tokens > self.resident.get(node, 0) else NO_PROMISE


class Option(NamedTuple):
    """A placement with its predicted seconds. `prefill_worker` is None where the decode worker prefills by itself.

    `overlap_tokens` need not be computed; those that the node lacks are fetched from `pull_from` while the prompt
    queues. `delay_s`: what it costs those that it goes before, in all. `cost_s` is what placement minimises. `refused`
    is None where it can be taken.
    """

    prefill_worker: str | None
    decode_worker: str
    overlap_tokens: int = 0
    key: Key = (0, 0.0)
    wait_s: float = 0.0
    compute_s: float = 0.0
    pull_from: str | None = None
    pull_s: float = 0.0
    delay_s: float = 0.0
    cost_s: float = 0.0
    refused: Refusal | None = None

    @property
    def worker(self) -> str:
        """Who computes the prompt."""
        return self.prefill_worker or self.decode_worker

    @property
    def ttft_s(self) -> float:
        """Predicted seconds to the first token."""
        return max(self.wait_s, self.pull_s) + self.compute_s
