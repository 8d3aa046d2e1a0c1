"""Every bad request: its status, a sentence that says what to change, and nothing left in flight."""

from __future__ import annotations

from typing import Any

import grpc
import pytest

from headway.v1 import common_pb2, router_pb2
from tests.router.fakes import Rig

INVALID = grpc.StatusCode.INVALID_ARGUMENT


def chat(role: str) -> dict[str, Any]:
    return {"chat": {"messages": [{"role": role, "content": "hi"}]}}


def ids(*token_ids: int) -> dict[str, Any]:
    return {"tokens": {"token_ids": token_ids}}


def sampling(**fields: Any) -> dict[str, Any]:
    return {**ids(1), "sampling": common_pb2.Sampling(**fields)}


CASES: list[tuple[dict[str, Any], grpc.StatusCode, str]] = [
    ({}, INVALID, "the prompt is empty"),
    ({"text": b""}, INVALID, "the prompt is empty"),
    (ids(), INVALID, "the prompt is empty"),
    ({"chat": {}}, INVALID, "give the chat at least one message"),
    (chat("robot"), INVALID, "use one of system, user, assistant"),
    ({"text": b"ab\xff"}, INVALID, "not valid UTF-8 at byte 2; send UTF-8 text"),
    (ids(*[1] * 64), INVALID, "takes at most 63; shorten it"),
    ({"text": b"a" * 30_000}, INVALID, "takes at most 63; shorten it"),
    (ids(1, 256), INVALID, "token id 256 in the prompt is unknown; 'toy' has ids 0 to 255"),
    ({**ids(1), "model": "other"}, grpc.StatusCode.NOT_FOUND, "this fleet serves 'toy'"),
    ({**ids(1), "max_tokens": 0}, INVALID, "ask for at least 1 token"),
    ({**ids(1), "n": 0}, INVALID, "n is 0; it must be at least 1 and at most 16"),
    ({**ids(1), "n": 17}, INVALID, "n is 17; it must be at least 1 and at most 16"),
    ({**ids(1), "top_logprobs": 21}, INVALID, "top_logprobs is 21; it must be at least 0 and at most 20"),
    ({**ids(1), "stop_strings": ["x"] * 17}, INVALID, "the number of stop_strings is 17"),
    ({**ids(1), "stop_strings": ["x" * 1025]}, INVALID, "the length of a stop string is 1025"),
    ({**ids(1), "stop_strings": [""]}, INVALID, "a stop string is empty"),
    ({**ids(1), "stop_token_ids": [999]}, INVALID, "token id 999 in stop_token_ids"),
    ({**ids(1), "stop_token_ids": [1] * 257}, INVALID, "the number of stop_token_ids is 257"),
    ({**ids(1), "deadline_s": 0.0}, INVALID, "deadline_s is 0; it must be a number of seconds above 0"),
    ({**ids(1), "deadline_s": -1.0}, INVALID, "deadline_s is -1"),
    ({**ids(1), "deadline_s": float("nan")}, INVALID, "deadline_s is nan"),
    ({**ids(1), "ttft_objective_s": 0.0}, INVALID, "ttft_objective_s is 0"),
    ({**ids(1), "request_id": "x" * 129}, INVALID, "request_id is longer than 128 characters"),
    ({**ids(1), "placement": {"prefill_worker": "p9"}}, INVALID, "which this fleet does not have; it has p0"),
    ({**ids(1), "placement": {"decode_worker": "p0"}}, INVALID, "which this fleet does not have; it has d0"),
    (sampling(temperature=-0.5), INVALID, "temperature is -0.5; it must be at least 0"),
    (sampling(temperature=float("nan")), INVALID, "temperature is nan"),
    (sampling(temperature=1e9), INVALID, "temperature is 1000000000.0"),
    (sampling(top_p=0.0), INVALID, "top_p is 0.0; it must be above 0 and at most 1"),
    (sampling(top_p=1.5), INVALID, "top_p is 1.5"),
    (sampling(min_p=-1.0), INVALID, "min_p is -1.0"),
    (sampling(repetition_penalty=0.0), INVALID, "repetition_penalty is 0.0"),
    (sampling(presence_penalty=float("inf")), INVALID, "presence_penalty is inf"),
    (sampling(frequency_penalty=1e6), INVALID, "frequency_penalty is 1000000.0"),
    (sampling(bad_words=[{"token_ids": []}]), INVALID, "one of bad_words has no tokens"),
    (sampling(bad_words=[{"token_ids": [1, 300]}]), INVALID, "token id 300 in bad_words"),
    (sampling(bad_words=[{"token_ids": [1]}] * 300), INVALID, "number of bad_words is 300"),
    (sampling(logit_bias={300: 1.0}), INVALID, "token id 300 in logit_bias"),
    (sampling(logit_bias={3: float("nan")}), INVALID, "logit_bias of token 3 is nan"),
]


async def test_each_bad_request_gets_its_sentence_and_leaves_nothing() -> None:
    async with Rig() as rig:
        prefill, decode = await rig.add("p0"), await rig.add("d0")
        for fields, code, sentence in CASES:
            got = await rig.refused(router_pb2.GenerateRequest(**fields))
            assert got[0] is code, (fields, got)
            assert sentence in got[1], (fields, got)
        assert not prefill.messages
        assert not decode.messages


async def test_explain_refuses_alike() -> None:
    async with Rig() as rig:
        await rig.add("m0")
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await rig.stub.Explain(router_pb2.ExplainRequest())
        assert caught.value.code() is INVALID
