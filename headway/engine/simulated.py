"""An engine without a model: same contract, a latency model for time, and tokens that are a pure function of context.

Each token's KV is one uint64: a polynomial hash of the context up to it, computed from the predecessor's value *in the
slab*. The next token depends on that value and on the last value of every earlier block, so that a wrong, lost or
repeated token, and a wrong byte in any block, changes the rest of the answer.
"""

from __future__ import annotations

import hashlib
import os
import signal
import time
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from headway.core.model import KvFormat, LayerGroup, ModelCard
from headway.core.sampling import ConstraintError
from headway.engine.contract import Chunk, Draw, Drawn, SlabArray

Words = npt.NDArray[np.uint64]

# A forward that comes so soon after another is what a device would have had in its queue.
QUEUED_S = 0.01
VOCABULARY = 256
PRINTABLE = 95
_BASE = 0x9E3779B97F4A7C15
_INVERSE = pow(_BASE, -1, 1 << 64)
_MASK = (1 << 64) - 1
# Weights of as many blocks as any sequence has.
_ODD = np.arange(1, 1 << 17, 2, dtype=np.uint64)


@dataclass(frozen=True, slots=True)
class Latency:
    """Seconds: prefill a + b·new + c·new·(cached + new/2), step a + b·batch + c·kv tokens (see core.predict)."""

    prefill: tuple[float, float, float] = (0.0, 0.0, 0.0)
    step: tuple[float, float, float] = (0.0, 0.0, 0.0)

    def of(self, chunks: Sequence[Chunk]) -> float:
        """Seconds that one forward of these chunks takes."""
        seconds = 0.0
        fills = [chunk for chunk in chunks if not decodes(chunk)]
        if fills:
            new = sum(len(chunk.tokens) for chunk in fills)
            attended = sum(len(chunk.tokens) * (chunk.position + len(chunk.tokens) / 2) for chunk in fills)
            seconds += self.prefill[0] + self.prefill[1] * new + self.prefill[2] * attended
        steps = [chunk for chunk in chunks if decodes(chunk)]
        if steps:
            rows = sum(len(chunk.tokens) for chunk in steps)
            kv = sum(chunk.position for chunk in steps)
            seconds += self.step[0] + self.step[1] * rows + self.step[2] * kv
        return seconds


def decodes(chunk: Chunk) -> bool:
    """Whether it is a step of an answer, and not the end of a prompt of which one token was not cached."""
    return len(chunk.tokens) == 1 + chunk.drafts and chunk.draw is not None and chunk.draw.output_index > 0


def simulated_card(context_tokens: int = 131072, block_size: int = 16) -> ModelCard:
    """The card of the simulated model: byte tokenizer, 8 bytes of KV a token."""
    kv_format = KvFormat(block_size, "uint64", "token", (LayerGroup(1, 1, 1, 8),))
    fingerprint = hashlib.blake2b(b"headway simulated engine 1", digest_size=16).digest()
    return ModelCard("simulated", fingerprint, context_tokens, VOCABULARY, (), kv_format)


