"""The life of a request."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Awaitable, Callable

import grpc

from headway.runtime.errors import HeadwayError
from headway.v1 import router_pb2
from services.router.choice import Choice
from services.router.config import RouterConfig
from services.router.fleet import Fleet
from services.router.inbox import Inbox
from services.router.job import Job, prepare
from services.router.model import ServedModel

# It waits for nothing but a connection that is full.
FIRST_MESSAGE_S = 1.0
Send = Callable[[router_pb2.GenerateResponse], Awaitable[None]]


async def generate(
    request: router_pb2.GenerateRequest, request_id: str, fleet: Fleet, config: RouterConfig, seconds: float, send: Send
) -> None:
    """Run a request to its end, within `seconds`, sending the answer as it comes.

    Raises HeadwayError; whatever way it ends, no worker keeps anything of it.
    """
    received = time.monotonic()
    inbox = Inbox(config.max_buffered)
    choices: list[Choice] = []
    try:
        async with asyncio.timeout(seconds) as limit:
            # 1. Tokenize, compute block keys, look the prefix up, and pick the workers.
            model = await served_model(fleet, config, inbox)
            job = await prepare(request, model, fleet.constraints, received, received + seconds)
            choices = [Choice(job, index, fleet, config, inbox) for index in range(job.choices)]
            # 2. Prefill leases slots and cached blocks, 3. computes the rest in chunks; decode is told to expect it.
            choices[0].start()
            job.route_s = time.monotonic() - received
            # The workers' streams first: prefill goes before politeness.
            await asyncio.sleep(0)
            await _send_first(send, _started(request_id, job), limit)
            # From here on a request that waits for its client to read can be ended.
            inbox.check()
            inbox.on_error = lambda: _end_now(limit)
            live, held_back = choices[:1], choices[1:]
            while live:
                # 4. The first token comes, decode is told to begin. 5. It joins the lease. 6. The answer grows.
                for choice, worker, event in await inbox.take():
                    choice.handle(worker, event)
                if held_back and choices[0].answer.sent:
                    # The other choices share the prompt's blocks, which are sealed by now.
                    live, held_back = live + held_back, []
                    for choice in choices[1:]:
                        choice.start()
                # Commands to workers leave before the client's message is written.
                await asyncio.sleep(0)
                for choice in live:
                    choice.resume()
                    response = choice.answer.message()
                    if response is not None:
                        await send(response)
                    if choice.answer.over:
                        choice.close()
                live = [choice for choice in live if not choice.answer.over]
    except TimeoutError:
        inbox.check()
        message = f"the request took longer than its deadline of {seconds:g} s"
        raise HeadwayError(grpc.StatusCode.DEADLINE_EXCEEDED, message) from None
    finally:
        # 7. The end, whatever it was: leases are released, nothing is left behind.
        for choice in choices:
            choice.close()


async def _send_first(send: Send, response: router_pb2.GenerateResponse, limit: asyncio.Timeout) -> None:
    """It takes the call's headers along. Cut short, it would leave gRPC unable to send a status, and the client waiting
    for one: so the deadline waits for it.
    """
    due = limit.when()
    limit.reschedule(max(due or 0.0, asyncio.get_running_loop().time() + FIRST_MESSAGE_S))
    await send(response)
    limit.reschedule(due)


def _end_now(limit: asyncio.Timeout) -> None:
    with contextlib.suppress(RuntimeError):  # it is ending already
        limit.reschedule(0.0)


async def served_model(fleet: Fleet, config: RouterConfig, inbox: Inbox) -> ServedModel:
    """The model that the fleet serves; waits a while for a first worker. Raises HeadwayError UNAVAILABLE."""
    if fleet.model is not None:
        return fleet.model
    give_up = asyncio.get_running_loop().call_later(config.no_worker_timeout_s, inbox.poke)
    fleet.waiting.add(inbox)
    try:
        await inbox.take()
    finally:
        give_up.cancel()
        fleet.waiting.discard(inbox)
    if fleet.model is None:
        message = "no worker has announced itself to this router yet; start one, or try again later"
        raise HeadwayError(grpc.StatusCode.UNAVAILABLE, message, retry_after_s=1.0)
    return fleet.model


def _started(request_id: str, job: Job) -> router_pb2.GenerateResponse:
    started = router_pb2.Started(request_id=request_id, prompt_tokens=len(job.token_ids), model=job.model.name)
    return router_pb2.GenerateResponse(started=started)
