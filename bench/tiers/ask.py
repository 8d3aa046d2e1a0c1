"""One prompt through a fleet, and what it took."""

from __future__ import annotations

import random
import time
from dataclasses import dataclass

from headway.v1 import common_pb2, router_pb2, router_pb2_grpc

TOKENS = 2000
BLOCK = 16
# All but the last token's block can come from elsewhere.
PREFIX = (TOKENS - 1) // BLOCK * BLOCK


@dataclass(frozen=True)
class Answer:
    """Seconds to the first token, as the client saw it; where it ran; what it used."""

    ttft_s: float
    tokens: tuple[int, ...]
    usage: router_pb2.Usage
    timings: common_pb2.Timings


def new_prompt() -> list[int]:
    return list(random.randbytes(TOKENS))


async def ask(
    stub: router_pb2_grpc.RouterServiceAsyncStub, prompt: list[int], prefill: str = "", decode: str = ""
) -> Answer:
    hint = router_pb2.PlacementHint(prefill_worker=prefill, decode_worker=decode, force_apart=True)
    request = router_pb2.GenerateRequest(
        tokens=router_pb2.TokenPrompt(token_ids=prompt), max_tokens=4, ignore_eos=True, placement=hint
    )
    started, first, tokens = time.monotonic(), 0.0, []
    async for response in stub.Generate(request):
        if response.HasField("delta"):
            first = first or time.monotonic()
            tokens += [token.token_id for token in response.delta.tokens]
        if response.HasField("finished"):
            finished = response.finished
    return Answer(first - started, tuple(tokens), finished.usage, finished.timings)


def same_answer(before: Answer, after: Answer) -> Answer:
    """`after`, whose prefix came from elsewhere; the tokens must not show it."""
    assert after.tokens == before.tokens, "the answer differs from that of the computed prefix"
    assert after.usage.cached_tokens == PREFIX, f"{after.usage.cached_tokens} of {PREFIX} tokens came"
    return after
