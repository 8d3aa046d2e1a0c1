"""One engine in a process of its own: reads a JSON line {"phase", "size"}, answers with the seconds that it took.

python -m bench.engine.child NAME MODEL THREADS

MODEL: a folder, of OpenVINO and llama.cpp a GGUF file. prefill: one prompt of `size` tokens, to its first token.
decode: a step of `size` sequences that have 512 tokens each.
"""

from __future__ import annotations

import json
import random
import statistics
import sys
import time
from collections.abc import Callable
from typing import Any

from bench.engine.llamacpp_peer import LlamaCpp
from bench.engine.subject import CONTEXT, STEPS, Subject


class Headway(Subject):
    """Ours, in a slab of its own, its blocks in no order. `weights` and `kv_dtype` as `load_engine` takes them."""

    def __init__(self, folder: str, threads: int, weights: str = "float", kv_dtype: str = "float32") -> None:
        import numpy as np

        from headway.core.sampling import Sampling
        from headway.engine.contract import Chunk, Draw
        from headway.engine.load import load_engine

        self._chunk, self._draw = Chunk, Draw(Sampling(), 0)
        self._engine = load_engine(folder, threads=threads, weights=weights, kv_dtype=kv_dtype)
        kv_format = self._engine.card.kv_format
        self._blocks = -(-4096 // kv_format.block_size)
        self._tables = np.random.default_rng(1).permutation(16 * self._blocks).astype(np.int32).reshape(16, -1)
        self._engine.bind(self._engine.scratch(16 * self._blocks, kv_format.slot_bytes))
        self._batches = 0

    def prefill(self, prompt: list[int]) -> None:
        self._engine.forward([self._chunk(prompt, 0, self._tables[0], self._draw)])

    def batch(self, prompts: list[list[int]]) -> Callable[[], None]:
        tables = self._tables[: len(prompts)]
        tokens = [self._forward(prompt, 0, table) for prompt, table in zip(prompts, tables, strict=True)]
        position = len(prompts[0])
        for number in range(len(self._tables)):
            self._engine.forget((self._batches, number))
        self._batches += 1
        name = self._batches

        def step() -> None:
            nonlocal tokens, position
            chunks = [
                self._chunk([token], position, table, self._draw, (name, number))
                for number, (token, table) in enumerate(zip(tokens, tables, strict=True))
            ]
            tokens = [drawn.token_id for drawn in self._engine.forward(chunks) if drawn is not None]
            position += 1

        return step

    def _forward(self, prompt: list[int], position: int, table: Any) -> int:
        drawn = self._engine.forward([self._chunk(prompt, position, table, self._draw)])[0]
        assert drawn is not None
        return drawn.token_id


class Transformers(Subject):
    """Stock: its own modules, cache and attention (sdpa), float32."""

    def __init__(self, folder: str, threads: int) -> None:
        import torch
        from transformers import AutoModelForCausalLM

        torch.set_num_threads(threads)
        self._torch = torch
        self._model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()

    def prefill(self, prompt: list[int]) -> None:
        self._start([prompt])

    def batch(self, prompts: list[list[int]]) -> Callable[[], None]:
        output = self._start(prompts)

        def step() -> None:
            nonlocal output
            with self._torch.inference_mode():
                tokens = output.logits[:, -1:].argmax(-1)
                output = self._model(input_ids=tokens, past_key_values=output.past_key_values, use_cache=True)
                tokens.tolist()

        return step

    def _start(self, prompts: list[list[int]]) -> Any:
        with self._torch.inference_mode():
            ids = self._torch.tensor(prompts)
            output = self._model(input_ids=ids, use_cache=True, logits_to_keep=1)
            output.logits[:, -1].argmax(-1).tolist()
            return output


class OpenVino(Subject):
    """OpenVINO GenAI's continuous batching, from GGUF with the weights as they are there; greedy."""

    def __init__(self, model: str, threads: int) -> None:
        import openvino
        import openvino_genai

        self._tensor, self._config = openvino.Tensor, openvino_genai.GenerationConfig
        scheduler = openvino_genai.SchedulerConfig()
        scheduler.cache_size, scheduler.max_num_batched_tokens = 2, 2048
        properties = {"INFERENCE_NUM_THREADS": threads}
        self._pipeline: Any = openvino_genai.ContinuousBatchingPipeline(model, scheduler, "CPU", properties)
        self._requests = 0

    def prefill(self, prompt: list[int]) -> None:
        handle = self._add(prompt, 1)  # a request whose handle goes is given up
        while self._pipeline.has_non_finished_requests():
            self._pipeline.step()
        assert handle.read()[0].generated_ids

    def batch(self, prompts: list[list[int]]) -> Callable[[], None]:
        while self._pipeline.has_non_finished_requests():
            self._pipeline.step()
        # Each has its first token once the prompts are through; the steps after that are decoding only.
        handles = [self._add(prompt, STEPS + 3 + len(prompts)) for prompt in prompts]
        came = set()
        while len(came) < len(handles):
            self._pipeline.step()
            came |= {at for at, handle in enumerate(handles) if handle.can_read() and handle.read()}

        def step() -> None:
            self._pipeline.step()
            assert all(handle.read()[0].generated_ids for handle in handles)

        return step

    def _add(self, prompt: list[int], outputs: int) -> Any:
        config = self._config()
        config.max_new_tokens, config.ignore_eos, config.do_sample = outputs, True, False
        self._requests += 1
        return self._pipeline.add_request(self._requests, self._tensor(_row(prompt)), config)


def _row(ids: list[int]) -> Any:
    import numpy as np

    return np.array([ids], np.int64)


SUBJECTS: dict[str, Callable[[str, int], Subject]] = {
    "headway": Headway,
    "headway-bfloat16": lambda folder, threads: Headway(folder, threads, "bfloat16", "bfloat16"),
    "headway-int8": lambda folder, threads: Headway(folder, threads, "int8", "bfloat16"),
    "headway-int4": lambda folder, threads: Headway(folder, threads, "int4", "bfloat16"),
    "transformers": Transformers,
    "openvino": OpenVino,
    "llamacpp": LlamaCpp,
}


def measure(subject: Subject, phase: str, size: int) -> float:
    """Seconds; of decode, the median of a few steps."""
    draw = random.Random(size)

    def prompt(tokens: int) -> list[int]:
        return [draw.randrange(100, 40_000) for _ in range(tokens)]

    if phase == "prefill":
        given = prompt(size)
        started = time.perf_counter()
        subject.prefill(given)
        return time.perf_counter() - started
    step, times = subject.batch([prompt(CONTEXT) for _ in range(size)]), []
    for _ in range(1 + STEPS):
        started = time.perf_counter()
        step()
        times.append(time.perf_counter() - started)
    return statistics.median(times[1:])


def main() -> None:
    name, model, threads = sys.argv[1:]
    subject = SUBJECTS[name](model, int(threads))
    subject.prefill(list(range(100, 164)))
    print(json.dumps({"setting": subject.setting}), flush=True)
    for line in sys.stdin:
        asked = json.loads(line)
        print(json.dumps({"seconds": measure(subject, **asked)}), flush=True)


if __name__ == "__main__":
    main()
