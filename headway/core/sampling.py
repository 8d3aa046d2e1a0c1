"""How the next token is drawn: the parameters, and what makes them valid."""

from __future__ import annotations

import enum
import math
from collections.abc import Mapping
from dataclasses import dataclass, field


class ConstraintKind(enum.Enum):
    JSON_SCHEMA = "json_schema"
    REGEX = "regex"
    CHOICES = "choices"


@dataclass(frozen=True, slots=True)
class Constraint:
    """What the whole answer must be. `text`: the JSON schema, the regex, or a JSON list of the texts to choose from."""

    kind: ConstraintKind
    text: str


class ConstraintError(Exception):
    """Why an answer cannot be held to its constraint: one sentence."""


@dataclass(frozen=True, slots=True)
class Sampling:
    """Defaults mean: off; temperature 0 is greedy. `seed` with (choice, output index) is all the randomness there is.

    Raises ValueError, with a sentence that says what to change, on a value outside its range.
    """

    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    seed: int = 0
    logit_bias: Mapping[int, float] = field(default_factory=dict)
    # Token ids of each phrase.
    bad_words: tuple[tuple[int, ...], ...] = ()
    constraint: Constraint | None = None

    def __post_init__(self) -> None:
        _within("temperature", self.temperature, 0.0, 100.0)
        _within("top_p", self.top_p, 0.0, 1.0, above=True)
        _within("min_p", self.min_p, 0.0, 1.0)
        _within("repetition_penalty", self.repetition_penalty, 0.0, 100.0, above=True)
        _within("presence_penalty", self.presence_penalty, -100.0, 100.0)
        _within("frequency_penalty", self.frequency_penalty, -100.0, 100.0)
        for token, bias in self.logit_bias.items():
            _within(f"logit_bias of token {token}", bias, -1e6, 1e6)
        if not all(self.bad_words):
            raise ValueError("one of bad_words has no tokens; leave it out")

    @property
    def greedy(self) -> bool:
        return self.temperature == 0.0

    @property
    def uses_context(self) -> bool:
        """Whether drawing needs to know the tokens so far."""
        return self.penalises or self.constraint is not None or any(len(phrase) > 1 for phrase in self.bad_words)

    @property
    def penalises(self) -> bool:
        return self.repetition_penalty != 1.0 or self.presence_penalty != 0.0 or self.frequency_penalty != 0.0


def _within(name: str, value: float, low: float, high: float, *, above: bool = False) -> None:
    if not math.isfinite(value) or value > high or value < low or (above and value == low):
        border = "above" if above else "at least"
        raise ValueError(f"{name} is {value}; it must be {border} {low:g} and at most {high:g}")
