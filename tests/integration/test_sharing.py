"""A common prefix is computed once on a node, whichever workers run it; another cache salt shares nothing."""

from __future__ import annotations

import asyncio

from headway.core.sampling import Sampling
from headway.engine.contract import Draw
from headway.engine.simulated import expected_tokens
from headway.fleet import Fleet
from headway.v1 import common_pb2, router_pb2
from tests.support import Outcome, Stub, expected, generate, request, settled, sim_spec

SPEC = sim_spec(2, 2, 16 << 20)


def on(number: int) -> router_pb2.PlacementHint:
    return router_pb2.PlacementHint(
        prefill_worker=f"prefill-{number}", decode_worker=f"decode-{number}", force_apart=True
    )


def figures(out: Outcome) -> tuple[int, int]:
    return out.finished.usage.cached_tokens, out.finished.usage.computed_tokens


async def test_two_workers_of_a_node_compute_a_common_prefix_once(fleet: Fleet, stub: Stub) -> None:
    common = list(range(160))
    first = await generate(stub, request([*common, 1, 2, 3], placement=on(0)))
    second = await generate(stub, request([*common, 7, 8, 9, 10], placement=on(1)))
    assert first.finished.prefill_worker == "prefill-0"
    assert second.finished.prefill_worker == "prefill-1"
    assert figures(first) == (0, 163)
    assert figures(second) == (160, 4)
    assert second.tokens == expected([*common, 7, 8, 9, 10])
    assert second.finished.usage.handoff_bytes == 0


async def test_siblings_that_come_at_once_still_share(fleet: Fleet, stub: Stub) -> None:
    common = list(range(50, 178))
    prompts = [[*common, *[number] * 5] for number in range(8)]
    outs = await asyncio.gather(*(generate(stub, request(prompt, placement=on(0))) for prompt in prompts))
    for prompt, out in zip(prompts, outs, strict=True):
        assert out.tokens == expected(prompt)
    after = await generate(stub, request([*common, 99], placement=on(1)))
    assert figures(after) == (128, 1)
    await settled(fleet.address_of("kvstore"))


async def test_the_next_turn_finds_the_answer_cached(stub: Stub) -> None:
    prompt = [33] * 40
    first = await generate(stub, request(prompt, 40))
    turn = [*prompt, *first.tokens, 1, 2, 3]
    second = await generate(stub, request(turn))
    # All full blocks of prompt and answer but the last token, whose K and V nobody needed.
    assert figures(second) == ((40 + 40 - 1) // 16 * 16, len(turn) - (40 + 40 - 1) // 16 * 16)
    assert second.tokens == expected(turn)


async def test_the_choices_of_a_request_share_the_prompts_blocks(fleet: Fleet, stub: Stub) -> None:
    """Computed once, kept once: each choice adds the end of the prompt and its own answer."""
    before = await settled(fleet.address_of("kvstore"))
    prompt, cached, answers = [77] * 163, dict[int, int](), dict[int, list[int]]()
    sampling = common_pb2.Sampling(temperature=1.0, seed=3)
    message = request(prompt, 24, n=4, sampling=sampling, placement=on(0))
    async for response in stub.Generate(message, timeout=60):
        answers.setdefault(response.choice, []).extend(token.token_id for token in response.delta.tokens)
        if response.HasField("finished"):
            cached[response.choice] = response.finished.usage.cached_tokens
    assert cached == {0: 0, 1: 160, 2: 160, 3: 160}
    wanted = {
        choice: expected_tokens(prompt, 24, lambda at, choice=choice: Draw(Sampling(1.0, seed=3), at, choice))
        for choice in range(4)
    }
    assert answers == wanted
    after = await settled(fleet.address_of("kvstore"))
    # Ten blocks of the prompt, and of each choice the one that starts with its last three tokens.
    assert after.cached_slots - before.cached_slots == 10 + 4


async def test_a_match_leaves_at_least_one_token_to_compute(stub: Stub) -> None:
    prompt = [44] * 64
    await generate(stub, request(prompt))
    again = await generate(stub, request(prompt))
    assert figures(again) == (48, 16)
    assert again.tokens == expected(prompt)


async def test_another_salt_shares_nothing(stub: Stub) -> None:
    prompt = [55] * 100
    await generate(stub, request(prompt, cache_salt="a"))
    other = await generate(stub, request(prompt, cache_salt="b"))
    same = await generate(stub, request(prompt, cache_salt="a"))
    assert figures(other) == (0, 100)
    assert figures(same) == (96, 4)
    assert other.tokens == same.tokens == expected(prompt)
