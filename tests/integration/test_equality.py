"""The whole system with the default model: greedy output equals transformers' generate, token for token.

Prefill and decode run in different processes; `tests/engine/test_default_model.py` shows the same inside one engine.
"""

from __future__ import annotations

import asyncio
import re
from collections.abc import Sequence
from pathlib import Path

import grpc
import pytest

from headway.fleet import Fleet, FleetSpec
from headway.runtime.channels import open_channel
from headway.text.tokenizer import load_tokenizer
from headway.v1 import common_pb2, router_pb2, router_pb2_grpc
from tests.reference import NEW_TOKENS, check_equal, log_probabilities, model_folder, prompts, reference
from tests.support import Outcome, Stub, generate, request, settled

pytestmark = [pytest.mark.model, pytest.mark.timeout(900)]

SPEC = FleetSpec(prefill=1, decode=2)
APART = router_pb2.PlacementHint(force_apart=True)
# Of a second turn, so many tokens of the answer belong to the prompt; the rest of it has to come again.
TURN = 24
Wanted = list[tuple[list[int], list[float]]]


@pytest.fixture(scope="module", autouse=True)
def wanted() -> Wanted:
    try:
        model_folder()
    except LookupError as error:
        pytest.skip(str(error))
    return [reference(prompt) for prompt in prompts()]


async def answers(
    stub: Stub, prompts: Sequence[Sequence[int]], tokens: int = NEW_TOKENS, **fields: object
) -> list[Outcome]:
    """All at once, so that they share batches; every one must end well and apart."""
    fields.setdefault("placement", APART)
    messages = [request(prompt, tokens, ignore_eos=True, **fields) for prompt in prompts]
    outs = await asyncio.gather(*(generate(stub, message, timeout=600) for message in messages))
    for out in outs:
        assert (out.code, out.details) == (grpc.StatusCode.OK, "")
        assert out.indexes == list(range(tokens))
        assert out.finished.prefill_worker.startswith("prefill")
        assert out.finished.decode_worker.startswith("decode")
    return outs


def check(outs: list[Outcome], wanted: Wanted) -> None:
    for line in check_equal([out.tokens for out in outs], wanted):
        print(line)


async def test_cold_one_at_a_time(fleet: Fleet, stub: Stub, wanted: Wanted) -> None:
    for at, prompt in enumerate(prompts()):
        (out,) = await answers(stub, [prompt], cache_salt="alone")
        assert out.finished.usage.computed_tokens == len(prompt) - out.finished.usage.cached_tokens
        check([out], [wanted[at]])
    await settled(fleet.kvstore_address)


async def test_cold_and_batched(stub: Stub, wanted: Wanted) -> None:
    check(await answers(stub, prompts(), cache_salt="batched"), wanted)


async def test_cached_prefix(stub: Stub, wanted: Wanted) -> None:
    outs = await answers(stub, prompts(), cache_salt="batched")
    for out, prompt in zip(outs, prompts(), strict=True):
        assert out.finished.usage.cached_tokens == (len(prompt) - 1) // 16 * 16
    check(outs, wanted)


async def test_second_turn(stub: Stub, wanted: Wanted) -> None:
    """The first tokens of the answer become prompt; their blocks come from the decode worker."""
    turns = [[*prompt, *tokens[:TURN]] for prompt, (tokens, _) in zip(prompts(), wanted, strict=True)]
    outs = await answers(stub, turns, NEW_TOKENS - TURN, cache_salt="batched")
    for out, turn in zip(outs, turns, strict=True):
        assert out.finished.usage.cached_tokens == (len(turn) - 1) // 16 * 16
    check(outs, [(tokens[TURN:], margins[TURN:]) for tokens, margins in wanted])


async def test_chunked(wanted: Wanted, tmp_path: Path) -> None:
    """Small chunks, in a slab that holds little more than the longest sequence."""
    long = [at for at, prompt in enumerate(prompts()) if len(prompt) > 48]
    await in_small_slab(134, long, wanted, tmp_path)


async def test_preempted(wanted: Wanted, tmp_path: Path) -> None:
    """All fit while they are prompts, half of them when they have grown: some give way and are computed again."""
    short = [at for at, prompt in enumerate(prompts()) if len(prompt) <= 65]
    assert sum(slots(len(prompts()[at]) + 16) for at in short) <= 56
    assert sum(slots(len(prompts()[at]) + NEW_TOKENS) for at in short) >= 90
    logs = await in_small_slab(56, short, wanted, tmp_path)
    assert len(re.findall("event=preempted", logs)) >= 3


