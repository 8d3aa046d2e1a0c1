"""What a placed request adds to the loads of its workers."""

from __future__ import annotations

from collections.abc import Hashable

from headway.core.ask import Ask
from headway.core.load import WorkerLoad
from headway.core.promises import Promises


class Reservation:
    """What one request adds to the loads of its workers: the prompt until `computed`, the answer until `leave`."""

    __slots__ = ("_computed", "_decode", "_left", "_name", "_promises", "_tokens", "_worker")

    def __init__(self, name: Hashable, ask: Ask, worker: WorkerLoad, decode: WorkerLoad, promises: Promises) -> None:
        self._name = name
        self._tokens = (ask.prompt_tokens, ask.expected_tokens)
        self._worker = worker
        self._decode = decode
        self._promises = promises
        self._computed = self._left = False
        decode.join(*self._tokens)
        worker.sent += 1
        decode.sent += decode is not worker

    def computed(self, now_s: float) -> None:
        """The prompt is computed, or given up; may be called again."""
        if not self._computed:
            self._computed = True
            self._promises.remove(self._name)
            self._worker.backlog.remove(self._name, now_s)
            self._decode.begin()

    def leave(self, now_s: float) -> None:
        """The end, whatever it was; may be called again."""
        self.computed(now_s)
        if not self._left:
            self._left = True
            self._decode.part(*self._tokens)
            self._worker.over += 1
            self._decode.over += self._decode is not self._worker
