"""RouterService: what clients call, and where workers announce themselves."""

from __future__ import annotations

import asyncio
import time
import uuid
from typing import Any

import grpc

from headway.runtime.convert import card_to_proto
from headway.runtime.errors import HeadwayError, abort
from headway.v1 import router_pb2, router_pb2_grpc
from services.router.choice import Choice
from services.router.config import RouterConfig
from services.router.fleet import Fleet
from services.router.generate import generate, served_model
from services.router.inbox import Inbox
from services.router.job import prepare


class RouterService(router_pb2_grpc.RouterServiceServicer):
    """One router. Handlers write by themselves, so that a cancel reaches the request wherever it waits."""

    def __init__(self, config: RouterConfig) -> None:
        self.config = config
        self.router_id = uuid.uuid4().hex
        self.fleet = Fleet(config, self.router_id)
        self.in_flight: set[str] = set()
        self._draining = False

    async def drain(self, seconds: float) -> None:
        """Refuse new requests; return when none is left in flight, at the latest after `seconds`."""
        self._draining = True
        until = time.monotonic() + seconds
        while self.in_flight and time.monotonic() < until:
            await asyncio.sleep(0.05)

    async def Generate(self, request: router_pb2.GenerateRequest, context: Any) -> None:  # type: ignore[override]
        try:
            request_id = self._admit(request)
            try:
                seconds = self._seconds(request, context)
                await generate(request, request_id, self.fleet, self.config, seconds, context.write)
            finally:
                self.in_flight.discard(request_id)
        except HeadwayError as error:
            await abort(context, error)

    async def Explain(self, request: router_pb2.ExplainRequest, context: Any) -> router_pb2.ExplainResponse:
        try:
            return await self._explain(request.request, context)
        except HeadwayError as error:
            await abort(context, error)
            raise

    async def Fleet(self, request: router_pb2.FleetRequest, context: Any) -> router_pb2.FleetResponse:
        fleet = self.fleet
        return router_pb2.FleetResponse(
            workers=fleet.views(),
            links=fleet.link_views(),
            stores=await fleet.store_views(),
            model=card_to_proto(fleet.model.card) if fleet.model else None,
            requests_in_flight=len(self.in_flight),
        )

    async def Announce(self, request_iterator: Any, context: Any) -> None:  # type: ignore[override]
        try:
            await self.fleet.follow(context)
        except HeadwayError as error:
            await abort(context, error)

    def _admit(self, request: router_pb2.GenerateRequest) -> str:
        """The request's id, now in flight. Raises HeadwayError."""
        if self._draining:
            raise HeadwayError(grpc.StatusCode.UNAVAILABLE, "this router is shutting down; use another, or try later")
        request_id = request.request_id or uuid.uuid4().hex
        if request_id in self.in_flight:
            message = f"request id {request_id!r} is in flight already; choose another, or leave it out"
            raise HeadwayError(grpc.StatusCode.ALREADY_EXISTS, message)
        if len(self.in_flight) >= self.config.max_in_flight:
            message = f"the router has {self.config.max_in_flight} requests in flight; try again later"
            raise HeadwayError(grpc.StatusCode.RESOURCE_EXHAUSTED, message, retry_after_s=1.0)
        self.in_flight.add(request_id)
        return request_id

    def _seconds(self, request: router_pb2.GenerateRequest, context: Any) -> float:
        """That the request may take: the least of the request's, gRPC's and the router's own limit."""
        seconds = self.config.max_request_s
        # A deadline that makes no sense is refused later, with a sentence.
        if request.HasField("deadline_s") and request.deadline_s > 0:
            seconds = min(seconds, request.deadline_s)
        remaining = context.time_remaining()
        if remaining is not None:
            seconds = min(seconds, remaining)
        return seconds

    async def _explain(self, request: router_pb2.GenerateRequest, context: Any) -> router_pb2.ExplainResponse:
        received = time.monotonic()
        inbox = Inbox(1)
        model = await served_model(self.fleet, self.config, inbox)
        deadline = received + self._seconds(request, context)
        job = await prepare(request, model, self.fleet.constraints, received, deadline)
        response = router_pb2.ExplainResponse(prompt_tokens=len(job.token_ids))
        for option in Choice(job, 0, self.fleet, self.config, inbox).options():
            response.options.add(
                prefill_worker=option.prefill_worker or "",
                decode_worker=option.decode_worker,
                overlap_tokens=option.overlap_tokens,
                wait_s=option.wait_s,
                compute_s=option.compute_s,
                cost_s=option.cost_s,
                refused=option.refused.sentence if option.refused else "",
                pull_from=option.pull_from or "",
                pull_s=option.pull_s,
                delay_s=option.delay_s,
            )
        return response
