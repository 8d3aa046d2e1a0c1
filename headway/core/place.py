"""Where a request runs: filter → score → pick, by predicted seconds to its first token.

An option is a prefill worker with a decode worker of its node, or a decode worker that prefills by itself.
"""

from __future__ import annotations

import enum
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from headway.core.predict import Predictor


class Role(enum.Enum):
    PREFILL = "prefill"
    DECODE = "decode"
    MIXED = "mixed"


class Why(enum.Enum):
    """Kinds of refusal: not there, or there but not for this request, now full, or too small for ever."""

    AWAY = "away"
    UNFIT = "unfit"
    BUSY = "busy"
    SMALL = "small"


class Refusal(NamedTuple):
    why: Why
    sentence: str


@dataclass(slots=True)
class WorkerLoad:
    """A worker as its last status described it, corrected by what this router sent it and got back since then.

    `queued_*`: prompts not yet computed; `running`, `kv_tokens`: sequences that decode, and the context they hold.
    """

    worker_id: str
    node: str
    role: Role
    max_batch: int = 64
    ready: bool = False
    draining: bool = False
    queued_sequences: int = 0
    queued_tokens: int = 0
    running: int = 0
    kv_tokens: int = 0
    free_slots: int = 0
    total_slots: int = 0
    predictor: Predictor = field(default_factory=Predictor)
    # Sequences ever sent there: among equals, the one that got least.
    sent: int = 0

    @property
    def wait_s(self) -> float:
        return self.predictor.queue_s(self.queued_sequences, max(0, self.queued_tokens))

    @property
    def step_s(self) -> float:
        """Of the batch with one more sequence."""
        return self.predictor.step_s(max(0, self.running) + 1, max(0, self.kv_tokens))


