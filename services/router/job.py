"""A request made ready to run: tokens, block keys, limits; shared by all its choices."""

from __future__ import annotations

import asyncio
import random
import time
from array import array
from collections.abc import Sequence
from dataclasses import dataclass

from headway.core.ask import Ask
from headway.core.keys import block_keys, join_keys, key_namespace
from headway.core.place import Placer
from headway.runtime.convert import ids_to_bytes
from headway.runtime.errors import invalid
from headway.text.errors import TextError
from headway.text.tokenizer import Tokenizer
from headway.v1 import common_pb2, router_pb2
from services.router.constraints import ConstraintCheck
from services.router.model import ServedModel
from services.router.validate import check_request, check_tokens

DEFAULT_MAX_TOKENS = 256
# Longer ones are worked on in a thread, off the event loop.
LONG_TEXT_CHARACTERS = 20_000
LONG_PROMPT_TOKENS = 8192
# Tokens in one message; longer prompts are split.
PIECE_TOKENS = 8192


@dataclass(slots=True, eq=False)
class Job:
    """`received` is of the monotonic clock, `arrival_s` Unix seconds; `keys` are those of the prompt's full blocks.

    `route`: tenant and first block (a system prompt), by which the lengths of answers are learned.
    """

    request: router_pb2.GenerateRequest
    model: ServedModel
    tokenizer: Tokenizer
    received: float
    arrival_s: float
    deadline: float
    token_ids: array[int]
    keys: list[bytes]
    namespace: bytes
    sampling: common_pb2.Sampling
    max_tokens: int
    stop_token_ids: frozenset[int]
    choices: int
    route: tuple[str, bytes]
    expected_tokens: int
    route_s: float = 0.0

    @property
    def due(self) -> float | None:
        """When the first token must be there, or the request be refused; of the monotonic clock."""
        return self.received + self.request.ttft_objective_s if self.request.refuse_late else None

    def ask(self, placer: Placer, due_s: float | None, excluded: frozenset[str], *, hinted: bool) -> Ask:
        """What placement needs to know; worker hints count only where `hinted`. `due_s`: of the first token."""
        request, placement = self.request, self.request.placement
        resident, promised = placer.overlaps(self.keys)
        return Ask(
            prompt_tokens=len(self.token_ids),
            keys=self.keys,
            arrival_s=self.arrival_s,
            expected_tokens=self.expected_tokens,
            resident=resident,
            promised=promised,
            priority=request.priority,
            tenant=request.tenant,
            objective_s=due_s,
            prefill_worker=placement.prefill_worker if hinted else "",
            decode_worker=placement.decode_worker if hinted else "",
            force_apart=placement.force_apart,
            excluded=excluded,
        )

    def sequence(self, sequence_id: str, attempt: int, choice: int, sent: list[int]) -> list[common_pb2.Sequence]:
        """The messages that start this choice where it stands: prompt and what was sent, in pieces of 8,192."""
        tokens, keys = self.token_ids, self.keys
        if sent:
            tokens = tokens + array("I", sent)
            have = len(keys)
            rest = tokens[have * self.model.block_size :]
            keys = keys + block_keys(self.namespace, rest, self.model.block_size, *keys[-1:])
        request = self.request
        first = common_pb2.Sequence(
            sequence_id=sequence_id,
            attempt=attempt,
            tokens=ids_to_bytes(tokens[:PIECE_TOKENS]),
            prompt_tokens=len(self.token_ids),
            block_keys=join_keys(keys),
            key_namespace=self.namespace,
            sampling=self.sampling,
            max_tokens=self.max_tokens,
            stop_token_ids=self.stop_token_ids,
            arrival_s=self.arrival_s,
            deadline_s=max(0.001, self.deadline - time.monotonic()),
            priority=request.priority,
            choice=choice,
            expected_tokens=self.expected_tokens,
            tenant=request.tenant,
            more=len(tokens) > PIECE_TOKENS,
        )
        if request.refuse_late and not sent and not choice:
            first.first_token_due_s = self.arrival_s + request.ttft_objective_s
        if request.HasField("top_logprobs"):
            first.top_logprobs = request.top_logprobs
        pieces = [first]
        for start in range(PIECE_TOKENS, len(tokens), PIECE_TOKENS):
            part, more = tokens[start : start + PIECE_TOKENS], start + PIECE_TOKENS < len(tokens)
            tail = common_pb2.Sequence(sequence_id=sequence_id, attempt=attempt, tokens=ids_to_bytes(part), more=more)
            pieces.append(tail)
        return pieces