def slots(tokens: int) -> int:
    return -(-tokens // 16)


async def in_small_slab(slots: int, which: list[int], wanted: Wanted, folder: Path) -> str:
    """Those of the prompts, at once, with small chunks and growth; what the services logged."""
    flags = ("--chunk-tokens", "48", "--growth-tokens", "16", "--acquire-timeout-s", "500")
    spec = FleetSpec(prefill=1, decode=1, slab_bytes=slots * 737280, worker_flags=flags)
    with Fleet(spec, folder) as fleet:
        fleet.wait_ready(120)
        async with open_channel(fleet.address) as channel:
            outs = await answers(router_pb2_grpc.RouterServiceStub(channel), [prompts()[at] for at in which])
            check(outs, [wanted[at] for at in which])
        await settled(fleet.kvstore_address)
        return "".join(path.read_text() for path in folder.glob("*.log"))


async def test_log_probabilities_are_transformers(stub: Stub) -> None:
    """Of the chosen token and of the three likeliest, drawn from a distribution that is bent in every way."""
    sampling = common_pb2.Sampling(temperature=1.5, top_p=0.9, repetition_penalty=1.2, seed=4)
    tokens: list[common_pb2.Token] = []
    async for response in stub.Generate(request(prompts()[13], 12, sampling=sampling, top_logprobs=3), timeout=60):
        tokens += response.delta.tokens
    ids = [token.token_id for token in tokens]
    for token, wanted in zip(tokens, log_probabilities(prompts()[13], ids), strict=True):
        assert token.logprob == pytest.approx(float(wanted[token.token_id]), abs=1e-3)
        assert len({one.token_id for one in token.top_logprobs}) == 3
        assert [one.logprob for one in token.top_logprobs] == pytest.approx(wanted.topk(3).values.tolist(), abs=1e-3)
        for one in token.top_logprobs:
            assert one.logprob == pytest.approx(float(wanted[one.token_id]), abs=1e-3)


async def test_a_stop_string_across_the_models_tokens(stub: Stub, wanted: Wanted) -> None:
    """From within one token to within the next; no half of it is ever sent."""
    decode = load_tokenizer(str(model_folder())).decode
    tokens = wanted[13][0]
    at = next(at for at in range(4, 40) if min(len(decode([token])) for token in tokens[at : at + 2]) > 2)
    stop = decode([tokens[at]])[-2:] + decode([tokens[at + 1]])[:2]
    text = decode(tokens)
    out = await generate(stub, request(prompts()[13], NEW_TOKENS, stop_strings=[stop], ignore_eos=True))
    assert out.text == text[: text.index(stop)]
    assert out.finished.stop_string == stop
    assert out.tokens == tokens[: len(out.tokens)]
    assert decode(out.tokens[:-1]).count(stop) == 0


async def test_sampling_with_a_seed_is_the_same_cold_cached_and_replayed(fleet: Fleet, stub: Stub) -> None:
    sampling = common_pb2.Sampling(temperature=0.9, top_p=0.95, top_k=50, seed=1234)
    some = [prompts()[at] for at in (12, 14, 17)]
    cold = await answers(stub, some, sampling=sampling, cache_salt="seeded")
    cached = await answers(stub, some, sampling=sampling, cache_salt="seeded")
    other = await answers(stub, some[:1], sampling=common_pb2.Sampling(temperature=0.9, seed=99), cache_salt="seeded")

    async def kill(tokens: int) -> None:
        if tokens == 20:
            fleet.kill("decode-0")

    here = router_pb2.PlacementHint(decode_worker="decode-0", force_apart=True)
    message = request(some[0], NEW_TOKENS, ignore_eos=True, sampling=sampling, cache_salt="seeded", placement=here)
    replayed = await generate(stub, message, kill)
    assert (replayed.code, replayed.finished.replays) == (grpc.StatusCode.OK, 1)
    assert [out.tokens for out in cached] == [out.tokens for out in cold]
    assert replayed.tokens == cold[0].tokens
    assert other[0].tokens != cold[0].tokens
    await asyncio.to_thread(fleet.restart, "decode-0")
