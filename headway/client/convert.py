"""From proto messages to results."""

from __future__ import annotations

from collections.abc import Iterator

from headway.client.results import (
    Event,
    ExpectedLink,
    Explanation,
    Finished,
    FleetView,
    Link,
    Placement,
    Started,
    Store,
    TextDelta,
    Tier,
    Timings,
    Token,
    Usage,
    Worker,
)
from headway.v1 import common_pb2, router_pb2


def events_from_proto(response: router_pb2.GenerateResponse) -> Iterator[Event]:
    """All that one message says, in order."""
    if response.HasField("started"):
        started = response.started
        yield Started(response.choice, started.request_id, started.prompt_tokens, started.model)
    if response.HasField("delta"):
        yield TextDelta(response.choice, response.delta.text, tuple(map(_token, response.delta.tokens)))
    if response.HasField("finished"):
        yield _finished(response.choice, response.finished)


def explanation_from_proto(response: router_pb2.ExplainResponse) -> Explanation:
    options = tuple(
        Placement(
            o.prefill_worker,
            o.decode_worker,
            o.overlap_tokens,
            o.wait_s,
            o.compute_s,
            o.cost_s,
            o.refused,
            o.pull_from,
            o.pull_s,
            o.delay_s,
        )
        for o in response.options
    )
    return Explanation(response.prompt_tokens, options)


def fleet_from_proto(response: router_pb2.FleetResponse) -> FleetView:
    model = response.model
    return FleetView(
        workers=tuple(map(_worker, response.workers)),
        stores=tuple(map(_store, response.stores)),
        model=model.name,
        context_tokens=model.context_tokens,
        block_size=model.kv_format.block_size,
        requests_in_flight=response.requests_in_flight,
        expected_links=tuple(
            ExpectedLink(link.source, link.destination, link.bytes_per_s, link.error, link.backlog_s)
            for link in response.links
        ),
    )


def _store(store: router_pb2.StoreView) -> Store:
    links = (
        Link(p.node_id or p.address, p.plane, p.bytes, p.bytes / p.busy_s if p.busy_s else 0.0, p.fallbacks)
        for p in store.peers
    )
    tiers = (Tier(t.name, t.blocks, t.hits, t.bytes_written, t.bytes_read, t.read_block_s) for t in store.tiers)
    return Store(
        store.node_id,
        store.address,
        store.indexed_blocks,
        store.last_sequence_number,
        store.watching,
        tuple(links),
        tuple(tiers),
    )


def _token(token: common_pb2.Token) -> Token:
    logprob = token.logprob if token.HasField("logprob") else None
    top = tuple((entry.token_id, entry.logprob) for entry in token.top_logprobs)
    return Token(token.token_id, token.output_index, logprob, top)


def _finished(choice: int, finished: router_pb2.Finished) -> Finished:
    u, t = finished.usage, finished.timings
    return Finished(
        choice=choice,
        reason=_short(common_pb2.FinishReason.Name(finished.reason), "FINISH_REASON_"),
        usage=Usage(
            u.prompt_tokens,
            u.cached_tokens,
            u.computed_tokens,
            u.output_tokens,
            u.handoff_bytes,
            u.working_copy_bytes,
            u.drafted_tokens,
            u.accepted_tokens,
        ),
        timings=Timings(
            t.queue_s, t.prefill_s, t.handoff_s, t.ttft_s, t.total_s, t.route_s, t.prefilled_at_s, t.joined_at_s
        ),
        prefill_worker=finished.prefill_worker,
        decode_worker=finished.decode_worker,
        replays=finished.replays,
        stop_string=finished.stop_string,
        stop_token_id=finished.stop_token_id if finished.HasField("stop_token_id") else None,
    )


def _worker(worker: router_pb2.WorkerView) -> Worker:
    status = worker.status
    return Worker(
        worker_id=worker.worker_id,
        node_id=worker.node_id,
        role=_short(common_pb2.WorkerRole.Name(worker.role), "WORKER_ROLE_"),
        address=worker.address,
        pid=worker.pid,
        ready=status.ready,
        age_s=worker.age_s,
        waiting_sequences=status.waiting_sequences,
        running_sequences=status.running_sequences,
        waiting_tokens=status.waiting_tokens,
        kv_tokens=status.kv_tokens,
        free_slots=status.free_slots,
        total_slots=status.total_slots,
        prefill_error=status.prefill_error,
        step_error=status.step_error,
        queue_s=worker.queue_s,
    )


def _short(name: str, prefix: str) -> str:
    return name.removeprefix(prefix).lower()
