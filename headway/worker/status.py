"""What a worker says of itself to a router."""

from __future__ import annotations

from collections.abc import Iterable
from heapq import nlargest, nsmallest
from operator import itemgetter

from headway.core.sequence import Sequence
from headway.core.step import prompt_key
from headway.v1 import router_pb2
from headway.worker.active import Active
from headway.worker.loop import EngineLoop

# Named one by one; a router that has to wait for more than these knows enough.
MOST_PROMPTS = 64
# Those with the largest debts, which matter most.
MOST_TENANTS = 64


def worker_status(loop: EngineLoop, router_id: str) -> router_pb2.WorkerStatus:
    """`router_id`: who hears it; what it has here itself is not counted among the others' sequences."""
    actives = loop.actives
    running = [active for active in actives if active.sequence.decoding]
    # A handoff that arrives is no prompt; a joined sequence that has to be computed here again is one.
    arriving = [active for active in actives if active.expecting or (active.joined and not active.holds)]
    waiting = [active for active in actives if not active.sequence.decoding and active not in arriving]
    coming = [active.sequence for active in arriving if active.sink.router_id != router_id]
    others = [active.sequence for active in running if active.sink.router_id != router_id]
    slab, timing = loop.slab, loop.steps.timing
    return router_pb2.WorkerStatus(
        ready=slab is not None,
        waiting_sequences=len(waiting),
        running_sequences=len(running),
        waiting_tokens=sum(active.sequence.pending for active in waiting),
        kv_tokens=sum(active.sequence.computed for active in running),
        free_slots=slab.free_slots if slab else 0,
        total_slots=slab.total_slots if slab else 0,
        prefill_coefficients=timing.predictor.prefill,
        step_coefficients=timing.predictor.step,
        prefill_error=timing.prefill.error,
        step_error=timing.step.error,
        prompts=_prompts(loop, waiting),
        debts=dict(nlargest(MOST_TENANTS, loop.steps.debts.items(), key=itemgetter(1))),
        others=_share([*others, *coming, *loop.expected_by_others(router_id)]),
    )


def _prompts(loop: EngineLoop, waiting: list[Active]) -> Iterable[router_pb2.QueuedPrompt]:
    steps = loop.steps
    predictor, order, debts = steps.timing.predictor, steps.order, steps.debts
    first = nsmallest(MOST_PROMPTS, waiting, key=lambda a: prompt_key(a.sequence, predictor, order, debts))
    for active in first:
        sequence = active.sequence
        yield router_pb2.QueuedPrompt(
            sequence_id=sequence.sequence_id,
            remaining_tokens=sequence.pending,
            computed_tokens=sequence.computed,
            arrival_s=sequence.arrival_s,
            priority=sequence.priority,
            running=active.stepping,
            started=active.stepping or active.started_s > 0,
            tenant=sequence.tenant,
            first_token_due_s=sequence.first_token_due_s,
        )


def _share(sequences: list[Sequence]) -> router_pb2.BatchShare:
    """With their answers as long as the routers expect them to be."""
    growth = sum(max(0, sequence.expected_tokens - sequence.output_index) for sequence in sequences)
    tokens = sum(len(sequence.tokens) for sequence in sequences)
    return router_pb2.BatchShare(sequences=len(sequences), kv_tokens=tokens, growth_tokens=growth)
