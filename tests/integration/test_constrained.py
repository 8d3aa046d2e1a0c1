"""Constrained answers of a whole fleet: valid, without a gap, and the same for a seed wherever they are made."""

from __future__ import annotations

import asyncio
import json
import re
from typing import Any

import grpc
import pytest

from headway.fleet import Fleet, FleetSpec
from headway.text.tokenizer import load_tokenizer
from headway.v1 import common_pb2, router_pb2
from tests.reference import model_folder
from tests.support import Outcome, Stub, generate, request, settled

pytest.importorskip("llguidance", reason="llguidance is not installed (pip install .[constrained])")
pytestmark = [pytest.mark.model, pytest.mark.timeout(600)]

SPEC = FleetSpec(prefill=1, decode=1, mixed=1)
CITY = {
    "type": "object",
    "properties": {
        "city": {"type": "string", "maxLength": 12},
        "country": {"enum": ["France", "Germany", "Italy"]},
        "inhabitants": {"type": "integer", "minimum": 0, "maximum": 99999999},
        "sights": {"type": "array", "items": {"type": "string", "maxLength": 9}, "minItems": 1, "maxItems": 2},
    },
    "required": ["city", "country", "inhabitants", "sights"],
    "additionalProperties": False,
}
APART = router_pb2.PlacementHint(force_apart=True)
MIXED = router_pb2.PlacementHint(decode_worker="mixed-0")


@pytest.fixture(scope="module", autouse=True)
def _model() -> None:
    try:
        model_folder()
    except LookupError as error:
        pytest.skip(str(error))


def chat(question: str = "Tell me about Paris, as JSON.") -> list[int]:
    return load_tokenizer(str(model_folder())).encode_chat([("user", question)])


def sampling(temperature: float = 0.0, seed: int = 0, **kind: Any) -> common_pb2.Sampling:
    return common_pb2.Sampling(temperature=temperature, seed=seed, constraint=common_pb2.Constraint(**kind))


def check_city(out: Outcome) -> dict[str, Any]:
    """Valid under CITY, whole and without a gap."""
    assert (out.code, out.details) == (grpc.StatusCode.OK, "")
    assert out.indexes == list(range(len(out.tokens)))
    assert out.finished.reason == common_pb2.FINISH_REASON_STOP
    city: dict[str, Any] = json.loads(out.text)
    assert set(city) == set(CITY["properties"])  # type: ignore[call-overload]
    assert len(city["city"]) <= 12
    assert city["country"] in ("France", "Germany", "Italy")
    assert isinstance(city["inhabitants"], int)
    assert 0 <= city["inhabitants"] <= 99999999
    assert 1 <= len(city["sights"]) <= 2
    assert all(len(sight) <= 9 for sight in city["sights"])
    return city


async def test_json_under_a_schema(fleet: Fleet, stub: Stub) -> None:
    """Greedy, and drawn; the same on workers of all kinds."""
    for temperature in (0.0, 1.5):
        kind = sampling(temperature, 7, json_schema=json.dumps(CITY))
        apart = await generate(stub, request(chat(), 120, sampling=kind, placement=APART))
        mixed = await generate(stub, request(chat(), 120, sampling=kind, placement=MIXED))
        check_city(apart)
        assert apart.tokens == mixed.tokens
        assert apart.finished.prefill_worker == "prefill-0"
        # Who computed its prompt is for the router to say.
        assert mixed.finished.decode_worker == "mixed-0"
    await settled(fleet.kvstore_address)


async def test_any_json_object(stub: Stub) -> None:
    kind = sampling(json_object=common_pb2.JsonObject())
    text = b'Answers are short JSON objects.\nThe capital of Spain: {"capital": "Madrid"}\nThe capital of France:'
    out = await generate(stub, router_pb2.GenerateRequest(text=text, max_tokens=60, sampling=kind))
    assert out.finished.reason == common_pb2.FINISH_REASON_STOP, out
    assert isinstance(json.loads(out.text), dict)


