"""What the router tells Prometheus: how well it predicts, and what waits where."""

from __future__ import annotations

from collections.abc import Iterator

from headway.core.load import Role
from headway.runtime.metrics import Figure
from headway.v1 import router_pb2
from services.router.fleet import Fleet

ERROR = "mean of |predicted − taken| / taken, lately"


def figures(fleet: Fleet, in_flight: int) -> Iterator[Figure]:
    """All of now."""
    yield Figure("headway_requests_in_flight", "requests of clients at this router", in_flight)
    for view in fleet.views():
        yield from _of_worker(view, fleet.workers[view.worker_id].load.role)
    for link in fleet.link_views():
        labels = {"source": link.source, "destination": link.destination}
        yield Figure("headway_link_error_ratio", f"of transfers between two nodes: {ERROR}", link.error, labels)
        yield Figure("headway_link_bytes_per_second", "measured between two nodes", link.bytes_per_s, labels)
        yield Figure("headway_link_backlog_seconds", "until what was started has arrived", link.backlog_s, labels)


def _of_worker(view: router_pb2.WorkerView, role: Role) -> Iterator[Figure]:
    status, labels = view.status, {"worker": view.worker_id, "role": role.value}
    yield Figure("headway_worker_prefill_error_ratio", f"of forwards of prompts: {ERROR}", status.prefill_error, labels)
    yield Figure("headway_worker_step_error_ratio", f"of decode steps: {ERROR}", status.step_error, labels)
    yield Figure("headway_worker_queue_seconds", "predicted, of prompts that wait or run there", view.queue_s, labels)
    yield Figure("headway_worker_waiting_sequences", "whose prompts are not computed", status.waiting_sequences, labels)
    yield Figure("headway_worker_running_sequences", "that decode", status.running_sequences, labels)
    yield Figure("headway_worker_status_age_seconds", "since it was last heard of", view.age_s, labels)
