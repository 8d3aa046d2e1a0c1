"""The same load on OpenVINO GenAI's continuous batching, called in its own process: no client, no network.

PYTHON -m bench.interference.openvino_peer    reads Asked as JSON from stdin, prints what was seen of each request
"""

from __future__ import annotations

import json
import random
import sys
import time
from dataclasses import asdict, dataclass
from typing import Any

from bench.interference.seen import (
    ALONE_S,
    LONG_OUTPUT_TOKENS,
    LONG_PROMPT_TOKENS,
    OUTPUT_TOKENS,
    PROMPT_TOKENS,
    STREAMS,
    Seen,
)


@dataclass(frozen=True)
class Asked:
    """chunk: tokens of a step, at most. text: token ids, of which prompts are pieces. every_s, seconds: see Load."""

    model: str
    threads: int
    chunk: int
    text: list[int]
    every_s: float | None
    seconds: float


class Peer:
    """Requests and steps in turns; a token has come when the step that made it returns."""

    def __init__(self, asked: Asked) -> None:
        import numpy
        import openvino
        import openvino_genai

        self._asked, self._draw = asked, random.Random(1)
        self._array, self._tensor, self._config = numpy.array, openvino.Tensor, openvino_genai.GenerationConfig
        scheduler = openvino_genai.SchedulerConfig()
        scheduler.cache_size, scheduler.max_num_batched_tokens = 1, asked.chunk
        properties = {"INFERENCE_NUM_THREADS": asked.threads}
        self._pipeline: Any = openvino_genai.ContinuousBatchingPipeline(asked.model, scheduler, "CPU", properties)
        self._running: list[tuple[Seen, int, Any]] = []
        self._started = time.monotonic()
        self.seen: list[Seen] = []

    def run(self) -> None:
        self._ask("long", LONG_PROMPT_TOKENS, LONG_OUTPUT_TOKENS)
        while self._running:
            self._step()
        self.seen.clear()
        self._started, due_s = time.monotonic(), ALONE_S if self._asked.every_s else float("inf")
        while self._now_s < self._asked.seconds:
            while sum(seen.kind == "stream" for seen, _, _ in self._running) < STREAMS:
                self._ask("stream", PROMPT_TOKENS, OUTPUT_TOKENS)
            if self._now_s >= due_s:
                self._ask("long", LONG_PROMPT_TOKENS, LONG_OUTPUT_TOKENS)
                due_s += self._asked.every_s or 0.0
            self._step()

    @property
    def _now_s(self) -> float:
        return time.monotonic() - self._started

    def _step(self) -> None:
        self._pipeline.step()
        now_s = self._now_s
        for seen, outputs, handle in list(self._running):
            if handle.can_read():
                seen.token_s += [now_s] * len(handle.read()[0].generated_ids)
            if len(seen.token_s) >= outputs:
                self._running.remove((seen, outputs, handle))

    def _ask(self, kind: str, prompt: int, outputs: int) -> None:
        at = self._draw.randrange(len(self._asked.text) - prompt)
        config = self._config()
        config.max_new_tokens, config.ignore_eos, config.do_sample = outputs, True, False
        seen = Seen(kind, self._now_s)
        ids = self._tensor(self._array([self._asked.text[at : at + prompt]], "int64"))
        self._running.append((seen, outputs, self._pipeline.add_request(len(self.seen), ids, config)))
        self.seen.append(seen)


def main() -> None:
    peer = Peer(Asked(**json.load(sys.stdin)))
    peer.run()
    print(json.dumps([asdict(seen) for seen in peer.seen]))


if __name__ == "__main__":
    main()
