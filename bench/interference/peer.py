"""The same load on a peer's continuous batching, called in its own process: no client, no network.

PYTHON -m bench.interference.peer NAME    reads Asked as JSON from stdin, prints what was seen of each request
"""

from __future__ import annotations

import json
import random
import sys
import time
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

from bench.engine.llamacpp_peer import Context, Part, Setting, load_model
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


class Engine(ABC):
    """Requests are added between steps; greedy."""

    @abstractmethod
    def add(self, prompt: list[int], outputs: int) -> Callable[[], int]:
        """What is returned says how many tokens have come since it was last called."""

    @abstractmethod
    def step(self) -> None: ...


class OpenVino(Engine):
    """OpenVINO GenAI's own scheduler and cache."""

    def __init__(self, asked: Asked) -> None:
        import numpy
        import openvino
        import openvino_genai

        self._array, self._tensor, self._config = numpy.array, openvino.Tensor, openvino_genai.GenerationConfig
        scheduler = openvino_genai.SchedulerConfig()
        scheduler.cache_size, scheduler.max_num_batched_tokens = 1, asked.chunk
        properties = {"INFERENCE_NUM_THREADS": asked.threads}
        self._pipeline: Any = openvino_genai.ContinuousBatchingPipeline(asked.model, scheduler, "CPU", properties)
        self._requests = 0

    def add(self, prompt: list[int], outputs: int) -> Callable[[], int]:
        config = self._config()
        config.max_new_tokens, config.ignore_eos, config.do_sample = outputs, True, False
        self._requests += 1
        handle = self._pipeline.add_request(self._requests, self._tensor(self._array([prompt], "int64")), config)
        return lambda: len(handle.read()[0].generated_ids) if handle.can_read() else 0

    def step(self) -> None:
        self._pipeline.step()


@dataclass
class Sequence:
    """`todo`: what is not computed yet, of the prompt or the last token. `slot`: its number in the KV."""

    todo: list[int]
    outputs: int
    slot: int = -1
    position: int = 0
    came: int = 0

    def take(self) -> int:
        came, self.came = self.came, 0
        return came


class LlamaCpp(Engine):
    """llama.cpp's batches, filled as by its server: a token of each that decodes, then prompts in their order."""

    def __init__(self, context: Context, sequences: int, chunk: int) -> None:
        self._context, self._chunk = context, chunk
        self._free = list(range(sequences))
        self._waiting: list[Sequence] = []
        self._running: list[Sequence] = []

    def add(self, prompt: list[int], outputs: int) -> Callable[[], int]:
        sequence = Sequence(prompt, outputs)
        self._waiting.append(sequence)
        return sequence.take

    def step(self) -> None:
        while self._waiting and self._free:
            sequence = self._waiting.pop(0)
            sequence.slot = self._free.pop()
            self._running.append(sequence)
        left, parts, of = self._chunk, [], []
        for sequence in sorted(self._running, key=lambda one: len(one.todo) > 1):
            if tokens := sequence.todo[:left]:
                left -= len(tokens)
                parts.append(Part(sequence.slot, sequence.position, tokens))
                of.append(sequence)
        for sequence, part, token in zip(of, parts, self._context.forward(parts), strict=True):
            self._computed(sequence, len(part.tokens), token)

    def _computed(self, sequence: Sequence, tokens: int, likeliest: int) -> None:
        sequence.todo, sequence.position = sequence.todo[tokens:], sequence.position + tokens
        if sequence.todo:
            return
        sequence.todo, sequence.came, sequence.outputs = [likeliest], sequence.came + 1, sequence.outputs - 1
        if not sequence.outputs:
            self._context.forget(sequence.slot)
            self._free.append(sequence.slot)
            self._running.remove(sequence)


def _llamacpp(asked: Asked) -> Engine:
    sequences, tokens = 16, LONG_PROMPT_TOKENS + LONG_OUTPUT_TOKENS
    context = Context(load_model(asked.model), asked.threads, Setting(flash=True), sequences, tokens)
    return LlamaCpp(context, sequences, asked.chunk)


ENGINES: dict[str, Callable[[Asked], Engine]] = {"openvino": OpenVino, "llamacpp": _llamacpp}


class Peer:
    """Requests and steps in turns; a token has come when the step that made it returns."""

    def __init__(self, engine: Engine, asked: Asked) -> None:
        self._engine, self._asked, self._draw = engine, asked, random.Random(1)
        self._running: list[tuple[Seen, int, Callable[[], int]]] = []
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
        self._engine.step()
        now_s = self._now_s
        for seen, outputs, came in list(self._running):
            seen.token_s += [now_s] * came()
            if len(seen.token_s) >= outputs:
                self._running.remove((seen, outputs, came))

    def _ask(self, kind: str, prompt: int, outputs: int) -> None:
        at = self._draw.randrange(len(self._asked.text) - prompt)
        seen = Seen(kind, self._now_s)
        self._running.append((seen, outputs, self._engine.add(self._asked.text[at : at + prompt], outputs)))
        self.seen.append(seen)


def main() -> None:
    asked = Asked(**json.load(sys.stdin))
    peer = Peer(ENGINES[sys.argv[1]](asked), asked)
    peer.run()
    print(json.dumps([asdict(seen) for seen in peer.seen]))


if __name__ == "__main__":
    main()