class SimulatedEngine:
    """See the module. `poison_token` in a chunk kills the process, as a request that crashes a real engine would.

    A thread that sleeps wakes up late where the machine is busy, which a device would not: the next forward takes so
    much less, if it comes at once. What passes between two forwards is the worker's own affair, and counts.
    """

    def __init__(
        self,
        card: ModelCard,
        latency: Latency | None = None,
        *,
        poison_token: int | None = None,
        sleep: Callable[[float], None] = time.sleep,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.card = card
        self.interruptible = False
        self._latency = latency or Latency()
        self._poison = poison_token
        self._sleep = sleep
        self._clock = clock
        # When the last forward ended here, and how much later than it should have.
        self._ended_s = self._late_s = 0.0
        self._block = card.kv_format.block_size
        self._slab: Words = np.zeros((0, self._block), np.uint64)
        self._powers = _powers(_BASE, 4096)
        self._inverses = _powers(_INVERSE, 4096)

    def bind(self, slab: SlabArray) -> None:
        self._slab = np.from_dlpack(slab).view(np.uint64)[:, : self._block]

    def unbind(self) -> None:
        self._slab = np.zeros((0, self._block), np.uint64)

    def scratch(self, slots: int, stride: int) -> SlabArray:
        return np.zeros((slots, stride), np.uint8)

    def use_threads(self, count: int) -> None:
        pass

    def forget(self, sequence: Hashable) -> None:
        pass

    def forward(
        self, chunks: Sequence[Chunk], between: Callable[[], None] | None = None
    ) -> list[Drawn | ConstraintError | None]:
        if self._poison is not None and any(self._poison in chunk.tokens for chunk in chunks):
            os.kill(os.getpid(), signal.SIGKILL)
        started_s = self._clock()
        if started_s - self._ended_s < QUEUED_S:
            started_s -= self._late_s
        until_s = started_s + self._latency.of(chunks)
        drawn = [self._compute(chunk) for chunk in chunks]
        left_s = until_s - self._clock()
        if left_s > 0:
            self._sleep(left_s)
        self._ended_s = self._clock()
        self._late_s = max(0.0, self._ended_s - until_s) if left_s > 0 else 0.0
        return drawn

    def _compute(self, chunk: Chunk) -> Drawn | ConstraintError | None:
        start, end = chunk.position, chunk.position + len(chunk.tokens)
        last = int(self._slab[chunk.slots[(start - 1) // self._block], (start - 1) % self._block]) if start else 0
        if len(chunk.tokens) == 1:
            # A step of decode, of which there are many: without arrays.
            value = (last * _BASE + chunk.tokens[0] + 1) & _MASK
            self._slab[chunk.slots[start // self._block], start % self._block] = value
        else:
            positions = np.arange(start, end)
            hashes = self._hash(last, np.asarray(chunk.tokens, np.uint64))
            self._slab[chunk.slots[positions // self._block], positions % self._block] = hashes
        if chunk.draw is None:
            return None
        return chunk.kept([self._draw(chunk, end - chunk.drafts + at, draw) for at, draw in enumerate(chunk.draws)])

    def _draw(self, chunk: Chunk, length: int, draw: Draw) -> Drawn | ConstraintError:
        """What follows the sequence's first `length` tokens."""
        last = self._slab[chunk.slots[(length - 1) // self._block], (length - 1) % self._block]
        ends = self._slab[chunk.slots[: length // self._block], self._block - 1]
        try:
            token = draw_token(int(last) ^ _fold(ends), draw)
            complete = draw.matcher is not None and draw.matcher.complete([*draw.outputs, token])
        except ConstraintError as error:
            return error
        if draw.top_logprobs is None:
            return Drawn(token, complete=complete)
        return Drawn(token, -1.0, ((token, -1.0),)[: draw.top_logprobs], complete=complete)

    def _hash(self, last: int, tokens: Words) -> Words:
        """Rolling hashes: h[i] = h[i-1]·BASE + tokens[i] + 1 (mod 2⁶⁴), in closed form."""
        hashes = np.empty(len(tokens), np.uint64)
        for at in range(0, len(tokens), len(self._powers)):
            piece = tokens[at : at + len(self._powers)] + np.uint64(1)
            sums = np.cumsum(piece * self._inverses[: len(piece)], dtype=np.uint64) + np.uint64(last)
            hashes[at : at + len(piece)] = sums * self._powers[: len(piece)]
            last = int(hashes[at + len(piece) - 1])
        return hashes


def draw_token(state: int, draw: Draw) -> int:
    """A printable byte from the context's state, or one of those bytes that the draw's constraint allows; the seed,
    choice and output index count unless greedy. Raises ConstraintError where it allows none.
    """
    if not draw.sampling.greedy:
        state ^= _mix(draw.sampling.seed ^ _mix(draw.choice << 32 | draw.output_index))
    if draw.sampling.constraint is None:
        return 32 + _mix(state) % PRINTABLE
    if draw.matcher is None:
        raise ValueError("a draw with a constraint needs a matcher")
    allowed = np.flatnonzero(draw.matcher.allowed(draw.outputs))
    if not len(allowed):
        raise ConstraintError("no token may come next: the constraint leaves none")
    return int(allowed[_mix(state) % len(allowed)])


def expected_tokens(prompt: Sequence[int], count: int, draw: Callable[[int], Draw], block_size: int = 16) -> list[int]:
    """What any correct fleet of simulated engines answers to `prompt`: the reference for tests, in plain integers."""
    value, ends, length, out = 0, [], 0, []
    for token in prompt:
        value, length = (value * _BASE + token + 1) & _MASK, length + 1
        if length % block_size == 0:
            ends.append(value)
    for index in range(count):
        out.append(draw_token(value ^ _fold(np.asarray(ends, np.uint64)), draw(index)))
        value, length = (value * _BASE + out[-1] + 1) & _MASK, length + 1
        if length % block_size == 0:
            ends.append(value)
    return out


def _powers(base: int, count: int) -> Words:
    """base¹ … base^count (mod 2⁶⁴)."""
    powers = [1]
    for _ in range(count):
        powers.append(powers[-1] * base & _MASK)
    return np.asarray(powers[1:], np.uint64)


def _fold(ends: Words) -> int:
    """One word out of the blocks' last hashes, in which each block's place counts."""
    return int(ends @ _ODD[: len(ends)])


def _mix(value: int) -> int:
    """splitmix64's finaliser."""
    value = (value + 0x9E3779B97F4A7C15) & _MASK
    value = ((value ^ (value >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
    value = ((value ^ (value >> 27)) * 0x94D049BB133111EB) & _MASK
    return value ^ (value >> 31)
