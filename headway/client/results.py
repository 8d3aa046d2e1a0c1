"""What comes back, as frozen dataclasses. Times are in seconds, sizes in bytes, the rest counts tokens."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Token:
    """`index` 0 is the first token of the answer; log probabilities only when asked for, most likely first."""

    token_id: int
    index: int
    logprob: float | None
    top_logprobs: tuple[tuple[int, float], ...]


@dataclass(frozen=True, slots=True)
class Started:
    choice: int
    request_id: str
    prompt_tokens: int
    model: str


@dataclass(frozen=True, slots=True)
class TextDelta:
    """Text that is final, and the tokens since the last delta; a character of several tokens comes with the last."""

    choice: int
    text: str
    tokens: tuple[Token, ...]


@dataclass(frozen=True, slots=True)
class Usage:
    prompt_tokens: int
    cached_tokens: int
    computed_tokens: int
    output_tokens: int
    handoff_bytes: int
    working_copy_bytes: int
    drafted_tokens: int
    accepted_tokens: int


@dataclass(frozen=True, slots=True)
class Timings:
    """`queue_s` and `prefill_s` at the prefilling worker, `handoff_s` at the decoding one, the rest at the router.

    `prefilled_at_s` and `joined_at_s` are instants of the host's monotonic clock: first token drawn, sequence may step.
    """

    queue_s: float
    prefill_s: float
    handoff_s: float
    ttft_s: float
    total_s: float
    route_s: float
    prefilled_at_s: float
    joined_at_s: float


@dataclass(frozen=True, slots=True)
class Finished:
    """`reason` is "stop" or "length"; `stop_string` and `stop_token_id` say which one ended it."""

    choice: int
    reason: str
    usage: Usage
    timings: Timings
    prefill_worker: str
    decode_worker: str
    replays: int
    stop_string: str
    stop_token_id: int | None


Event = Started | TextDelta | Finished


@dataclass(frozen=True, slots=True)
class Choice:
    text: str
    tokens: tuple[Token, ...]
    finished: Finished

    @property
    def token_ids(self) -> list[int]:
        return [token.token_id for token in self.tokens]


@dataclass(frozen=True, slots=True)
class Answer:
    """A whole answer; `text`, `token_ids` and `finished` are those of the first choice."""

    request_id: str
    model: str
    prompt_tokens: int
    choices: tuple[Choice, ...]

    @property
    def text(self) -> str:
        return self.choices[0].text

    @property
    def token_ids(self) -> list[int]:
        return self.choices[0].token_ids

    @property
    def finished(self) -> Finished:
        return self.choices[0].finished

    @classmethod
    def of(cls, events: Iterable[Event]) -> Answer:
        """Joins a complete stream of events. Raises ValueError when a choice never finished."""
        started: Started | None = None
        texts: defaultdict[int, list[str]] = defaultdict(list)
        tokens: defaultdict[int, list[Token]] = defaultdict(list)
        finished: dict[int, Finished] = {}
        for event in events:
            if isinstance(event, Started):
                started = started or event
            elif isinstance(event, TextDelta):
                texts[event.choice].append(event.text)
                tokens[event.choice].extend(event.tokens)
            else:
                finished[event.choice] = event
        if started is None or not finished or not texts.keys() <= finished.keys():
            raise ValueError("the stream ended before the answer was finished")
        choices = tuple(Choice("".join(texts[c]), tuple(tokens[c]), finished[c]) for c in sorted(finished))
        return cls(started.request_id, started.model, started.prompt_tokens, choices)


@dataclass(frozen=True, slots=True)
class Placement:
    """One way to serve a prompt, in predicted seconds; `refused` says why it was filtered out.

    `pull_s`: until what `pull_from` (a kvstore) gives is there. `delay_s`: put on those already there. `cost_s`: what
    is minimised.
    """

    prefill_worker: str
    decode_worker: str
    overlap_tokens: int
    wait_s: float
    compute_s: float
    cost_s: float
    refused: str
    pull_from: str = ""
    pull_s: float = 0.0
    delay_s: float = 0.0


@dataclass(frozen=True, slots=True)
class Explanation:
    """Every option that was weighed, the picked one first."""

    prompt_tokens: int
    options: tuple[Placement, ...]


@dataclass(frozen=True, slots=True)
class Worker:
    """`role` is "prefill", "decode" or "mixed"; `age_s` counts from the last status.

    `prefill_error`, `step_error`: mean of |predicted − taken| / taken of its forwards, lately; `queue_s`: predicted
    seconds until all prompts that are there now are computed.
    """

    worker_id: str
    node_id: str
    role: str
    address: str
    pid: int
    ready: bool
    age_s: float
    waiting_sequences: int
    running_sequences: int
    waiting_tokens: int
    kv_tokens: int
    free_slots: int
    total_slots: int
    prefill_error: float = 0.0
    step_error: float = 0.0
    queue_s: float = 0.0


@dataclass(frozen=True, slots=True)
class Link:
    """Another node that a kvstore reads from. `plane` is empty while they are not connected."""

    node_id: str
    plane: str
    bytes: int
    bytes_per_s: float
    fallbacks: int


@dataclass(frozen=True, slots=True)
class ExpectedLink:
    """What the router expects of pulls from one kvstore (its address) to another: `bytes_per_s` (0 until measured),
    mean `error` |predicted − taken| / taken lately, and seconds until what is on its way is there.
    """

    source: str
    destination: str
    bytes_per_s: float
    error: float
    backlog_s: float


@dataclass(frozen=True, slots=True)
class Tier:
    """Below a kvstore's slab: "host", "disk" or "remote".

    `hits`: blocks read; `read_block_s`: seconds a block took lately.
    """

    name: str
    blocks: int
    hits: int
    bytes_written: int
    bytes_read: int
    read_block_s: float


@dataclass(frozen=True, slots=True)
class Store:
    """A kvstore as the router's index sees it, and what it says of its links and tiers."""

    node_id: str
    address: str
    indexed_blocks: int
    last_sequence_number: int
    watching: bool
    links: tuple[Link, ...] = ()
    tiers: tuple[Tier, ...] = ()


@dataclass(frozen=True, slots=True)
class FleetView:
    """`model` is empty while no worker has announced itself; `block_size` is tokens a block."""

    workers: tuple[Worker, ...]
    stores: tuple[Store, ...]
    model: str
    context_tokens: int
    block_size: int
    requests_in_flight: int
    expected_links: tuple[ExpectedLink, ...] = ()
