"""llama.cpp by its batches (llama-cpp-python's low-level calls): no server, no sampler but the likeliest token."""

from __future__ import annotations

import functools
import itertools
import sys
import time
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

from bench.engine.subject import CONTEXT, STEPS, Subject

LONGEST, SEQUENCES = 2048, 16
# GGML_LOG_LEVEL_ERROR
ERROR = 4


class Setting(NamedTuple):
    """ubatch: tokens computed at once, at most. unified: one KV buffer for all sequences, or one for each."""

    flash: bool
    ubatch: int = 512
    unified: bool = True

    def __str__(self) -> str:
        return ", ".join(f"{name}={int(value)}" for name, value in self._asdict().items())


class Part(NamedTuple):
    """Tokens of a sequence, the first of them at `position`."""

    sequence: int
    position: int
    tokens: list[int]


def load_model(file: str) -> Any:
    """Of a GGUF file. Raises RuntimeError where llama.cpp cannot read it."""
    import llama_cpp

    llama_cpp.llama_backend_init()
    llama_cpp.llama_log_set(_log(), None)
    if model := llama_cpp.llama_model_load_from_file(file.encode(), llama_cpp.llama_model_default_params()):
        return model
    raise RuntimeError(f"llama.cpp cannot load {file}")


@functools.cache  # for as long as llama.cpp may call it
def _log() -> Any:
    """Lets errors through only."""
    import llama_cpp

    def write(level: int, text: bytes, _data: object) -> None:
        if level == ERROR:
            sys.stderr.write(text.decode(errors="replace"))

    return llama_cpp.llama_log_callback(write)


class Context:
    """KV, in float16, of so many sequences of at most `tokens` each. Raises RuntimeError where llama.cpp refuses."""

    def __init__(self, model: Any, threads: int, setting: Setting, sequences: int, tokens: int) -> None:
        import llama_cpp
        import numpy

        self._lib, self._as_array, self.setting = llama_cpp, numpy.ctypeslib.as_array, setting
        asked = llama_cpp.llama_context_default_params()
        asked.n_ctx, asked.n_seq_max = sequences * tokens, sequences
        asked.n_batch, asked.n_ubatch = LONGEST, setting.ubatch
        asked.n_threads = asked.n_threads_batch = threads
        asked.flash_attn_type, asked.kv_unified, asked.no_perf = int(setting.flash), setting.unified, True
        self._context: Any = llama_cpp.llama_init_from_model(model, asked)
        if not self._context:
            raise RuntimeError(f"llama.cpp makes no context ({setting})")
        self._outputs = llama_cpp.llama_vocab_n_tokens(llama_cpp.llama_model_get_vocab(model))
        self._batch = llama_cpp.llama_batch_init(LONGEST, 0, 1)
        for row in range(LONGEST):
            self._batch.n_seq_id[row] = 1

    def clear(self) -> None:
        self._lib.llama_memory_clear(self._lib.llama_get_memory(self._context), False)

    def forget(self, sequence: int) -> None:
        self._lib.llama_memory_seq_rm(self._lib.llama_get_memory(self._context), sequence, -1, -1)

    def close(self) -> None:
        self._lib.llama_batch_free(self._batch)
        self._lib.llama_free(self._context)

    def forward(self, parts: Iterable[Part]) -> list[int]:
        """The likeliest token after each part; of all other tokens there are no logits."""
        batch, row, last = self._batch, 0, []
        for sequence, position, tokens in parts:
            for at, token in enumerate(tokens):
                batch.token[row], batch.pos[row], batch.seq_id[row][0] = token, position + at, sequence
                batch.logits[row] = at == len(tokens) - 1
                row += 1
            last.append(row - 1)
        batch.n_tokens = row
        if code := self._lib.llama_decode(self._context, batch):
            raise RuntimeError(f"llama_decode of {row} tokens: {code}")
        return [self._likeliest(at) for at in last]

    def start(self, prompts: list[list[int]]) -> list[int]:
        """Their first tokens, from nothing."""
        self.clear()
        return [self.forward([Part(number, 0, prompt)])[0] for number, prompt in enumerate(prompts)]

    def _likeliest(self, row: int) -> int:
        logits = self._lib.llama_get_logits_ith(self._context, row)
        return int(self._as_array(logits, (self._outputs,)).argmax())


class LlamaCpp(Subject):
    """Weights as the GGUF file has them. Each phase has the setting that was the fastest at its start: a server has to
    choose one for both.
    """

    def __init__(self, model: str, threads: int) -> None:
        self._model, self._threads = load_model(model), threads
        whole = [Setting(flash, ubatch=ubatch) for flash, ubatch in itertools.product((True, False), (512, LONGEST))]
        steps = [Setting(flash, unified=unified) for flash, unified in itertools.product((True, False), repeat=2)]
        self._whole = self._best(whole, 1, LONGEST + 256, lambda context: _time(lambda: context.start([_any(LONGEST)])))
        self._steps = self._best(steps, SEQUENCES, CONTEXT + 256, _time_steps)
        self.setting = f"prefill: {self._whole.setting}; decode: {self._steps.setting}"

    def prefill(self, prompt: list[int]) -> None:
        self._whole.start([prompt])

    def batch(self, prompts: list[list[int]]) -> Callable[[], None]:
        return _steps(self._steps, prompts)

    def _best(
        self, settings: list[Setting], sequences: int, tokens: int, seconds: Callable[[Context], float]
    ) -> Context:
        """In the setting in which `seconds` is least."""
        took: dict[Setting, float] = {}
        for setting in settings:
            context = Context(self._model, self._threads, setting, sequences, tokens)
            context.start([_any(64)])  # what is made on its first use
            took[setting] = seconds(context)
            context.close()
        return Context(self._model, self._threads, min(took, key=took.__getitem__), sequences, tokens)


def _steps(context: Context, prompts: list[list[int]]) -> Callable[[], None]:
    tokens = context.start(prompts)
    positions = itertools.count(len(prompts[0]))

    def step() -> None:
        nonlocal tokens
        position = next(positions)
        tokens = context.forward(Part(number, position, [token]) for number, token in enumerate(tokens))

    return step


def _time_steps(context: Context) -> float:
    step = _steps(context, [_any(CONTEXT)] * 8)
    return min(_time(step) for _ in range(STEPS))


def _time(work: Callable[[], object]) -> float:
    started = time.perf_counter()
    work()
    return time.perf_counter() - started


def _any(tokens: int) -> list[int]:
    return list(range(100, 100 + tokens))