async def prepare(
    request: router_pb2.GenerateRequest,
    model: ServedModel,
    constraints: ConstraintCheck,
    received: float,
    deadline: float,
) -> Job:
    """Check and tokenize a request. Raises HeadwayError."""
    card = model.card
    sampling = check_request(request, card)
    if sampling.constraint is not None:
        await constraints.check(sampling.constraint)
    tokenizer = await model.tokenizer()
    token_ids = await _tokenize(request, tokenizer)
    check_tokens(token_ids, card)
    drawn = common_pb2.Sampling()
    drawn.CopyFrom(request.sampling)
    if not sampling.greedy and not drawn.HasField("seed"):
        drawn.seed = random.getrandbits(63)
    wanted = request.max_tokens if request.HasField("max_tokens") else DEFAULT_MAX_TOKENS
    stops = frozenset(request.stop_token_ids)
    namespace = key_namespace(card.fingerprint, model.format_digest, "", request.cache_salt)
    if len(token_ids) > LONG_PROMPT_TOKENS:
        keys = await asyncio.to_thread(block_keys, namespace, token_ids, model.block_size)
    else:
        keys = block_keys(namespace, token_ids, model.block_size)
    max_tokens = min(wanted, card.context_tokens - len(token_ids))
    route = (request.tenant, keys[0] if keys else b"")
    expected = request.expected_tokens or model.lengths.expect(route, max_tokens)
    return Job(
        request=request,
        model=model,
        tokenizer=tokenizer,
        received=received,
        arrival_s=time.time() - (time.monotonic() - received),
        deadline=deadline,
        token_ids=token_ids,
        keys=keys,
        namespace=namespace,
        sampling=drawn,
        max_tokens=max_tokens,
        stop_token_ids=stops if request.ignore_eos else stops.union(card.eos_token_ids),
        choices=request.n if request.HasField("n") else 1,
        route=route,
        expected_tokens=min(expected, max_tokens),
    )


async def token_ids_of(numbers: Sequence[int]) -> array[int]:
    """A piece at a time: all at once, a long prompt would hold up the event loop for milliseconds."""
    token_ids = array("I")
    for start in range(0, len(numbers), PIECE_TOKENS):
        if start:
            await asyncio.sleep(0)
        token_ids.extend(numbers[start : start + PIECE_TOKENS])
    return token_ids


async def _tokenize(request: router_pb2.GenerateRequest, tokenizer: Tokenizer) -> array[int]:
    kind = request.WhichOneof("prompt")
    if kind == "tokens":
        return await token_ids_of(request.tokens.token_ids)
    try:
        if kind == "text":
            text = request.text.decode()
            if len(text) > LONG_TEXT_CHARACTERS:
                return array("I", await asyncio.to_thread(tokenizer.encode, text))
            return array("I", tokenizer.encode(text))
        chat = [(message.role, message.content) for message in request.chat.messages]
        if sum(len(content) for _, content in chat) > LONG_TEXT_CHARACTERS:
            return array("I", await asyncio.to_thread(tokenizer.encode_chat, chat))
        return array("I", tokenizer.encode_chat(chat))
    except UnicodeDecodeError as error:
        raise invalid(f"the prompt's text is not valid UTF-8 at byte {error.start}; send UTF-8 text") from None
    except TextError as error:
        raise invalid(f"the prompt cannot be tokenized: {error}") from None