@pytest.mark.parametrize("ignore_eos", [False, True])
async def test_regex(stub: Stub, ignore_eos: bool) -> None:
    """Also without an end token: the answer ends where nothing may follow."""
    regex = r"(January|May) ([1-9]|[12][0-9]), (19|20)[0-9]{2}"
    for seed in range(2):
        kind = sampling(2.0, seed, regex=regex)
        out = await generate(stub, request(chat("When?"), 40, sampling=kind, ignore_eos=ignore_eos, placement=APART))
        assert re.fullmatch(regex, out.text)
        assert out.finished.reason == common_pb2.FINISH_REASON_STOP


async def test_the_models_end_token_comes_only_where_the_text_is_whole(stub: Stub) -> None:
    """Biased so that it would come first of all, and with ignore_eos never."""
    kind = sampling(regex="(ab)+")
    kind.logit_bias[2] = 1000.0
    out = await generate(stub, request(chat(), 40, sampling=kind))
    assert (out.text, out.tokens[-1], out.finished.stop_token_id) == ("ab", 2, 2)
    forever = await generate(stub, request(chat(), 40, sampling=kind, ignore_eos=True))
    assert 2 not in forever.tokens
    assert (len(forever.tokens), forever.finished.reason) == (40, common_pb2.FINISH_REASON_LENGTH)


async def test_choices_that_are_one_token_need_no_decode_worker(stub: Stub) -> None:
    kind = sampling(choices=common_pb2.Choices(texts=["yes", "no"]))
    out = await generate(stub, request(chat("Is the sky blue?"), 9, sampling=kind, placement=APART))
    assert out.text in ("yes", "no")
    assert (len(out.tokens), out.finished.reason) == (1, common_pb2.FINISH_REASON_STOP)
    assert not out.finished.HasField("stop_token_id")


async def test_stop_strings_and_max_tokens_end_it_earlier(stub: Stub) -> None:
    kind = sampling(regex="one, two, three, four")
    out = await generate(stub, request(chat(), 40, sampling=kind, stop_strings=["wo, th"]))
    assert (out.text, out.finished.stop_string) == ("one, t", "wo, th")
    cut = await generate(stub, request(chat(), 3, sampling=kind))
    assert (len(cut.tokens), cut.finished.reason) == (3, common_pb2.FINISH_REASON_LENGTH)
    assert "one, two, three, four".startswith(cut.text)


async def test_every_choice_of_n_meets_it(stub: Stub) -> None:
    message = request(chat(), 120, sampling=sampling(1.5, 5, json_schema=json.dumps(CITY)), n=4, placement=APART)
    texts = dict.fromkeys(range(4), "")
    async for response in stub.Generate(message, timeout=120):
        texts[response.choice] += response.delta.text
    cities = [json.loads(text) for text in texts.values()]
    assert all(set(city) == set(CITY["properties"]) for city in cities)  # type: ignore[call-overload]
    assert len(set(texts.values())) > 1


async def test_a_worker_that_dies_midway_changes_nothing(fleet: Fleet, stub: Stub) -> None:
    kind = sampling(1.2, 11, json_schema=json.dumps(CITY))
    wanted = await generate(stub, request(chat(), 120, sampling=kind, placement=APART))
    check_city(wanted)
    for victim, position in (("decode-0", 9), ("mixed-0", 17)):

        async def kill(tokens: int, victim: str = victim, position: int = position) -> None:
            if tokens == position:
                fleet.kill(victim)

        here = router_pb2.PlacementHint(decode_worker=victim, force_apart=victim == "decode-0")
        out = await generate(stub, request(chat(), 120, sampling=kind, placement=here), kill)
        check_city(out)
        assert out.tokens == wanted.tokens
        assert out.finished.replays == 1
        assert await asyncio.to_thread(fleet.restart, victim) is None
        await asyncio.to_thread(fleet.wait_ready, 120)
    await settled(fleet.kvstore_address)


async def test_a_constraint_that_no_worker_can_use_is_refused(fleet: Fleet, stub: Stub) -> None:
    """The router's trial has a smaller vocabulary; the worker has the last word."""
    for regex, sentence in (("[", "unclosed character class"), ("(.{0,1000}){0,1000}b", "too many expressions")):
        out = await generate(stub, request(chat(), 40, sampling=sampling(regex=regex)))
        assert out.code == grpc.StatusCode.INVALID_ARGUMENT
        assert sentence in out.details
        assert not out.tokens
    await settled(fleet.kvstore_address)
