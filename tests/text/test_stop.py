"""Stop strings: found wherever the text is cut, and nothing else is held back."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from headway.text.stop import StopResult, StopStrings

TEXT = st.text(alphabet="ab", max_size=30)
STOPS = st.lists(st.text(alphabet="ab", min_size=1, max_size=5), min_size=1, max_size=3)


def expected(text: str, stops: list[str]) -> StopResult:
    ends = [(text.find(stop) + len(stop), -len(stop), stop) for stop in stops if stop in text]
    if not ends:
        return StopResult(text, None)
    end, length, stop = min(ends)
    return StopResult(text[: end + length], stop)


def run(stops: list[str], pieces: list[str]) -> StopResult:
    stream, out = StopStrings(stops), ""
    for piece in pieces:
        result = stream.push(piece)
        out += result.text
        if result.matched is not None:
            return StopResult(out, result.matched)
    return StopResult(out + stream.flush(), None)


@given(STOPS, st.lists(st.text(alphabet="ab", max_size=4), max_size=12))
def test_the_cut_of_the_text_does_not_matter(stops: list[str], pieces: list[str]) -> None:
    assert run(stops, pieces) == expected("".join(pieces), stops)


@given(STOPS, TEXT)
def test_only_a_possible_start_is_held_back(stops: list[str], text: str) -> None:
    stream = StopStrings(stops)
    result = stream.push(text)
    held = stream.flush()
    if result.matched is None:
        starts = [at for at in range(len(text)) if any(stop.startswith(text[at:]) for stop in stops)]
        assert held == text[min(starts) :] if starts else held == ""


def test_without_stops_text_passes() -> None:
    assert StopStrings([]).push("anything") == StopResult("anything", None)


def test_after_a_match_nothing_comes() -> None:
    stream = StopStrings(["END"])
    assert stream.push("abcENDdef") == StopResult("abc", "END")
    assert stream.push("more") == StopResult("", "END")
    assert stream.flush() == ""


def test_of_stops_that_end_together_the_longest_counts() -> None:
    assert StopStrings(["b", "ab"]).push("xab") == StopResult("x", "ab")


def test_an_empty_stop_string_is_refused() -> None:
    with pytest.raises(ValueError, match="must not be empty"):
        StopStrings(["a", ""])
