"""Sends a trace's requests at its times to running routers, and notes what comes back when."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import grpc

from headway.client.aio import AsyncClient
from headway.client.errors import HeadwayClientError
from headway.client.request import Options
from headway.client.results import Finished, TextDelta
from headway.replay.prompts import Prompts
from headway.sim.trace import Trace, TraceRequest

# The first prompt is made in this time; each other one while the one before is on its way.
AHEAD_S = 1.0


@dataclass
class Seen:
    """What a client saw of one request. Times in seconds since the replay's start; `code` is OK when it finished.

    `late_s`: how long after its time it was sent. `gaps_s`: between messages with tokens.
    """

    request: TraceRequest
    late_s: float = 0.0
    first_token_s: float | None = None
    finished_s: float | None = None
    # From when it was due until its end, whatever that was.
    ended_s: float | None = None
    code: grpc.StatusCode = grpc.StatusCode.OK
    details: str = ""
    retry_s: float | None = None
    tokens: int = 0
    cached_tokens: int = 0
    prefill_worker: str = ""
    decode_worker: str = ""
    gaps_s: list[float] = field(default_factory=list)
    token_times_s: list[float] = field(default_factory=list)

    @property
    def ttft_s(self) -> float | None:
        """From the moment in which the request was due."""
        return None if self.first_token_s is None else self.first_token_s - self.request.arrival_s

    @property
    def ok(self) -> bool:
        return self.code is grpc.StatusCode.OK


class Replay:
    """One replay of a trace against the routers at `addresses`, in turns. `options`: those of each request."""

    def __init__(
        self,
        trace: Trace,
        addresses: Sequence[str],
        options: Callable[[TraceRequest], Options] = lambda request: {},
        on_done: Callable[[Seen], None] = lambda seen: None,
    ) -> None:
        self._trace = trace
        self._addresses = addresses
        self._options = options
        self._on_done = on_done
        self._prompts = Prompts(trace)
        self.started = 0.0

    @property
    def now_s(self) -> float:
        """Since the start."""
        return time.monotonic() - self.started

    async def run(self) -> list[Seen]:
        """Every request, in the trace's order, when all have ended."""
        clients = [AsyncClient(address) for address in self._addresses]
        self.started = time.monotonic() + AHEAD_S
        running: list[asyncio.Task[Seen]] = []
        try:
            for number, request in enumerate(self._trace.requests):
                tokens = self._prompts.tokens(request)
                await asyncio.sleep(max(0.0, request.arrival_s - self.now_s))
                client = clients[number % len(clients)]
                running.append(asyncio.create_task(self._one(client, request, tokens)))
            return list(await asyncio.gather(*running))
        finally:
            for task in running:
                task.cancel()
            for client in clients:
                await client.close()

    async def _one(self, client: AsyncClient, request: TraceRequest, tokens: list[int]) -> Seen:
        seen = Seen(request, late_s=self.now_s - request.arrival_s)
        options: Options = {
            "max_tokens": request.output_tokens,
            "ignore_eos": True,
            "priority": request.priority,
            "tenant": request.tenant,
            **self._options(request),
        }
        try:
            async with client.stream(tokens, **options) as stream:
                async for event in stream:
                    self._note(seen, event)
        except HeadwayClientError as error:
            seen.code, seen.details, seen.retry_s = error.code, str(error), error.retry_after_s
        seen.ended_s = self.now_s - request.arrival_s
        self._on_done(seen)
        return seen

    def _note(self, seen: Seen, event: object) -> None:
        now_s = self.now_s
        if isinstance(event, TextDelta) and event.tokens:
            if seen.first_token_s is None:
                seen.first_token_s = now_s
            else:
                seen.gaps_s.append(now_s - seen.token_times_s[-1])
            seen.token_times_s.append(now_s)
            seen.tokens += len(event.tokens)
        elif isinstance(event, Finished):
            seen.finished_s = now_s
            seen.cached_tokens = event.usage.cached_tokens
            seen.prefill_worker, seen.decode_worker = event.prefill_worker, event.decode_worker
