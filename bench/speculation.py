"""Drafts from what a sequence has: tokens a second with and without, in turns, where text repeats and where not.

python -m bench.speculation [--model NAME] [--threads N] [--repeats N] [--tokens N]

The engine alone, with the worker's own policy: prompts are computed, then steps are timed. `rewrite`: the prompt holds
a text, and asks to write it out again; greedy. `chat`: short questions, drawn with temperature 0.7.
"""

from __future__ import annotations

import argparse
import math
import os
import statistics
import time
from dataclasses import dataclass
from typing import Any, cast

import numpy as np

from bench.report import finish, progress
from headway.core.fit import ForwardWork, Timing
from headway.core.sampling import Sampling
from headway.core.sequence import Sequence
from headway.engine.contract import Chunk, Engine
from headway.engine.load import load_engine
from headway.models import resolve
from headway.text.tokenizer import load_tokenizer
from headway.worker.active import Active, Sink
from headway.worker.drafting import Drafting
from headway.worker.measure import measure

BATCHES = (1, 4, 8)
TOPICS = (
    "the harbour",
    "the old library",
    "a mountain village",
    "the night train",
    "a market",
    "the river",
    "bees",
    "rain",
)
TEXT = (
    "Early in the morning, long before the first visitors came, somebody opened the windows of {0} and looked outside. "
    "Nothing had changed since the week before: the same three chairs, a table, and a letter that nobody had read. "
    "People who knew {0} said that it was quiet there, and that whoever stayed for more than a day would stay for good."
)


@dataclass(frozen=True)
class Run:
    """Decoding of one batch: tokens that were drawn in steps, and what was drafted and kept of it."""

    tokens: list[list[int]]
    drawn: int
    seconds: float
    forwards: int
    drafted: int
    kept: int


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--repeats", type=int, default=2)
    parser.add_argument("--tokens", type=int, default=96)
    options = parser.parse_args()
    folder = str(resolve(options.model))
    engine, tokenizer = load_engine(folder, threads=options.threads), load_tokenizer(folder)
    timing, drafting = Timing(), Drafting(math.inf)
    measure(engine, timing, 6.0)
    rows: list[dict[str, Any]] = []
    for kind in ("rewrite", "chat"):
        prompts = [tokenizer.encode_chat([("user", question(kind, topic))]) for topic in TOPICS]
        sampling = Sampling() if kind == "rewrite" else Sampling(0.7, seed=1)
        for batch in BATCHES:
            without, with_ = [], []
            for _ in range(options.repeats):
                for runs, policy in ((without, None), (with_, drafting)):
                    runs.append(decode(engine, prompts[:batch], sampling, options.tokens, timing, policy))
            rows.append(row := compare(kind, batch, without, with_))
            progress(str(row))
    finish("speculation", {"rows": rows, "step": timing.predictor.step, "draft_s": timing.draft_s})


def question(kind: str, topic: str) -> str:
    if kind == "chat":
        return f"Tell me something about {topic} that few people know."
    return f"Write this text again, word for word: {TEXT.format(topic)}"


def compare(kind: str, batch: int, without: list[Run], with_: list[Run]) -> dict[str, Any]:
    """Medians; `same`: whether all answers were the same."""
    off, on = (statistics.median(run.drawn / run.seconds for run in runs) for runs in (without, with_))
    drafted, kept = sum(run.drafted for run in with_), sum(run.kept for run in with_)
    return {
        "kind": kind,
        "batch": batch,
        "off_tok_s": round(off, 1),
        "on_tok_s": round(on, 1),
        "ratio": round(on / off, 2),
        "drafted": drafted,
        "accepted": round(kept / drafted, 3) if drafted else None,
        "tokens_a_forward": round(sum(r.drawn for r in with_) / sum(r.forwards for r in with_) / batch, 2),
        "same": all(run.tokens == without[0].tokens for run in (*without, *with_)),
    }


def decode(
    engine: Engine, prompts: list[list[int]], sampling: Sampling, count: int, timing: Timing, drafting: Drafting | None
) -> Run:
    """All prompts one by one, then all answers together to `count` tokens; only steps are timed."""
    kv_format = engine.card.kv_format
    actives: list[Active] = []
    slots = 0
    for prompt in prompts:
        actives.append(active(engine, len(actives), prompt, sampling, count, slots))
        slots += len(actives[-1].slots)
    engine.bind(engine.scratch(slots, kv_format.slot_bytes))
    for one in actives:
        (drawn,) = engine.forward([Chunk(one.sequence.tokens, 0, one.slots, one.draw())])
        assert drawn is not None
        one.sequence.computed = len(one.sequence.tokens)
        one.sequence.tokens.append(drawn.token_id)
    forwards = drafted = kept = 0
    started = time.monotonic()
    while running := [one for one in actives if one.sequence.output_index < count]:
        drafts = drafting.drafts(running, timing) if drafting else [[] for _ in running]
        chunks = [
            Chunk([one.sequence.tokens[-1], *guessed], one.sequence.computed, one.slots, one.draw(), one, len(guessed))
            for one, guessed in zip(running, drafts, strict=True)
        ]
        work = ForwardWork((), len(running), sum(one.sequence.computed for one in running), sum(map(len, drafts)))
        began = time.monotonic()
        results = engine.forward(chunks)
        timing.observe(work, time.monotonic() - began)
        for one, result in zip(running, results, strict=True):
            assert result is not None
            one.sequence.tokens += [result.token_id, *(later.token_id for later in result.then)]
            one.sequence.computed = len(one.sequence.tokens) - 1
            kept += len(result.then)
        forwards, drafted = forwards + 1, drafted + work.drafts
    seconds = time.monotonic() - started
    for one in actives:
        engine.forget(one)
    answers = [one.sequence.tokens[one.sequence.prompt_tokens :] for one in actives]
    return Run(answers, sum(len(answer) - 1 for answer in answers), seconds, forwards, drafted, kept)


def active(engine: Engine, at: int, prompt: list[int], sampling: Sampling, count: int, first_slot: int) -> Active:
    """A sequence with slots for its answer, from `first_slot` on."""
    card = engine.card
    sequence = Sequence(
        sequence_id=str(at),
        attempt=0,
        tokens=list(prompt),
        prompt_tokens=len(prompt),
        namespace=b"",
        keys=[],
        sampling=sampling,
        max_tokens=count,
        stop_token_ids=frozenset(),
        arrival_s=0.0,
        block_size=card.kv_format.block_size,
        context_tokens=card.context_tokens,
        choice=at,
    )
    blocks = -(-(len(prompt) + count) // card.kv_format.block_size)
    # Nobody hears of its tokens.
    return Active(sequence, cast(Sink, None), 0.0, slots=np.arange(first_slot, first_slot + blocks, dtype=np.int32))


if __name__ == "__main__":
    main()