@dataclass(frozen=True, slots=True)
class Ask:
    """What is to be placed. `overlap`: node → tokens of the prompt that it is believed to hold.

    `max_tokens` is prompt plus the longest answer. Hints name workers; `excluded` ones are avoided.
    """

    prompt_tokens: int
    max_tokens: int
    block_size: int
    overlap: Mapping[str, int]
    local_prefill_tokens: int
    max_queued: int
    prefill_worker: str = ""
    decode_worker: str = ""
    force_apart: bool = False
    excluded: frozenset[str] = frozenset()

    @property
    def slots(self) -> int:
        """That the longest answer takes."""
        return -(-self.max_tokens // self.block_size)

    @property
    def least_slots(self) -> int:
        """Without which not even one token can be drawn."""
        return self.prompt_tokens // self.block_size + 1


@dataclass(frozen=True, slots=True)
class Option:
    """`prefill_worker` is None where the decode worker prefills by itself; `refused` is None where it can."""

    prefill_worker: str | None
    decode_worker: str
    overlap_tokens: int = 0
    wait_s: float = 0.0
    compute_s: float = 0.0
    refused: Refusal | None = None

    @property
    def cost_s(self) -> float:
        """Predicted seconds to the first token."""
        return self.wait_s + self.compute_s


_Key = tuple[bool, float, bool, int, int]


def place(ask: Ask, workers: Sequence[WorkerLoad]) -> list[Option]:
    """Every option, best first, refused ones last. ValueError (a sentence) when a hint cannot be followed."""
    _check_hints(ask, workers)
    prefills = [worker for worker in workers if worker.role is Role.PREFILL]
    decodes = [worker for worker in workers if worker.role is not Role.PREFILL]
    alone = all(_away(ask, worker) for worker in prefills)
    scored: list[tuple[_Key, Option]] = []
    for prefill in prefills:
        if ask.prefill_worker in ("", prefill.worker_id):
            scored.append(_apart(ask, prefill, decodes))
    for decode in decodes:
        if not ask.prefill_worker and ask.decode_worker in ("", decode.worker_id):
            scored.append(_by_itself(ask, decode, alone=alone))
    scored.sort(key=lambda item: item[0])
    return [option for _, option in scored]


def _check_hints(ask: Ask, workers: Sequence[WorkerLoad]) -> None:
    hints = (
        ("prefill_worker", ask.prefill_worker, (Role.PREFILL,)),
        ("decode_worker", ask.decode_worker, (Role.DECODE, Role.MIXED)),
    )
    nodes = set()
    for name, hint, roles in hints:
        if not hint:
            continue
        fitting = {worker.worker_id: worker.node for worker in workers if worker.role in roles}
        if hint not in fitting:
            known = ", ".join(sorted(fitting)) or "none"
            raise ValueError(f"placement.{name} is {hint!r}, which this fleet does not have; it has {known}")
        nodes.add(fitting[hint])
    if len(nodes) > 1:
        raise ValueError("placement names workers of different nodes; name a prefill and a decode worker of one node")


def _apart(ask: Ask, prefill: WorkerLoad, decodes: Iterable[WorkerLoad]) -> tuple[_Key, Option]:
    """Prefill here, decode at the least loaded worker of the node."""
    overlap = min(ask.overlap.get(prefill.node, 0), ask.prompt_tokens - 1)
    partners = [worker for worker in decodes if worker.node == prefill.node]
    usable = [worker for worker in partners if not _decode_refused(ask, worker)]
    # A mixed worker prefills all by itself; it joins others' leases only where nobody else can.
    usable = [worker for worker in usable if worker.role is Role.DECODE] or usable
    refused = _refused(ask, prefill)
    if not refused and not usable:
        refused = _no_partner(ask, partners)
    decode = min(usable, key=_decode_key).worker_id if usable else ask.decode_worker
    compute_s = prefill.predictor.prefill_s(ask.prompt_tokens - overlap, overlap)
    option = Option(prefill.worker_id, decode, overlap, prefill.wait_s, compute_s, refused)
    return _key(ask, prefill, option), option


def _no_partner(ask: Ask, partners: Iterable[WorkerLoad]) -> Refusal:
    reasons = [(worker.worker_id, refusal) for worker in partners if (refusal := _decode_refused(ask, worker))]
    if not reasons:
        return Refusal(Why.AWAY, "no decode worker is on its node")
    kinds = {refusal.why for _, refusal in reasons}
    sentences = "; ".join(f"{worker_id}: {refusal.sentence}" for worker_id, refusal in reasons)
    return Refusal(min(kinds, key=list(Why).index), f"no decode worker on its node can take it ({sentences})")


def _by_itself(ask: Ask, decode: WorkerLoad, *, alone: bool) -> tuple[_Key, Option]:
    """The decode worker computes what is missing; each of its chunks shares a step with the running batch."""
    overlap = min(ask.overlap.get(decode.node, 0), ask.prompt_tokens - 1)
    missing = ask.prompt_tokens - overlap
    refused = _refused(ask, decode)
    if not refused and ask.force_apart:
        refused = Refusal(Why.UNFIT, "the request forces prefill and decode apart")
    elif not refused and decode.role is Role.DECODE and not alone and missing > ask.local_prefill_tokens:
        sentence = f"{missing} tokens are left to compute, and it computes at most {ask.local_prefill_tokens} itself"
        refused = Refusal(Why.UNFIT, sentence)
    step_s = decode.step_s if decode.running > 0 else 0.0
    compute_s = decode.predictor.prefill_s(missing, overlap) + step_s
    option = Option(None, decode.worker_id, overlap, decode.wait_s, compute_s, refused)
    return _key(ask, decode, option), option


def _away(ask: Ask, worker: WorkerLoad) -> Refusal | None:
    """Why this worker is not there for the request at all; None when it is."""
    if not worker.ready:
        return Refusal(Why.AWAY, "not ready")
    if worker.draining:
        return Refusal(Why.AWAY, "draining")
    if worker.worker_id in ask.excluded:
        return Refusal(Why.AWAY, "failed this request before")
    return None


def _refused(ask: Ask, worker: WorkerLoad) -> Refusal | None:
    """Why this worker cannot take the request now; None when it can."""
    if away := _away(ask, worker):
        return away
    if worker.total_slots < ask.least_slots:
        sentence = f"the prompt needs {ask.least_slots} slots, its node has {worker.total_slots}"
        return Refusal(Why.SMALL, sentence)
    if worker.queued_sequences >= ask.max_queued:
        return Refusal(Why.BUSY, f"its queue is full ({worker.queued_sequences} waiting)")
    return None


def _decode_refused(ask: Ask, worker: WorkerLoad) -> Refusal | None:
    if ask.decode_worker not in ("", worker.worker_id):
        return Refusal(Why.UNFIT, "the request names another")
    return _refused(ask, worker)


def _decode_key(worker: WorkerLoad) -> tuple[bool, float, int, int]:
    """A full batch last, then the shortest predicted step, then who has least."""
    return (worker.running >= worker.max_batch, worker.step_s, worker.running + worker.queued_sequences, worker.sent)


def _key(ask: Ask, worker: WorkerLoad, option: Option) -> _Key:
    """Free slots only break ties: cached blocks are not free, yet make room when asked."""
    short = worker.free_slots < ask.slots - option.overlap_tokens // ask.block_size
    return (bool(option.refused), option.cost_s, short, worker.queued_tokens, worker.sent)
