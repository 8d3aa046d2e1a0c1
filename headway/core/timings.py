"""What a worker's forwards take, by the number of threads that they compute with."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from headway.core.fit import Timing


class Timings:
    """One timing for each number of threads. The first is of `usual` threads; another starts from that one, as if
    threads shared the work evenly, and learns from its own forwards.

    `now`: of the threads of the latest forward. Each is observed by the thread that computes; all else is called by
    one other thread, but `state` by any.
    """

    def __init__(self, usual: int = 1, first: Timing | None = None) -> None:
        self._usual = usual
        self._by_threads = {usual: first or Timing()}
        self.now = self._by_threads[usual]

    def use(self, threads: int) -> Timing:
        """From now on forwards have so many threads."""
        if threads not in self._by_threads:
            self._by_threads[threads] = self._guess(threads)
        self.now = self._by_threads[threads]
        return self.now

    @property
    def known(self) -> bool:
        """Whether any forward was observed."""
        return any(timing.prefill.count for timing in list(self._by_threads.values()))

    def state(self) -> dict[str, Any]:
        """To go on from after a restart; made of what JSON has."""
        return {str(threads): timing.state() for threads, timing in list(self._by_threads.items())}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Go on from a former `state()`, of the same usual number of threads. ValueError, and nothing is changed, when
        it is none.
        """
        if not isinstance(state, Mapping) or str(self._usual) not in state:
            raise ValueError(f"no timings of {self._usual} threads")
        first = Timing()
        first.restore(state[str(self._usual)])
        restored = Timings(self._usual, first)
        for name, kept in state.items():
            threads = int(name)
            if threads < 1:
                raise ValueError(f"timings of {threads} threads")
            restored.use(threads).restore(kept)
        self._by_threads = restored._by_threads
        self.now = first

    def _guess(self, threads: int) -> Timing:
        return self._by_threads[self._usual].times(self._usual / threads)
