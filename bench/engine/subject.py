"""What an engine under measurement is asked; see bench.engine.child."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable

# Of a sequence that decodes, in tokens; and the steps that are timed.
CONTEXT, STEPS = 512, 8


class Subject(ABC):
    """An engine under measurement. `setting`: what it chose for itself, by trying."""

    setting = ""

    @abstractmethod
    def prefill(self, prompt: list[int]) -> None:
        """One prompt, from nothing to its first token."""

    @abstractmethod
    def batch(self, prompts: list[list[int]]) -> Callable[[], None]:
        """Prefills them; what is returned decodes one token of each."""
