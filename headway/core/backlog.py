"""A worker's prompts as seen from outside: who is computed now, who waits, and when a newcomer would have its turn."""

from __future__ import annotations

import math
from bisect import bisect_right, insort
from collections.abc import Container, Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from headway.core.fair import NO_DEBTS
from headway.core.order import Key, Order
from headway.core.step import UNCUT, StepLimits

# Above every number that breaks ties.
_LAST = math.inf
# Before every key.
FIRST: Key = (-(1 << 62), -math.inf)
DEFAULT_ORDER = Order()


@dataclass(slots=True, eq=False)
class Prompt:
    """`key`: its place in the worker's order, without its `tenant`'s debt. `exec_s`, `tokens`: what is left to compute.

    `due_s`: when its first token was promised, on placement's clock. It cannot start before `ready_s`, nor while the
    prompt `after`, of which it needs the prefix, is not computed.
    """

    name: Hashable
    key: Key
    exec_s: float
    tokens: int
    due_s: float = math.inf
    ready_s: float = -math.inf
    after: Hashable = None
    tenant: str = ""


class Backlog:
    """What is believed of one worker's queue, kept current by what it was sent and by what it says.

    Of those that can start the prompt with the smallest key is taken to do so as soon as the worker is free, so that
    between two words of the worker the estimate runs on by itself. `limits`, `order`, `debts`: those of the worker.
    Keys that are compared here are with the tenant's debt (`with_debt`).
    """

    __slots__ = (
        "_exec_s", "_others", "_promised", "_prompts", "_waiting", "debts", "least_s", "limits", "order", "piece_s",
        "running", "tokens", "until_s",
    )  # fmt: skip

    def __init__(self, limits: StepLimits = UNCUT, order: Order = DEFAULT_ORDER) -> None:
        self.limits = limits
        self.order = order
        # By tenant, see core.fair.
        self.debts: Mapping[str, float] = NO_DEBTS
        # Left to compute, of waiting and running prompts.
        self.tokens = 0
        self._prompts: dict[Hashable, Prompt] = {}
        # How many of them have a promise to keep.
        self._promised = 0
        # Those that another router sent, as far as the worker says.
        self._others: set[Hashable] = set()
        # By key; `_exec_s` beside it, so that a sum over those ahead is one slice.
        self._waiting: list[tuple[Key, int, Prompt]] = []
        self._exec_s: list[float] = []
        # Computed now, when it should be done, and seconds after which a newcomer with a smaller key interrupts it
        # (infinite where it is computed in one piece); `least_s`: one that is done within a piece.
        self.running: Prompt | None = None
        self.until_s = 0.0
        self.piece_s = self.least_s = math.inf

    def __len__(self) -> int:
        return len(self._prompts)

    def __contains__(self, name: Hashable) -> bool:
        return name in self._prompts

    def __iter__(self) -> Iterator[Prompt]:
        return iter(self._prompts.values())

    @property
    def waiting(self) -> int:
        """Prompts, without the running one."""
        return len(self._waiting)

    @property
    def first_key(self) -> Key | None:
        """Of those that wait the smallest; None when none does."""
        return self._waiting[0][0] if self._waiting else None

    def turn(self, key: Key, now_s: float, exec_s: float = math.inf) -> tuple[float, int]:
        """For a newcomer with this key, which takes `exec_s`: seconds until it would start, and how many prompts it
        would push back.

        Before it go the rest of the running prompt, and all with keys up to its own.
        """
        running = self.running
        if running is None:
            return 0.0, 0
        pushed = 0
        if running.ready_s > now_s:
            # It only waits for what is fetched for it, and interrupts whoever starts meanwhile, if it can.
            if self.piece_s == math.inf:
                return 0.0, 1 + len(self._waiting)
            left = 0.0
            pushed = int(key < self._key(running))
        else:
            left = self.until_s - now_s
            if left < 0.0:
                left = 0.0
            if self.piece_s != math.inf and key < self._key_of_running(left):
                pushed = 1
                piece_s = self.least_s if exec_s < self.piece_s else self.piece_s
                if left > piece_s:
                    left = piece_s
        waiting = self._waiting
        if not waiting:
            return left, pushed
        ahead = bisect_right(waiting, (key, _LAST))
        return left + sum(self._exec_s[:ahead]), pushed + len(waiting) - ahead

    def breaks(self, key: Key, exec_s: float, now_s: float, margin: float = 0.0) -> bool:
        """Whether a newcomer with this key would make another miss when it was promised, which it need not without it;
        `margin`: the share by which predicted times may be wrong.
        """
        if not self._promised:
            return False
        wait_s = 0.0
        if self.running is not None and self.running.ready_s > now_s and self.piece_s == math.inf:
            # The newcomer starts at once, and is not interrupted.
            key = FIRST
        for prompt, rest_s in self._in_turn(key, now_s):
            wait_s += rest_s
            if prompt is not None and wait_s * (1 - margin) <= prompt.due_s - now_s < (wait_s + exec_s) * (1 + margin):
                return True
        return False

    def _in_turn(self, key: Key, now_s: float) -> Iterator[tuple[Prompt | None, float]]:
        """Prompts as they will be done, with the seconds that each takes; None for those that go before `key`."""
        running = self.running
        if running is None:
            return
        rest_s = self._rest_s(now_s)
        if self.piece_s == math.inf and running.ready_s <= now_s:
            yield None, rest_s
            rest_s = 0.0
        running_key = self._key_of_running(rest_s)
        done: set[Hashable] = set()
        siblings: dict[Hashable, list[Prompt]] = {}

        def with_siblings(prompt: Prompt, seconds: float, pushed: bool) -> Iterator[tuple[Prompt | None, float]]:
            """And those who go right after it, because they wait for its prefix."""
            yield (prompt if pushed else None), seconds
            done.add(prompt.name)
            for sibling in siblings.pop(prompt.name, ()):
                yield from with_siblings(sibling, sibling.exec_s, pushed or self._key(sibling) > key)

        for place, _, prompt in self._waiting:
            if rest_s and running_key <= place:
                yield from with_siblings(running, rest_s, running_key > key)
                rest_s = 0.0
            if prompt.after in self._prompts and prompt.after not in done and (rest_s or prompt.after != running.name):
                siblings.setdefault(prompt.after, []).append(prompt)
            else:
                yield from with_siblings(prompt, prompt.exec_s, place > key)
        if rest_s:
            yield from with_siblings(running, rest_s, running_key > key)

    def left_s(self, now_s: float) -> float:
        """Seconds until all of it is computed."""
        return self._rest_s(now_s) + sum(self._exec_s)

    def with_debt(self, key: Key, tenant: str) -> Key:
        """The key of a prompt of this tenant, as it counts among those here."""
        return self.order.advanced(key, -self.debts.get(tenant, 0.0)) if self.debts else key

    def settle(self, debts: Mapping[str, float]) -> None:
        """The worker says what its tenants owe each other now."""
        if debts == self.debts:
            return
        self.debts = debts
        self._waiting = sorted((self._key(prompt), id(prompt), prompt) for _, _, prompt in self._waiting)
        self._exec_s = [prompt.exec_s for _, _, prompt in self._waiting]

    def add(self, prompt: Prompt, now_s: float) -> None:
        """Sent to the worker. One of the same name is replaced."""
        self.remove(prompt.name, now_s)
        self._prompts[prompt.name] = prompt
        self._promised += prompt.due_s < math.inf
        self.tokens += prompt.tokens
        running = self.running
        if running is None:
            self._run(prompt, now_s)
        elif running.ready_s > now_s >= prompt.ready_s:
            self._queue(running)
            self._run(prompt, now_s)
        else:
            self._queue(prompt)

    def remove(self, name: Hashable, now_s: float) -> None:
        """Computed, or given up; an unknown name is ignored. The next is taken to start now."""
        prompt = self._prompts.pop(name, None)
        if prompt is None:
            return
        self._others.discard(name)
        self._promised -= prompt.due_s < math.inf
        self.tokens -= prompt.tokens
        if prompt is not self.running:
            self._unqueue(prompt)
            return
        self.running = None
        if self._waiting:
            self._run(self._unqueue(self._next(now_s)), now_s)

    def started(self, name: Hashable, now_s: float) -> None:
        """The worker says that it computes this prompt since `now_s`; an unknown name is ignored."""
        prompt, running = self._prompts.get(name), self.running
        if prompt is None:
            return
        early = prompt.ready_s > now_s
        prompt.ready_s, prompt.after = min(prompt.ready_s, now_s), None
        if prompt is running:
            if early:
                self._run(prompt, now_s)
            return
        if running is not None:
            left_s = self._rest_s(now_s)
            running.key, running.exec_s = self.order.advanced(running.key, running.exec_s - left_s), left_s
            self._queue(running)
        self._run(self._unqueue(prompt), now_s)

    def report(
        self, prompts: Sequence[Prompt], started: Container[Hashable], running: Hashable | None, now_s: float
    ) -> None:
        """What the worker says: its prompts (those sent since may be missing), those that it has begun to compute, and
        which of them it computes now.

        Of a prompt that was sent from here nothing is learned before it is begun: until then the worker does not count
        what is fetched for it, or computed for a sibling. One of which as much is left as was known goes on as
        estimated: the worker speaks between two forwards, and the one that runs is somewhere in its midst.
        """
        for name in self._others - {prompt.name for prompt in prompts}:
            self.remove(name, now_s)
        for prompt in prompts:
            known, others = self._prompts.get(prompt.name), prompt.name in self._others
            if known is None:
                others = True
            elif known.tokens == prompt.tokens or not (others or prompt.name in started):
                continue
            else:
                prompt.due_s = min(prompt.due_s, known.due_s)
            self.add(prompt, now_s)
            if others:
                self._others.add(prompt.name)
        if running is not None:
            self.started(running, now_s)

    def _next(self, now_s: float) -> Prompt:
        """Of those that wait the first that can start; where none can, the first."""
        for _, _, prompt in self._waiting:
            if prompt.ready_s <= now_s and prompt.after not in self._prompts:
                return prompt
        return self._waiting[0][2]

    def _run(self, prompt: Prompt, now_s: float) -> None:
        self.running = prompt
        self.until_s = max(now_s, prompt.ready_s) + prompt.exec_s
        most = self.limits.chunk_tokens
        self.piece_s = self.limits.chunk_s
        if prompt.tokens > most:
            self.piece_s = min(self.piece_s, prompt.exec_s * most / prompt.tokens)
        self.least_s = self.piece_s / self.limits.layers

    def _rest_s(self, now_s: float) -> float:
        """Left to compute of the running prompt."""
        return min(self.running.exec_s, max(0.0, self.until_s - now_s)) if self.running else 0.0

    def _key(self, prompt: Prompt) -> Key:
        return self.with_debt(prompt.key, prompt.tenant)

    def _key_of_running(self, rest_s: float) -> Key:
        """With so much left to compute."""
        assert self.running is not None
        return self.order.advanced(self._key(self.running), self.running.exec_s - rest_s)

    def _queue(self, prompt: Prompt) -> None:
        entry = (self._key(prompt), id(prompt), prompt)
        insort(self._waiting, entry)
        self._exec_s.insert(bisect_right(self._waiting, entry) - 1, prompt.exec_s)

    def _unqueue(self, prompt: Prompt) -> Prompt:
        at = bisect_right(self._waiting, (self._key(prompt), id(prompt), prompt)) - 1
        del self._waiting[at], self._exec_s[at]
        return prompt
