"""Stop strings in a stream of text: nothing is held back except what may be the start of one."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple


class StopResult(NamedTuple):
    """`text` is final and may be sent; `matched` is the stop string that ended the stream (never part of `text`)."""

    text: str
    matched: str | None


class StopStrings:
    """Looks for the stop string whose end comes first (of those that end together: the longest).

    The outcome does not depend on how the text is cut into pushes. Each matcher is a Knuth-Morris-Pratt automaton, so
    that a push costs O(characters · stops) whatever came before. Raises ValueError on an empty stop string.
    """

    def __init__(self, stops: Sequence[str]) -> None:
        if "" in stops:
            raise ValueError("a stop string must not be empty")
        self._matchers = [_Matcher(stop) for stop in sorted(set(stops), key=len, reverse=True)]
        self._held = ""
        self._matched: str | None = None

    def push(self, text: str) -> StopResult:
        """Take the next piece of text; after a match nothing more comes out."""
        if self._matched is not None:
            return StopResult("", self._matched)
        if not self._matchers:
            return StopResult(text, None)
        buffer = self._held + text
        for at, character in enumerate(text, start=len(self._held) + 1):
            for matcher in self._matchers:
                matcher.step(character)
            for matcher in self._matchers:
                if matcher.state == len(matcher.stop):
                    self._held, self._matched = "", matcher.stop
                    return StopResult(buffer[: at - matcher.state], matcher.stop)
        final = len(buffer) - max(matcher.state for matcher in self._matchers)
        self._held = buffer[final:]
        return StopResult(buffer[:final], None)

    def flush(self) -> str:
        """The stream is over: what was held back, as no stop string can follow."""
        text, self._held = self._held, ""
        return text


class _Matcher:
    """`state` is the length of the longest prefix of `stop` that the text so far ends with."""

    __slots__ = ("_failure", "state", "stop")

    def __init__(self, stop: str) -> None:
        self.stop = stop
        self.state = 0
        self._failure = _failures(stop)

    def step(self, character: str) -> None:
        state = self.state
        while state and self.stop[state] != character:
            state = self._failure[state - 1]
        self.state = state + (self.stop[state] == character)


def _failures(pattern: str) -> list[int]:
    """For each prefix of the pattern, the length of its longest proper border (Knuth, Morris, Pratt 1977)."""
    failures = [0] * len(pattern)
    border = 0
    for at in range(1, len(pattern)):
        while border and pattern[border] != pattern[at]:
            border = failures[border - 1]
        border += pattern[border] == pattern[at]
        failures[at] = border
    return failures
