"""What a constraint costs for each token: CPU of its mask, and of a greedy draw with and without it.

python -m bench.constrained [--quick]

Masks are those of one answer of the default model's tokens, several times over: the first time in a matcher just
compiled, then in copies of it. Draws are of one row of the default model's width, on one thread, token by token of that
answer, each with the mask that comes after it.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import torch

from bench.report import finish, progress
from headway.core.sampling import Constraint, ConstraintKind, Sampling
from headway.engine.contract import Draw
from headway.engine.sampling import draw_rows
from headway.models import DEFAULT, resolve
from headway.text.constrain import Grammars
from headway.text.tokenizer import load_tokenizer

VOCABULARY, EOS = 49152, 2
SCHEMA = {
    "type": "object",
    "properties": {
        "name": {"type": "string"},
        "age": {"type": "integer"},
        "tags": {"type": "array", "items": {"type": "string"}},
    },
    "required": ["name", "age"],
    "additionalProperties": False,
}
PERSON = '{"name": "Bob the builder of many things", "age": 33, "tags": ["a", "tall", "kind"]}'


class Case(NamedTuple):
    kind: ConstraintKind
    text: str
    answer: str


CASES = {
    "JSON schema": Case(ConstraintKind.JSON_SCHEMA, json.dumps(SCHEMA), PERSON),
    "any JSON object": Case(ConstraintKind.JSON_SCHEMA, '{"type": "object"}', PERSON),
    "regex, a date": Case(ConstraintKind.REGEX, "(January|May) [0-9]{1,2}, [0-9]{4}", "January 12, 1987"),
    "regex, words": Case(ConstraintKind.REGEX, r"(\w+ )+end", "it goes on and on for many words until the end"),
    "one of 200 texts": Case(
        ConstraintKind.CHOICES, json.dumps([f"text number {at}" for at in range(200)]), "text number 137"
    ),
}


def timed(call: Callable[[], Any]) -> tuple[Any, float]:
    """What it gives, and CPU microseconds of this thread."""
    started = time.thread_time()
    result = call()
    return result, (time.thread_time() - started) * 1e6


def measure(grammars: Grammars, tokens: list[int], case: Case, rounds: int) -> dict[str, float]:
    constraint = Constraint(case.kind, case.text)
    _, compile_us = timed(lambda: grammars.matcher(constraint, (), {EOS}))
    first: list[float] = []
    later: list[float] = []
    draws: list[float] = []
    logits = torch.randn(1, VOCABULARY, generator=torch.Generator().manual_seed(1))
    for round_ in range(rounds + 1):
        matcher = grammars.matcher(constraint, (), {EOS})
        calls = [partial(matcher.allowed, tokens[:at]) for at in range(len(tokens))]
        (later if round_ else first).extend(timed(call)[1] for call in calls)
    for _ in range(rounds):
        matcher = grammars.matcher(constraint, (), {EOS})
        for at, token in enumerate(tokens):
            row = logits.index_fill(1, torch.tensor([token]), 100.0)
            draw = Draw(Sampling(constraint=constraint), at, 0, tokens[:at], 0, None, matcher)
            (drawn,), taken_us = timed(partial(draw_rows, row, [draw]))
            assert drawn.token_id == token
            draws.append(taken_us)
    return {
        "tokens": len(tokens),
        "compile_ms": compile_us / 1e3,
        "mask_us_p50": float(np.median(later)),
        "mask_us_p99": float(np.percentile(later, 99)),
        "first_mask_us_max": max(first),
        "draw_us_p50": float(np.median(draws)),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="a few seconds")
    rounds = 5 if parser.parse_args().quick else 50
    torch.set_num_threads(1)
    folder = str(resolve(DEFAULT))
    started = time.monotonic()
    grammars = Grammars(folder, VOCABULARY, (EOS,))
    load_s = time.monotonic() - started
    encode = load_tokenizer(folder).encode
    out: dict[str, Any] = {"vocabulary": VOCABULARY, "tokenizer_load_s": load_s, "cases": {}}
    for name, case in CASES.items():
        progress(name)
        out["cases"][name] = measure(grammars, encode(case.answer), case, rounds)
    logits = torch.randn(1, VOCABULARY)
    free = [timed(lambda: draw_rows(logits, [Draw(Sampling(), 0)]))[1] for _ in range(rounds * 10)]
    out["free_draw_us_p50"] = float(np.median(free))
    out["marks"] = {}
    finish("constrained", out)


if __name__ == "__main__":
    main()
