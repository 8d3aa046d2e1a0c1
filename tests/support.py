"""What tests against real processes share: fleets of simulated engines, requests, and what must be left behind."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import grpc

from headway.core.sampling import Sampling
from headway.engine.contract import Draw
from headway.engine.simulated import expected_tokens
from headway.fleet import FleetSpec
from headway.runtime.channels import open_channel
from headway.v1 import kvstore_pb2, kvstore_pb2_grpc, router_pb2

if TYPE_CHECKING:
    from headway.v1 import router_pb2_grpc

    Stub = router_pb2_grpc.RouterServiceAsyncStub
else:
    Stub = object


def sim_spec(prefill: int, decode: int, slab_bytes: int, *worker_flags: str) -> FleetSpec:
    """A fleet of simulated engines; `worker_flags` go to every worker."""
    return FleetSpec(prefill, decode, model="sim", engine="sim", slab_bytes=slab_bytes, worker_flags=worker_flags)


@dataclass
class Outcome:
    """What a client saw of one request. `code` is OK when it finished."""

    tokens: list[int] = field(default_factory=list)
    indexes: list[int] = field(default_factory=list)
    text: str = ""
    code: grpc.StatusCode = grpc.StatusCode.OK
    details: str = ""
    finished: router_pb2.Finished = field(default_factory=router_pb2.Finished)
    seconds: float = 0.0
    # Longest silence between two messages, or before the first.
    longest_gap_s: float = 0.0


def request(prompt: Sequence[int], max_tokens: int = 24, **fields: object) -> router_pb2.GenerateRequest:
    tokens = router_pb2.TokenPrompt(token_ids=prompt)
    return router_pb2.GenerateRequest(tokens=tokens, max_tokens=max_tokens, **fields)  # type: ignore[arg-type]


def expected(prompt: Sequence[int], count: int = 24) -> list[int]:
    """The greedy answer of simulated engines."""
    return expected_tokens(prompt, count, lambda index: Draw(Sampling(), index))


async def generate(
    stub: Stub,
    message: router_pb2.GenerateRequest,
    on_token: Callable[[int], Awaitable[None]] | None = None,
    timeout: float = 60,
) -> Outcome:
    """Run a request to its end, whatever that is; on_token(tokens so far) after Started (0) and after each token."""
    out, started = Outcome(), time.monotonic()
    last = started
    call = stub.Generate(message, timeout=timeout)
    try:
        async for response in call:
            now = time.monotonic()
            out.longest_gap_s, last = max(out.longest_gap_s, now - last), now
            if response.HasField("started") and on_token is not None:
                await on_token(0)
            for token in response.delta.tokens:
                out.tokens.append(token.token_id)
                out.indexes.append(token.output_index)
                if on_token is not None:
                    await on_token(len(out.tokens))
            out.text += response.delta.text
            if response.HasField("finished"):
                out.finished = response.finished
    except grpc.aio.AioRpcError as error:
        out.code, out.details = error.code(), error.details() or ""
    finally:
        call.cancel()
    out.seconds = time.monotonic() - started
    out.longest_gap_s = max(out.longest_gap_s, time.monotonic() - last)
    return out


async def stats(address: str, **fields: bool) -> kvstore_pb2.StatsResponse:
    async with open_channel(address) as channel:
        return await kvstore_pb2_grpc.KvStoreServiceStub(channel).Stats(kvstore_pb2.StatsRequest(**fields))


async def settled(address: str, seconds: float = 10.0) -> kvstore_pb2.StatsResponse:
    """The store's figures once nothing is leased, waiting or quarantined; fails when that does not come."""
    deadline = time.monotonic() + seconds
    while True:
        figures = await stats(address, check_integrity=True)
        assert not figures.integrity_errors, figures.integrity_errors
        left = figures.leases + figures.waiting_acquires + figures.leased_slots + figures.quarantined_slots
        if not left:
            assert figures.free_slots + figures.cached_slots == figures.total_slots
            return figures
        assert time.monotonic() < deadline, f"still held: {figures}"
        await asyncio.sleep(0.05)
