"""What a caller may ask for, and the proto message that says it."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any, TypedDict, cast

import grpc

from headway.client.errors import HeadwayClientError
from headway.v1 import common_pb2, router_pb2

Message = tuple[str, str] | Mapping[str, str]
"""(role, content), or {"role": …, "content": …}."""

Prompt = str | bytes | Sequence[int] | Sequence[Message]
"""Text, token ids, or a chat."""

SAMPLING = (
    "temperature", "top_p", "top_k", "min_p", "repetition_penalty", "presence_penalty", "frequency_penalty", "seed",
    "logit_bias", "bad_words",
)  # fmt: skip
CONSTRAINTS = ("json_schema", "json_object", "regex", "choices")
PLACEMENT = ("prefill_worker", "decode_worker", "force_apart")


class Options(TypedDict, total=False):
    """All of GenerateRequest but the prompt; what is left out takes the router's default. Times are in seconds."""

    model: str
    max_tokens: int
    stop_strings: Sequence[str]
    stop_token_ids: Sequence[int]
    ignore_eos: bool
    top_logprobs: int
    n: int
    temperature: float
    top_p: float
    top_k: int
    min_p: float
    repetition_penalty: float
    presence_penalty: float
    frequency_penalty: float
    seed: int
    logit_bias: Mapping[int, float]
    bad_words: Sequence[Sequence[int]]
    # At most one of these says what the whole answer must be: JSON under this schema, any JSON object, text that
    # matches this regex (in the syntax of Rust's), one of these texts.
    json_schema: str | Mapping[str, Any]
    json_object: bool
    regex: str
    choices: Sequence[str]
    priority: int
    deadline_s: float
    ttft_objective_s: float
    refuse_late: bool
    expected_tokens: int
    tenant: str
    cache_salt: str
    request_id: str
    prefill_worker: str
    decode_worker: str
    force_apart: bool


def build_request(prompt: Prompt, options: Options) -> router_pb2.GenerateRequest:
    """Raises HeadwayClientError (INVALID_ARGUMENT) on what no GenerateRequest can hold, such as a negative count."""
    given = {name: value for name, value in cast(dict[str, Any], options).items() if value is not None}
    sampling = {name: given.pop(name) for name in SAMPLING if name in given}
    if "bad_words" in sampling:
        sampling["bad_words"] = [{"token_ids": phrase} for phrase in sampling["bad_words"]]
    constraint = {name: given.pop(name) for name in CONSTRAINTS if name in given}
    if constraint.get("json_object") is False:
        del constraint["json_object"]
    placement = {name: given.pop(name) for name in PLACEMENT if name in given}
    try:
        request = router_pb2.GenerateRequest(**given, **_prompt(prompt))
        if sampling:
            request.sampling.MergeFrom(type(request.sampling)(**sampling))
        if constraint:
            request.sampling.constraint.MergeFrom(_constraint(constraint))
        if placement:
            request.placement.MergeFrom(router_pb2.PlacementHint(**placement))
    except (ValueError, TypeError) as error:
        raise HeadwayClientError(grpc.StatusCode.INVALID_ARGUMENT, f"the request is not valid: {error}") from None
    return request


def rpc_timeout_s(request: router_pb2.GenerateRequest) -> float | None:
    """A little after the request's own deadline, so that the router's sentence about it arrives."""
    return request.deadline_s + 1.0 if request.HasField("deadline_s") else None


def _constraint(given: dict[str, Any]) -> common_pb2.Constraint:
    if len(given) > 1:
        raise ValueError(f"an answer has one constraint at most, not {' and '.join(given)}")
    ((name, value),) = given.items()
    if name == "json_object":
        return common_pb2.Constraint(json_object=common_pb2.JsonObject())
    if name == "choices":
        return common_pb2.Constraint(choices=common_pb2.Choices(texts=value))
    if name == "regex":
        return common_pb2.Constraint(regex=value)
    return common_pb2.Constraint(json_schema=value if isinstance(value, str) else json.dumps(value))


def _prompt(prompt: Prompt) -> dict[str, Any]:
    if isinstance(prompt, str):
        return {"text": prompt.encode()}
    if isinstance(prompt, bytes):
        return {"text": prompt}
    if prompt and not isinstance(prompt[0], int):
        messages = [_message(message) for message in cast(Sequence[Message], prompt)]
        return {"chat": router_pb2.ChatPrompt(messages=messages)}
    return {"tokens": router_pb2.TokenPrompt(token_ids=cast(Sequence[int], prompt))}


def _message(message: Message) -> router_pb2.ChatMessage:
    if isinstance(message, Mapping):
        unknown = set(message) - {"role", "content"}
        if unknown or len(message) != 2:
            raise ValueError(f"a chat message has the keys role and content, not {sorted(message)}")
        return router_pb2.ChatMessage(role=message["role"], content=message["content"])
    role, content = message
    return router_pb2.ChatMessage(role=role, content=content)
