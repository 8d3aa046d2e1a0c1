"""The workers and stores as this router knows them: who announced itself, who is alive, how loaded it is."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import math
import time
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

import grpc

from headway.core.backlog import Backlog, Prompt
from headway.core.index import PrefixIndex
from headway.core.links import Links
from headway.core.load import Role, Share, WorkerLoad
from headway.core.order import Order, Rule
from headway.core.place import Placer
from headway.core.predict import Predictor, coefficients
from headway.core.step import UNCUT, StepLimits
from headway.runtime.convert import card_from_proto
from headway.runtime.errors import HeadwayError
from headway.v1 import common_pb2, router_pb2
from services.router.config import RouterConfig
from services.router.constraints import ConstraintCheck
from services.router.dispatch import DECODE, PREFILL, Link
from services.router.inbox import GONE, Inbox
from services.router.model import ServedModel
from services.router.placing import make_placer
from services.router.stores import StoreWatch

if TYPE_CHECKING:
    from services.router.choice import Choice

log = logging.getLogger(__name__)

ROLES = {
    common_pb2.WORKER_ROLE_PREFILL: Role.PREFILL,
    common_pb2.WORKER_ROLE_DECODE: Role.DECODE,
    common_pb2.WORKER_ROLE_MIXED: Role.MIXED,
}


class Worker:
    """One announced incarnation of a worker; a worker that comes back is a new one."""

    def __init__(self, hello: router_pb2.WorkerHello, order: Order, lease: asyncio.Timeout, router_id: str) -> None:
        self.hello = hello
        self.worker_id = hello.worker_id
        self.status = router_pb2.WorkerStatus()
        self.status_at = time.monotonic()
        limits = _limits(hello)
        self.load = WorkerLoad(
            hello.worker_id,
            hello.kvstore_address,
            ROLES[hello.role],
            limits,
            backlog=Backlog(limits, order),
        )
        self._lease = lease
        plane = PREFILL if hello.role == common_pb2.WORKER_ROLE_PREFILL else DECODE
        self.link = Link(hello.address, plane, router_id, self._event, self._broken)

    def take_status(self, status: router_pb2.WorkerStatus) -> None:
        """What the worker says of itself and of what other routers sent it; what this one sent it, it knows itself."""
        self.status, self.status_at = status, time.monotonic()
        load, others = self.load, status.others
        load.ready = status.ready and not self.link.broken
        load.others_are(Share(others.sequences, others.kv_tokens, others.growth_tokens))
        load.reported = status.waiting_sequences
        load.total_slots = status.total_slots
        load.backlog.settle(dict(status.debts))
        load.predictor = predictor = Predictor(
            coefficients(status.prefill_coefficients[:]), coefficients(status.step_coefficients[:])
        )
        prompts, started = [], set()
        for queued in status.prompts:
            if queued.sequence_id in self.link.routes and queued.sequence_id not in load.backlog:
                # It is computed already, and the worker's word is older than that.
                continue
            if queued.started:
                started.add(queued.sequence_id)
            seconds = predictor.prefill_s(queued.remaining_tokens, queued.computed_tokens)
            left = queued.remaining_tokens
            key = load.backlog.order.key(seconds, left, queued.arrival_s, queued.priority)
            due_s = math.inf
            if queued.HasField("first_token_due_s"):
                due_s = self.status_at + queued.first_token_due_s - time.time()
            prompts.append(Prompt(queued.sequence_id, key, seconds, left, due_s, tenant=queued.tenant))
        running = next((queued.sequence_id for queued in status.prompts if queued.running), None)
        load.backlog.report(prompts, started, running, self.status_at)

    def _event(self, choice: Choice, event: Any) -> None:
        choice.inbox.put(choice, self, event)

    def _broken(self) -> None:
        """Tell all whom it served; end its announcement, so that it announces itself anew."""
        for choice in self.link.routes.values():
            choice.inbox.put(choice, self, GONE)
        self.link.routes.clear()
        self.load.ready = False
        with contextlib.suppress(RuntimeError):  # the announcement is over already
            self._lease.reschedule(asyncio.get_running_loop().time())


def _limits(hello: router_pb2.WorkerHello) -> StepLimits:
    """What it does not say is without a limit."""
    return StepLimits(
        max(1, hello.max_batch),
        hello.chunk_tokens or UNCUT.chunk_tokens,
        hello.chunk_s or math.inf,
        hello.shared_chunk_s or math.inf,
        hello.itl_objective_s or math.inf,
        max(1, hello.layers),
    )


class Fleet:
    """Workers by id, kvstores by address, and who waits for a worker."""

    def __init__(self, config: RouterConfig, router_id: str) -> None:
        self._config = config
        self._router_id = router_id
        self.workers: dict[str, Worker] = {}
        self.stores: dict[str, StoreWatch] = {}
        self.index = PrefixIndex(config.max_index_blocks)
        self.links = Links(config.pull_latency_s, config.link_bytes_per_s or math.inf)
        self.model: ServedModel | None = None
        self.constraints = ConstraintCheck()
        # Requests that wait for a worker that can serve them.
        self.waiting: set[Inbox] = set()
        self._placer: Placer | None = None

    @property
    def placer(self) -> Placer:
        """There is one as soon as a model is served."""
        assert self._placer is not None
        return self._placer

    async def follow(self, context: Any) -> None:
        """Serve one announcement until it ends, breaks, or no status came for too long. Raises HeadwayError."""
        timeout_s = self._config.status_timeout_s
        worker: Worker | None = None
        loop = asyncio.get_running_loop()
        try:
            async with asyncio.timeout(timeout_s) as lease:
                while (request := await context.read()) is not grpc.aio.EOF:
                    kind = request.WhichOneof("event")
                    if worker is None and kind == "hello":
                        worker = self._welcome(request.hello, lease)
                        await context.write(router_pb2.AnnounceResponse(router_id=self._router_id))
                    elif worker is None:
                        raise HeadwayError(grpc.StatusCode.FAILED_PRECONDITION, "announce the card (hello) first")
                    elif kind == "status":
                        worker.take_status(request.status)
                        self._wake_waiting()
                    elif kind == "draining":
                        worker.load.draining = True
                    lease.reschedule(loop.time() + timeout_s)
        except TimeoutError:
            message = f"no status for {timeout_s:g} s, or the Run stream broke; announce again"
            raise HeadwayError(grpc.StatusCode.UNAVAILABLE, message) from None
        finally:
            if worker is not None:
                self._farewell(worker)

    def _welcome(self, hello: router_pb2.WorkerHello, lease: asyncio.Timeout) -> Worker:
        if not hello.worker_id or not hello.address or hello.role not in ROLES:
            raise HeadwayError(grpc.StatusCode.INVALID_ARGUMENT, "a worker needs an id, an address and a role")
        order = order_of(hello)
        self._adopt(hello)
        former = self.workers.pop(hello.worker_id, None)
        if former is not None:
            former.link.close()
        worker = self.workers[hello.worker_id] = Worker(hello, order, lease, self._router_id)
        self.placer.add(worker.load)
        address = hello.kvstore_address
        if address not in self.stores:
            self.stores[address] = StoreWatch(address, hello.node_id, self.index, self.links)
        self.stores[address].users += 1
        log.info("worker=%s role=%s event=announced", hello.worker_id, worker.load.role.value)
        return worker

    def _adopt(self, hello: router_pb2.WorkerHello) -> None:
        """The first worker says what is served; others must serve the same. Raises HeadwayError."""
        card = card_from_proto(hello.model)
        wanted = self._config.model_name
        refused = ""
        if wanted and card.name != wanted:
            refused = f"this router serves {wanted!r}, the worker has {card.name!r}"
        elif self.model is not None and not self.model.same(card):
            if self.workers.keys() - {hello.worker_id}:
                refused = (
                    f"the fleet serves {self.model.name!r}; this worker's model {card.name!r} differs from it in "
                    "name, weights or KV format; start it with the same model and settings, or behind another router"
                )
            else:
                self.model.close()
                self.model = None
        if refused:
            raise HeadwayError(grpc.StatusCode.FAILED_PRECONDITION, refused)
        if self.model is None:
            self.model = ServedModel(card)
            self._placer = make_placer(self._config, card, self.index, self.links)
            self._wake_waiting()

    def _farewell(self, worker: Worker) -> None:
        """Its sequences fail over at once; its node is remembered for a while."""
        log.info("worker=%s event=gone", worker.worker_id)
        if self.workers.get(worker.worker_id) is worker:
            del self.workers[worker.worker_id]
        self.placer.remove(worker.load)
        worker.link.close()
        store = self.stores[worker.hello.kvstore_address]
        store.users -= 1
        if not store.users:
            asyncio.get_running_loop().call_later(self._config.store_linger_s, self._drop_unused, store)

    def _drop_unused(self, store: StoreWatch) -> None:
        if not store.users and self.stores.get(store.address) is store:
            del self.stores[store.address]
            self.links.forget(store.address)
            store.close()

    def _wake_waiting(self) -> None:
        for inbox in self.waiting:
            inbox.poke()

    def close(self) -> None:
        """End all streams to workers and stores."""
        for worker in list(self.workers.values()):
            worker.link.close()
        for store in self.stores.values():
            store.close()
        if self.model is not None:
            self.model.close()
        self.constraints.close()

    def views(self) -> Iterable[router_pb2.WorkerView]:
        now = time.monotonic()
        for worker in self.workers.values():
            hello = worker.hello
            yield router_pb2.WorkerView(
                worker_id=hello.worker_id,
                node_id=hello.node_id,
                role=hello.role,
                address=hello.address,
                status=worker.status,
                age_s=now - worker.status_at,
                pid=hello.pid,
                queue_s=worker.load.backlog.left_s(now),
            )

    def link_views(self) -> Iterable[router_pb2.LinkView]:
        now = time.monotonic()
        for source, destination, link in self.links:
            backlog_s = max(0.0, link.free_s - now)
            # Most pairs were only ever thought of.
            if not (link.count or backlog_s) or source not in self.stores:
                continue
            yield router_pb2.LinkView(
                source=source,
                destination=destination,
                bytes_per_s=link.bytes_per_s if link.count else 0.0,
                error=link.error,
                backlog_s=backlog_s,
            )

    async def store_views(self) -> list[router_pb2.StoreView]:
        stores = list(self.stores.values())
        figures = await asyncio.gather(*(store.stats() for store in stores))
        return [
            router_pb2.StoreView(
                node_id=store.node_id,
                address=store.address,
                indexed_blocks=self.index.blocks(store.address),
                last_sequence_number=store.last,
                watching=store.watching,
                peers=stats.peers,
                tiers=stats.tiers,
            )
            for store, stats in zip(stores, figures, strict=True)
        ]


def order_of(hello: router_pb2.WorkerHello) -> Order:
    """In which the worker computes prompts; the usual one where it does not say. Raises HeadwayError."""
    if not hello.order:
        return Order()
    try:
        return Order(Rule(hello.order), hello.ageing)
    except ValueError:
        known = ", ".join(rule.value for rule in Rule)
        message = (
            f"the worker's order {hello.order!r} is none that this router knows ({known}); start both at one version"
        )
        raise HeadwayError(grpc.StatusCode.INVALID_ARGUMENT, message) from None
