"""A sequence as a worker's engine sees it: tokens, how far they are computed and sealed, and when it ends."""

from __future__ import annotations

import enum
from dataclasses import dataclass

from headway.core.keys import ROOT, block_keys, common_blocks
from headway.core.sampling import Sampling


class Finish(enum.Enum):
    STOP = "stop"
    LENGTH = "length"


@dataclass(slots=True, eq=False)
class Sequence:
    """tokens: prompt proper, then outputs.

        tokens   [ prompt proper ......... | outputs ...... ]
        computed [ K and V in the slab ............ ) pending
        sealed   [ full blocks, in blocks )

    While decoding, exactly one token (the last one drawn) is pending.
    """

    sequence_id: str
    attempt: int
    tokens: list[int]
    prompt_tokens: int
    namespace: bytes
    keys: list[bytes]
    sampling: Sampling
    max_tokens: int
    stop_token_ids: frozenset[int]
    arrival_s: float
    block_size: int
    context_tokens: int
    top_logprobs: int | None = None
    priority: int = 0
    choice: int = 0
    tenant: str = ""
    # Of the answer, as far as the router can tell; 0: not known.
    expected_tokens: int = 0
    # When its first token is due, on the clock of arrival_s; None: whenever it comes.
    first_token_due_s: float | None = None
    # Seconds from its receipt here after which it ends by itself; None for never.
    deadline_s: float | None = None
    computed: int = 0
    # Of the prompt, what a sibling has computed since its cached prefix was looked up; for its place in the queue.
    likely: int = 0
    sealed: int = 0
    # Of what this worker had to have before its first token: what the prefix cache saved.
    cached_tokens: int = 0
    # Where the sequence stood when it came to this worker: decoding starts after this many tokens.
    given: int = 0

    @property
    def pending(self) -> int:
        """Tokens whose K and V are not in the slab yet."""
        return len(self.tokens) - self.computed

    @property
    def output_index(self) -> int:
        """Of the token that comes next."""
        return len(self.tokens) - self.prompt_tokens

    @property
    def decoding(self) -> bool:
        """One drawn token pending, all else computed."""
        return self.pending == 1 and len(self.tokens) > self.given

    def may_have(self, keys: list[bytes]) -> None:
        """Blocks with these keys, a chain, are in the cache now."""
        at = self.computed // self.block_size
        if at < min(len(keys), len(self.keys)) and keys[at] == self.keys[at]:
            common = common_blocks(keys, self.keys) * self.block_size
            self.likely = min(max(self.likely, common), len(self.tokens) - 1)

    def sealable(self) -> tuple[int, list[bytes], bytes]:
        """First block, keys and parent key of the blocks that are full, computed and not yet sealed."""
        first, full = self.sealed, self.computed // self.block_size
        self._extend_keys(full)
        return first, self.keys[first:full], self.keys[first - 1] if first else ROOT

    def finish_after(self, token_id: int) -> Finish | None:
        """Whether the answer ends with this token, just appended to `tokens`."""
        if token_id in self.stop_token_ids:
            return Finish.STOP
        if self.output_index >= self.max_tokens or len(self.tokens) >= self.context_tokens:
            return Finish.LENGTH
        return None

    def restart(self) -> None:
        """Forget what was computed (the slots are gone); tokens stay, so the next draw has the right index."""
        self.computed = self.sealed = 0
        self.given = len(self.tokens)

    def _extend_keys(self, blocks: int) -> None:
        have = len(self.keys)
        if blocks > have:
            tokens = self.tokens[have * self.block_size : blocks * self.block_size]
            self.keys += block_keys(self.namespace, tokens, self.block_size, self.keys[-1] if have else ROOT)
