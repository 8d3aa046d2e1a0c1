"""The benchmark's own loop around llama.cpp fills batches as a server does: it may not lose or repeat a token."""

from __future__ import annotations

from collections.abc import Iterable
from typing import cast

from bench.engine.llamacpp_peer import Context, Part
from bench.interference.peer import LlamaCpp


class Likeliest:
    """Stands for a Context: the token after another is the next number. Refuses what is not at its place."""

    def __init__(self) -> None:
        self.steps: list[list[Part]] = []
        self.held: dict[int, list[int]] = {}

    def forward(self, parts: Iterable[Part]) -> list[int]:
        self.steps.append(list(parts))
        for part in self.steps[-1]:
            tokens = self.held.setdefault(part.sequence, [])
            assert part.position == len(tokens)
            tokens += part.tokens
        return [part.tokens[-1] + 1 for part in self.steps[-1]]

    def forget(self, sequence: int) -> None:
        del self.held[sequence]


def test_a_long_prompt_is_computed_in_chunks_that_leave_room_for_what_decodes() -> None:
    context = Likeliest()
    engine = LlamaCpp(cast(Context, context), sequences=2, chunk=8)
    chat = engine.add([1, 2, 3], 6)
    engine.step()
    assert chat() == 1
    long = engine.add(list(range(100, 120)), 2)
    came = []
    for _ in range(4):
        engine.step()
        came.append((chat(), long()))
    assert [[len(part.tokens) for part in step] for step in context.steps] == [[3], [1, 7], [1, 7], [1, 6], [1, 1]]
    assert came == [(1, 0), (1, 0), (1, 1), (1, 1)]
    chat_slot, long_slot = context.steps[1][0].sequence, context.steps[1][1].sequence
    assert context.held == {chat_slot: [1, 2, 3, 4, 5, 6, 7]}, "the long one has ended and holds nothing"
    assert chat_slot != long_slot
    assert context.steps[4][0].tokens == [7]
    assert context.steps[4][1].tokens == [120]


def test_more_prompts_than_the_kv_has_room_for_wait_in_their_order() -> None:
    context = Likeliest()
    engine = LlamaCpp(cast(Context, context), sequences=1, chunk=8)
    first, second = engine.add([1, 2], 2), engine.add([50], 1)
    engine.step()
    assert (first(), second()) == (1, 0)
    engine.step()
    assert (first(), second()) == (1, 0)
    engine.step()
    assert (first(), second()) == (0, 1)
    assert [step[0].tokens for step in context.steps] == [[1, 2], [3], [50]]
    assert context.held == {}
