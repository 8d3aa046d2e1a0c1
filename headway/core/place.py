"""Where a request runs: filter → score → pick, by predicted seconds to its first token.

An option is a prefill worker with a decode worker, or a decode worker that prefills by itself; either may first fetch
a prefix that another node has. A decode worker on another node than prefill gets its cache through the nodes' kvstores.
"""

from __future__ import annotations

import enum
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
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
    pull_latency_s: float = 0.0
    # Between nodes, for the KV of one token.
    pull_token_s: float = 0.0

    def pull_s(self, tokens: int) -> float:
        """To fetch the KV of `tokens` tokens from another node."""
        return self.pull_latency_s + tokens * self.pull_token_s if tokens > 0 else 0.0

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
    # The node that part of `overlap_tokens` is fetched from, while the prompt queues.
    pull_from: str | None = None
    pull_s: float = 0.0

    @property
    def cost_s(self) -> float:
        """Predicted seconds to the first token."""
        return max(self.wait_s, self.pull_s) + self.compute_s


# Of a handoff between nodes, on its way when prefill ends (the last chunk); and tokens of an answer by which decode
# workers are compared.
LATE_TOKENS = 512
START_TOKENS = 64

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
    for name, hint, roles in hints:
        fitting = sorted(worker.worker_id for worker in workers if worker.role in roles)
        if hint and hint not in fitting:
            known = ", ".join(fitting) or "none"
            raise ValueError(f"placement.{name} is {hint!r}, which this fleet does not have; it has {known}")


def _apart(ask: Ask, prefill: WorkerLoad, decodes: Sequence[WorkerLoad]) -> tuple[_Key, Option]:
    """Prefill here, decode where the answer's start is soonest."""
    usable = [worker for worker in decodes if not _decode_refused(ask, worker)]
    # A mixed worker prefills all by itself; it joins others' leases only where nobody else can.
    usable = [worker for worker in usable if worker.role is Role.DECODE] or usable
    refused = _refused(ask, prefill)
    if not refused and not usable:
        refused = _no_partner(ask, decodes)
    here = prefill.node
    decode = min(usable, key=lambda worker: _decode_key(ask, worker, here)).worker_id if usable else ask.decode_worker
    option = _best_prefix(ask, prefill, Option(prefill.worker_id, decode, refused=refused))
    return _key(ask, prefill, option), option


def _best_prefix(ask: Ask, worker: WorkerLoad, option: Option) -> Option:
    """With times: with what this node has of the prefix, or with what it can fetch, whichever is sooner."""

    def timed(overlap: int, pull_from: str | None, pull_s: float) -> Option:
        compute_s = worker.predictor.prefill_s(ask.prompt_tokens - overlap, overlap)
        return replace(
            option,
            overlap_tokens=overlap,
            wait_s=worker.wait_s,
            compute_s=compute_s,
            pull_from=pull_from,
            pull_s=pull_s,
        )

    def usable(tokens: int) -> int:
        return min(tokens, ask.prompt_tokens - 1)

    own = usable(ask.overlap.get(worker.node, 0))
    options = [timed(own, None, 0.0)]
    others = [(usable(tokens), node) for node, tokens in ask.overlap.items() if node != worker.node]
    tokens, node = max(others, default=(0, ""))
    if tokens > own:
        options.append(timed(tokens, node, ask.pull_s(tokens - own)))
    return min(options, key=lambda timed: timed.cost_s)


def _no_partner(ask: Ask, partners: Iterable[WorkerLoad]) -> Refusal:
    reasons = [(worker.worker_id, refusal) for worker in partners if (refusal := _decode_refused(ask, worker))]
    if not reasons:
        return Refusal(Why.AWAY, "there is no decode worker")
    kinds = {refusal.why for _, refusal in reasons}
    sentences = "; ".join(f"{worker_id}: {refusal.sentence}" for worker_id, refusal in reasons)
    return Refusal(min(kinds, key=list(Why).index), f"no decode worker can take it ({sentences})")


def _by_itself(ask: Ask, decode: WorkerLoad, *, alone: bool) -> tuple[_Key, Option]:
    """The decode worker computes what is missing; each of its chunks shares a step with the running batch."""
    option = _best_prefix(ask, decode, Option(None, decode.worker_id))
    missing = ask.prompt_tokens - option.overlap_tokens
    refused = _refused(ask, decode)
    if not refused and ask.force_apart:
        refused = Refusal(Why.UNFIT, "the request forces prefill and decode apart")
    elif not refused and decode.role is Role.DECODE and not alone and missing > ask.local_prefill_tokens:
        sentence = f"{missing} tokens are left to compute, and it computes at most {ask.local_prefill_tokens} itself"
        refused = Refusal(Why.UNFIT, sentence)
    step_s = decode.step_s if decode.running > 0 else 0.0
    option = replace(option, compute_s=option.compute_s + step_s, refused=refused)
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


def _decode_key(ask: Ask, worker: WorkerLoad, prefill_node: str) -> tuple[bool, float, int, int]:
    """A full batch last, then the sooner its first tokens are drawn, then who has least.

    The handoff to another node moves the prompt's KV while it is computed; what is still on its way at the end counts.
    """
    handoff_s = 0.0 if worker.node == prefill_node else ask.pull_s(min(ask.prompt_tokens, LATE_TOKENS))
    start_s = handoff_s + worker.step_s * min(START_TOKENS, max(1, ask.max_tokens - ask.prompt_tokens))
    return (worker.running >= worker.max_batch, start_s, worker.running + worker.queued_sequences, worker.sent)


def _key(ask: Ask, worker: WorkerLoad, option: Option) -> _Key:
    """Free slots only break ties: cached blocks are not free, yet make room when asked."""
    short = worker.free_slots < ask.slots - option.overlap_tokens // ask.block_size
    return (bool(option.refused), option.cost_s, short, worker.queued_tokens, worker.sent)
