"""Every option against transformers' generate with the same GenerationConfig: the distribution that each token of an
answer is drawn from. (Presence and frequency penalties it does not have: `test_sampling.py` has their formula.)
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch

from headway.core.sampling import Constraint, ConstraintError, ConstraintKind, Sampling
from headway.engine.contract import Draw
from headway.engine.quiet import quiet
from headway.engine.sampling import adjust, candidates, constrain, draw_rows
from tests.engine.tiny import FAMILIES, VOCABULARY, save_model, stock_model

PROMPT = [1, 17, 17, 42, 150, 42]
STEPS = 12


class EveryThird:
    """A matcher: after n outputs, the tokens that leave n modulo 3."""

    def allowed(self, outputs: Sequence[int]) -> npt.NDArray[np.bool_]:
        return np.arange(VOCABULARY) % 3 == len(outputs) % 3

    def complete(self, outputs: Sequence[int]) -> bool:
        return False


def every_third(_batch: int, ids: torch.Tensor) -> list[int]:
    return np.flatnonzero(EveryThird().allowed(ids[len(PROMPT) :].tolist())).tolist()


ANY = Constraint(ConstraintKind.REGEX, "as EveryThird says")
BAD = [[42], [17, 3], [5, 42, 9]]
WARM: dict[str, Any] = {"do_sample": True, "temperature": 0.7, "top_k": 0}
EVERYTHING = {
    "temperature": 1.3, "top_k": 40, "top_p": 0.9, "min_p": 0.02, "repetition_penalty": 1.4,
    "logit_bias": {7: 3.0, 42: -5.0}, "bad_words": BAD, "constraint": ANY,
}  # fmt: skip
# Our options; the same in transformers' words.
CASES: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "greedy": ({}, {}),
    "temperature": ({"temperature": 0.7}, WARM),
    "top_k": ({"temperature": 0.7, "top_k": 5}, {**WARM, "top_k": 5}),
    "top_p": ({"temperature": 0.7, "top_p": 0.8}, {**WARM, "top_p": 0.8}),
    "min_p": ({"temperature": 0.7, "min_p": 0.1}, {**WARM, "min_p": 0.1}),
    "repetition_penalty": ({"repetition_penalty": 1.5}, {"repetition_penalty": 1.5}),
    "repetition_penalty below 1": ({"repetition_penalty": 0.8}, {"repetition_penalty": 0.8}),
    "logit_bias": ({"logit_bias": {7: 3.0, 42: -5.0}}, {"sequence_bias": [[[7], 3.0], [[42], -5.0]]}),
    "bad_words": ({"bad_words": BAD}, {"bad_words_ids": BAD}),
    "constraint": ({"constraint": ANY}, {"prefix_allowed_tokens_fn": every_third}),
    "constraint, drawn": ({"constraint": ANY, "temperature": 0.7}, {**WARM, "prefix_allowed_tokens_fn": every_third}),
    "all of them": (
        EVERYTHING,
        {
            "do_sample": True, "temperature": 1.3, "top_k": 40, "top_p": 0.9, "min_p": 0.02, "repetition_penalty": 1.4,
            "sequence_bias": [[[7], 3.0], [[42], -5.0]], "bad_words_ids": BAD, "prefix_allowed_tokens_fn": every_third,
        },
    ),
}  # fmt: skip


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Any:
    folder: Path = save_model(tmp_path_factory.mktemp("tiny"), FAMILIES["llama"]())
    return stock_model(folder)


def generate(model: Any, seed: int, **options: Any) -> Any:
    """With the raw logits and the processed ones ("scores") of every step, [1, vocabulary]."""
    torch.manual_seed(seed)
    ids = torch.tensor([PROMPT])
    with torch.inference_mode(), quiet():
        return model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=STEPS,
            eos_token_id=None,
            pad_token_id=0,
            return_dict_in_generate=True,
            output_logits=True,
            output_scores=True,
            **options,
        )


def draws_of(done: Any, sampling: Sampling, top_logprobs: int | None = None) -> list[Draw]:
    """Of each step of that answer."""
    tokens = done.sequences[0].tolist()
    matcher = None if sampling.constraint is None else EveryThird()
    return [
        Draw(sampling, at, 0, tokens[: len(PROMPT) + at], len(PROMPT), top_logprobs, matcher) for at in range(STEPS)
    ]


@pytest.mark.parametrize("name", CASES)
def test_each_token_is_drawn_from_transformers_distribution(model: Any, name: str) -> None:
    ours, theirs = CASES[name]
    sampling = Sampling(**{**ours, "bad_words": tuple(map(tuple, ours.get("bad_words", ())))})
    for seed in range(3):
        done = generate(model, seed, **theirs)
        draws, tokens = draws_of(done, sampling), done.sequences[0, len(PROMPT) :].tolist()
        logits = torch.cat(done.logits).float()
        if sampling.greedy:
            assert [one.token_id for one in draw_rows(logits, draws)] == tokens  # type: ignore[union-attr]
        adjusted = adjust(logits, draws)
        assert not constrain(adjusted, draws)
        for row, (scores, token) in enumerate(zip(done.scores, tokens, strict=True)):
            wanted = scores[0].double().softmax(-1).numpy()
            ids, weights = candidates(adjusted[row], sampling if not sampling.greedy else Sampling(temperature=1.0))
            assert ids.tolist() == np.flatnonzero(wanted).tolist()
            assert token in ids
            assert np.allclose(weights / weights.sum(), wanted[ids], rtol=1e-4)


def test_log_probabilities_are_transformers(model: Any) -> None:
    """Of the model's own distribution, whatever is done to it."""
    done = generate(model, 0, **CASES["all of them"][1])
    sampling = Sampling(**{**EVERYTHING, "bad_words": tuple(map(tuple, BAD))})  # type: ignore[arg-type]
    drawn = draw_rows(torch.cat(done.logits).float(), draws_of(done, sampling, 4))
    for one, logits in zip(drawn, done.logits, strict=True):
        assert not isinstance(one, ConstraintError)
        wanted = logits[0].double().log_softmax(-1)
        top = wanted.topk(4)
        assert one.logprob == pytest.approx(float(wanted[one.token_id]))
        assert [token for token, _ in one.top_logprobs] == top.indices.tolist()
        assert [value for _, value in one.top_logprobs] == pytest.approx(top.values.tolist())
