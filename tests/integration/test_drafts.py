"""Drafts in the whole system, with the default model: a text that is repeated comes in fewer steps, token for token."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

import grpc
import pytest

from headway.fleet import Fleet, FleetSpec
from headway.text.tokenizer import load_tokenizer
from headway.v1 import common_pb2, router_pb2
from tests.reference import check_equal, model_folder, reference
from tests.support import Outcome, Stub, generate, request, settled

pytestmark = [pytest.mark.model, pytest.mark.timeout(900)]

DRAFTS, NONE = "mixed-0", "mixed-1"
SPEC = FleetSpec(prefill=0, decode=0, mixed=2, flags={DRAFTS: ["--speculate", "always"], NONE: ["--speculate", "off"]})
TOKENS = 64
TEXT = (
    "The harbour lay quiet in the early morning. Three boats came in before sunrise, and nobody asked where they had "
    "been. The harbour master wrote down their names, drank his coffee, and went back to sleep."
)


@pytest.fixture(scope="module")
def prompt() -> list[int]:
    """Asks for a text that it holds."""
    try:
        folder = model_folder()
    except LookupError as error:
        pytest.skip(str(error))
    return load_tokenizer(str(folder)).encode_chat([("user", f"Write this text again, word for word: {TEXT}")])


async def answer(stub: Stub, prompt: Sequence[int], worker: str, **fields: object) -> Outcome:
    here = router_pb2.PlacementHint(decode_worker=worker)
    out = await generate(stub, request(prompt, TOKENS, ignore_eos=True, placement=here, **fields), timeout=300)
    assert (out.code, out.details) == (grpc.StatusCode.OK, "")
    assert out.finished.decode_worker == worker
    assert out.indexes == list(range(len(out.tokens)))
    return out


async def test_a_text_that_is_repeated_takes_fewer_steps_than_tokens(
    fleet: Fleet, stub: Stub, prompt: list[int]
) -> None:
    out = await answer(stub, prompt, DRAFTS)
    usage = out.finished.usage
    for line in check_equal([out.tokens], [reference(prompt, TOKENS)]):
        print(line)
    assert usage.output_tokens == TOKENS
    # Each draft that was right is a step that was not needed.
    assert 0 < usage.accepted_tokens <= usage.drafted_tokens
    plain = await answer(stub, prompt, NONE)
    assert plain.tokens == out.tokens
    assert (plain.finished.usage.drafted_tokens, plain.finished.usage.accepted_tokens) == (0, 0)
    await settled(fleet.kvstore_address)


async def test_what_is_drawn_at_random_is_the_same_with_drafts_and_without(stub: Stub, prompt: list[int]) -> None:
    sampling = common_pb2.Sampling(temperature=0.7, top_p=0.9, seed=11, repetition_penalty=1.05)
    drafted, plain = await asyncio.gather(
        answer(stub, prompt, DRAFTS, sampling=sampling), answer(stub, prompt, NONE, sampling=sampling)
    )
    assert drafted.tokens == plain.tokens
    assert drafted.finished.usage.drafted_tokens > 0


async def test_an_answer_ends_at_its_stop_token_and_its_stop_string_though_more_was_right(
    fleet: Fleet, stub: Stub, prompt: list[int]
) -> None:
    out = await answer(stub, prompt, DRAFTS)
    at = next(at for at in range(8, TOKENS) if out.tokens.index(out.tokens[at]) == at)
    stopped = await answer(stub, prompt, DRAFTS, stop_token_ids=[out.tokens[at]])
    assert stopped.tokens == out.tokens[: at + 1]
    assert stopped.finished.reason == common_pb2.FINISH_REASON_STOP
    stop = out.text[60:72]
    cut = await answer(stub, prompt, DRAFTS, stop_strings=[stop])
    assert cut.text == out.text[: out.text.index(stop)]
    assert cut.finished.stop_string == stop
    assert cut.tokens == out.tokens[: len(cut.tokens)]
    await settled(fleet.kvstore_address)
