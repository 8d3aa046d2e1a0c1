"""What a request may ask for; every refusal is one sentence that says what to change."""

from __future__ import annotations

import math
from array import array
from collections.abc import Iterable

import grpc

from headway.core.model import ModelCard
from headway.core.sampling import Sampling
from headway.runtime.convert import greatest_id, sampling_from_proto
from headway.runtime.errors import HeadwayError, invalid
from headway.v1 import common_pb2, router_pb2

MAX_CHOICES = 16
MAX_TOP_LOGPROBS = 20
MAX_STOP_STRINGS = 16
MAX_STOP_STRING_CHARACTERS = 1024
MAX_STOP_TOKENS = 256
MAX_LOGIT_BIASES = 1024
MAX_BAD_WORDS = 256
MAX_BAD_WORD_TOKENS = 32
MAX_SCHEMA_BYTES = 65_536
MAX_REGEX_BYTES = 8_192
MAX_CHOICES_TEXTS = 1_024
MAX_CHOICES_BYTES = 16_384
MAX_REQUEST_ID_CHARACTERS = 128
MAX_TENANT_CHARACTERS = 128
ROLES = ("system", "user", "assistant")


def check_request(request: router_pb2.GenerateRequest, card: ModelCard) -> Sampling:
    """Everything that can be said before tokenizing; the sampling parameters. Raises HeadwayError."""
    if request.model not in ("", card.name):
        message = f"model {request.model!r} is not served here; this fleet serves {card.name!r}"
        raise HeadwayError(grpc.StatusCode.NOT_FOUND, message)
    _check_prompt(request, card)
    _at_most("n", request.n if request.HasField("n") else 1, MAX_CHOICES, least=1)
    if request.HasField("max_tokens") and request.max_tokens == 0:
        raise invalid("max_tokens is 0; ask for at least 1 token, or leave it out")
    if request.HasField("top_logprobs"):
        _at_most("top_logprobs", request.top_logprobs, MAX_TOP_LOGPROBS)
    if request.HasField("deadline_s"):
        _seconds("deadline_s", request.deadline_s)
    if request.HasField("ttft_objective_s"):
        _seconds("ttft_objective_s", request.ttft_objective_s)
    elif request.refuse_late:
        raise invalid("refuse_late is set without ttft_objective_s; say when the first token is due")
    if request.HasField("expected_tokens"):
        _at_most("expected_tokens", request.expected_tokens, card.context_tokens, least=1)
    _at_most("the length of tenant", len(request.tenant), MAX_TENANT_CHARACTERS)
    if len(request.request_id) > MAX_REQUEST_ID_CHARACTERS:
        raise invalid(f"request_id is longer than {MAX_REQUEST_ID_CHARACTERS} characters; choose a shorter one")
    _check_stops(request, card)
    return _check_sampling(request, card)


def check_tokens(token_ids: array[int], card: ModelCard) -> None:
    """The tokenized prompt: at least one token, room for one more, all of the vocabulary. Raises HeadwayError."""
    if not token_ids:
        raise invalid("the prompt is empty; give at least one token")
    _check_length(len(token_ids), card)
    _in_vocabulary("the prompt", greatest_id(token_ids), card)


def _check_length(tokens: int, card: ModelCard) -> None:
    if tokens >= card.context_tokens:
        limit = card.context_tokens - 1
        raise invalid(f"the prompt has {tokens} tokens; {card.name!r} takes at most {limit}; shorten it")


def _check_prompt(request: router_pb2.GenerateRequest, card: ModelCard) -> None:
    kind = request.WhichOneof("prompt")
    if kind is None or (kind == "text" and not request.text) or (kind == "tokens" and not request.tokens.token_ids):
        raise invalid("the prompt is empty; give text, chat messages or token ids")
    if kind == "tokens":
        _check_length(len(request.tokens.token_ids), card)
    if kind != "chat":
        return
    if not request.chat.messages:
        raise invalid("the prompt is empty; give the chat at least one message")
    for message in request.chat.messages:
        if message.role not in ROLES:
            raise invalid(f"chat role {message.role!r} is unknown; use one of {', '.join(ROLES)}")


def _check_stops(request: router_pb2.GenerateRequest, card: ModelCard) -> None:
    _at_most("the number of stop_strings", len(request.stop_strings), MAX_STOP_STRINGS)
    for stop in request.stop_strings:
        if not stop:
            raise invalid("a stop string is empty; leave it out or give it text")
        _at_most("the length of a stop string", len(stop), MAX_STOP_STRING_CHARACTERS)
    _at_most("the number of stop_token_ids", len(request.stop_token_ids), MAX_STOP_TOKENS)
    _in_vocabulary("stop_token_ids", max(request.stop_token_ids, default=0), card)


def _check_sampling(request: router_pb2.GenerateRequest, card: ModelCard) -> Sampling:
    if not request.HasField("sampling"):
        return Sampling()
    bias: Iterable[int] = request.sampling.logit_bias
    _at_most("the number of logit_bias entries", len(request.sampling.logit_bias), MAX_LOGIT_BIASES)
    _in_vocabulary("logit_bias", max(bias, default=0), card)
    _at_most("the number of bad_words", len(request.sampling.bad_words), MAX_BAD_WORDS)
    for phrase in request.sampling.bad_words:
        _at_most("the number of tokens of one of bad_words", len(phrase.token_ids), MAX_BAD_WORD_TOKENS)
        _in_vocabulary("bad_words", max(phrase.token_ids, default=0), card)
    _check_constraint_size(request.sampling.constraint)
    try:
        return sampling_from_proto(request.sampling)
    except ValueError as error:
        raise invalid(f"sampling: {error}") from None


def _check_constraint_size(constraint: common_pb2.Constraint) -> None:
    """What the library takes grows with its text: once for all, and for each token."""
    texts = constraint.choices.texts
    _at_most("the length of json_schema in bytes", len(constraint.json_schema.encode()), MAX_SCHEMA_BYTES)
    _at_most("the length of regex in bytes", len(constraint.regex.encode()), MAX_REGEX_BYTES)
    _at_most("the number of choices", len(texts), MAX_CHOICES_TEXTS)
    _at_most("the length of all choices in bytes", sum(len(text.encode()) for text in texts), MAX_CHOICES_BYTES)


def _in_vocabulary(where: str, token_id: int, card: ModelCard) -> None:
    if token_id >= card.vocab_size:
        raise invalid(f"token id {token_id} in {where} is unknown; {card.name!r} has ids 0 to {card.vocab_size - 1}")


def _at_most(name: str, value: int, most: int, least: int = 0) -> None:
    if not least <= value <= most:
        raise invalid(f"{name} is {value}; it must be at least {least} and at most {most}")


def _seconds(name: str, value: float) -> None:
    if not (math.isfinite(value) and value > 0):
        raise invalid(f"{name} is {value:g}; it must be a number of seconds above 0")
