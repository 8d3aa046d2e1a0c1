"""Sampling: against transformers' processors, by seed, by support, and by frequency."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import (
    MinPLogitsWarper,
    NoBadWordsLogitsProcessor,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from headway.core.sampling import Constraint, ConstraintError, ConstraintKind, Sampling
from headway.engine.contract import Draw
from headway.engine.sampling import adjust, candidates, draw_rows, uniform

VOCABULARY = 300


def some_logits(rows: int, seed: int = 0, vocabulary: int = VOCABULARY) -> torch.Tensor:
    return torch.randn(rows, vocabulary, generator=torch.Generator().manual_seed(seed)) * 3


def test_repetition_penalty_is_transformers() -> None:
    logits = some_logits(3)
    contexts = [[5, 7, 5, 9], [1], list(range(200))]
    draws = [Draw(Sampling(repetition_penalty=1.7), 1, 0, context, 2) for context in contexts]
    processor = RepetitionPenaltyLogitsProcessor(1.7)
    wanted = torch.cat([processor(torch.tensor([c]), logits[[at]].clone()) for at, c in enumerate(contexts)])
    assert torch.equal(adjust(logits, draws), wanted)


def test_presence_and_frequency_count_outputs_only() -> None:
    logits = some_logits(1)
    draw = Draw(Sampling(presence_penalty=0.5, frequency_penalty=0.25), 3, 0, [8, 8, 4, 8, 4, 6], 2)
    wanted = logits.clone()
    wanted[0, 4] -= 0.5 + 2 * 0.25
    wanted[0, 8] -= 0.5 + 0.25
    wanted[0, 6] -= 0.5 + 0.25
    assert torch.allclose(adjust(logits, [draw]), wanted)


def test_bias_comes_before_penalties() -> None:
    logits = torch.full((1, VOCABULARY), -1.0)
    draw = Draw(Sampling(logit_bias={3: 5.0, 4: -100.0}, repetition_penalty=2.0), 0, 0, [3], 1)
    found = adjust(logits, [draw])[0]
    assert (float(found[3]), float(found[4]), float(found[5])) == (2.0, -101.0, -1.0)
    assert draw_rows(logits, [draw])[0].token_id == 3


def test_bad_words_are_transformers() -> None:
    phrases = ((5,), (7, 9), (9, 7, 9, 3), (1, 2, 4))
    contexts = [[5, 7], [9, 7, 9], [7], [3, 9, 7, 9], [1, 2]]
    logits = some_logits(len(contexts))
    draws = [Draw(Sampling(bad_words=phrases), 1, 0, context, 1) for context in contexts]
    processor = NoBadWordsLogitsProcessor([list(phrase) for phrase in phrases], eos_token_id=torch.tensor([2]))
    wanted = torch.cat([processor(torch.tensor([c]), logits[[at]].clone()) for at, c in enumerate(contexts)])
    assert torch.equal(adjust(logits, draws), wanted)


@pytest.mark.parametrize("temperature", [0.0, 1.5])
def test_bad_words_are_not_drawn(temperature: float) -> None:
    logits = torch.zeros(1, VOCABULARY)
    logits[0, 8] = 20.0
    alone = Sampling(temperature=temperature, bad_words=((8,),))
    after_3 = Sampling(temperature=temperature, bad_words=((3, 8),))
    assert draw_rows(logits, [Draw(Sampling(temperature=temperature), 0)])[0].token_id == 8
    assert draw_rows(logits, [Draw(alone, 0)])[0].token_id != 8
    assert draw_rows(logits, [Draw(after_3, 1, 0, [1, 3], 1)])[0].token_id != 8
    assert draw_rows(logits, [Draw(after_3, 1, 0, [3, 1], 1)])[0].token_id == 8


def test_a_bad_word_of_an_unknown_token_is_refused() -> None:
    with pytest.raises(ValueError, match="bad_words names token 300"):
        draw_rows(some_logits(1), [Draw(Sampling(bad_words=((1, VOCABULARY),)), 0)])


def test_bias_of_an_unknown_token_is_refused() -> None:
    with pytest.raises(ValueError, match="logit_bias names token 300"):
        draw_rows(some_logits(1), [Draw(Sampling(logit_bias={VOCABULARY: 1.0}), 0)])


@pytest.mark.parametrize("temperature", [0.3, 1.0, 2.5])
@pytest.mark.parametrize(
    ("sampling", "warpers"),
    [
        ({}, []),
        ({"top_k": 7}, [TopKLogitsWarper(7)]),
        ({"top_k": 10_000}, []),
        ({"top_p": 0.8}, [TopPLogitsWarper(0.8)]),
        ({"top_p": 1e-9}, [TopPLogitsWarper(1e-9)]),
        ({"top_p": 0.99999}, [TopPLogitsWarper(0.99999)]),
        ({"min_p": 0.05}, [MinPLogitsWarper(0.05)]),
        (
            {"top_k": 40, "top_p": 0.9, "min_p": 0.02},
            [TopKLogitsWarper(40), TopPLogitsWarper(0.9), MinPLogitsWarper(0.02)],
        ),
    ],
)
def test_truncation_is_transformers(
    temperature: float,
    sampling: dict[str, float],
    warpers: list[Callable[[torch.Tensor, torch.Tensor], torch.Tensor]],
) -> None:
    for seed in range(5):
        logits = some_logits(1, seed)
        wanted = TemperatureLogitsWarper(temperature)(torch.zeros(1, 1), logits.double())
        for warper in warpers:
            wanted = warper(torch.zeros(1, 1), wanted)
        wanted = wanted.softmax(-1)[0].numpy()
        ids, weights = candidates(logits[0], Sampling(temperature=temperature, **sampling))  # type: ignore[arg-type]
        assert ids.tolist() == np.flatnonzero(wanted).tolist()
        assert np.allclose(weights / weights.sum(), wanted[ids], rtol=1e-5)


@given(st.integers(0, 1 << 32), st.floats(0.01, 1.0), st.integers(2, 3000))
@settings(max_examples=60, deadline=None)
def test_nucleus_is_the_fewest_that_reach_top_p(seed: int, top_p: float, vocabulary: int) -> None:
    logits = some_logits(1, seed, vocabulary)[0]
    _, everything = candidates(logits, Sampling(temperature=1.0))
    ids, weights = candidates(logits, Sampling(temperature=1.0, top_p=top_p))
    total = everything.sum()
    assert weights.sum() >= top_p * total * (1 - 1e-9)
    assert (weights.sum() - weights.min()) < top_p * total * (1 + 1e-9)
    assert weights.min() >= np.delete(everything, ids).max(initial=0.0)


def test_greedy_takes_the_likeliest() -> None:
    logits = some_logits(6)
    drawn = draw_rows(logits, [Draw(Sampling(), at) for at in range(6)])
    assert [one.token_id for one in drawn] == logits.argmax(-1).tolist()


def test_a_draw_depends_on_seed_choice_and_index_and_on_nothing_else() -> None:
    logits = some_logits(1).repeat(4, 1) * 0.1
    sampling = Sampling(temperature=1.0, seed=5)

    def sequence(seed: int, choice: int) -> list[int]:
        draws = [Draw(Sampling(temperature=1.0, seed=seed), index, choice) for index in range(40)]
        return [draw_rows(logits[:1], [draw])[0].token_id for draw in draws]

    assert sequence(5, 0) == sequence(5, 0)
    assert len({tuple(sequence(seed, choice)) for seed in (5, 6, -1) for choice in (0, 1, 2)}) == 9
    assert len(set(sequence(5, 0))) > 20  # a stuck index would repeat itself
    alone = draw_rows(logits[:1], [Draw(sampling, 3, 1)])[0]
    others = [Draw(Sampling(temperature=0.3, top_k=4), 9), Draw(Sampling(), 0), Draw(sampling, 3, 1)]
    assert draw_rows(logits[:3], others)[2] == alone


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 1000), st.integers(1, 6))
def test_a_row_is_drawn_alike_in_every_batch(seed: int, rows: int) -> None:
    """Also with a vocabulary that no vector width divides."""
    logits = some_logits(rows, seed, 997)
    kinds = [
        Sampling(temperature=0.8, seed=seed),
        Sampling(temperature=1.2, top_p=0.7, seed=seed),
        Sampling(temperature=1.0, top_k=20, min_p=0.01, repetition_penalty=1.3, seed=seed),
        Sampling(frequency_penalty=0.3),
    ]
    draws = [Draw(kinds[(seed + at) % 4], at, 0, [1, 2, at], 1, top_logprobs=2) for at in range(rows)]
    together = draw_rows(logits, draws)
    assert together == [draw_rows(logits[[at]], [draw])[0] for at, draw in enumerate(draws)]


@pytest.mark.parametrize("sampling", [{}, {"top_k": 3}, {"top_p": 0.7}, {"min_p": 0.2}])
def test_frequencies(sampling: dict[str, float]) -> None:
    """Chi-square of 4,000 draws; 40 is far past the 99.9th percentile for at most 7 degrees of freedom."""
    logits = torch.tensor([[2.0, 1.5, 1.0, 0.0, -1.0, -2.0, 0.5, -torch.inf]])
    draws = 4000
    kind = Sampling(temperature=0.9, seed=77, **sampling)  # type: ignore[arg-type]
    ids, weights = candidates(logits[0], kind)
    wanted = np.zeros(8)
    wanted[ids] = weights / weights.sum() * draws
    rows = logits.expand(draws, 8)
    found = np.bincount([d.token_id for d in draw_rows(rows, [Draw(kind, at) for at in range(draws)])], minlength=8)
    assert (found[wanted == 0] == 0).all()
    likely = wanted > 0
    assert ((found[likely] - wanted[likely]) ** 2 / wanted[likely]).sum() < 40


def test_uniform_numbers_look_uniform() -> None:
    numbers = np.array([uniform(seed, 0, index) for seed in range(20) for index in range(200)])
    assert numbers.min() >= 0.0
    assert numbers.max() < 1.0
    assert abs(numbers.mean() - 0.5) < 0.02
    assert ((np.histogram(numbers, 16, (0, 1))[0] - 250) ** 2 / 250).sum() < 45
    rows = numbers.reshape(20, 200)
    assert abs(np.corrcoef(rows[:, :-1].ravel(), rows[:, 1:].ravel())[0, 1]) < 0.06


def test_logprobs_are_of_the_models_own_distribution() -> None:
    logits = some_logits(1)
    sampling = Sampling(temperature=0.5, top_k=2, logit_bias={9: 50.0}, seed=3)
    drawn = draw_rows(logits, [Draw(sampling, 0, top_logprobs=4)])[0]
    wanted = torch.log_softmax(logits[0].double(), -1)
    assert drawn.token_id == 9
    assert drawn.logprob == pytest.approx(float(wanted[9]))
    top = wanted.topk(4)
    assert [token for token, _ in drawn.top_logprobs] == top.indices.tolist()
    assert [value for _, value in drawn.top_logprobs] == pytest.approx(top.values.tolist())
    plain = draw_rows(logits, [Draw(sampling, 0)])[0]
    assert plain.logprob is None
    only = draw_rows(logits, [Draw(sampling, 0, top_logprobs=0)])[0]
    assert only.top_logprobs == ()
    assert only.logprob == drawn.logprob


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_broken_logits_are_an_error(value: float) -> None:
    logits = some_logits(2)
    logits[1, 5] = value
    with pytest.raises(FloatingPointError):
        draw_rows(logits, [Draw(Sampling(), 0), Draw(Sampling(), 0)])


class Only:
    """A matcher that allows these tokens, and is complete after so many."""

    def __init__(self, *tokens: int, length: int = 1 << 30, error: str = "") -> None:
        self.tokens, self.length, self.error = tokens, length, error
        self.asked: list[list[int]] = []

    def allowed(self, outputs: Sequence[int]) -> np.ndarray:
        self.asked.append(list(outputs))
        if self.error:
            raise ConstraintError(self.error)
        return np.isin(np.arange(VOCABULARY), self.tokens)

    def complete(self, outputs: Sequence[int]) -> bool:
        return len(outputs) >= self.length


ANYTHING = Constraint(ConstraintKind.REGEX, "whatever the matcher says")


def held(matcher: Only | None, context: Sequence[int] = (), prompt_tokens: int = 0, **sampling: object) -> Draw:
    kind = Sampling(constraint=ANYTHING, **sampling)  # type: ignore[arg-type]
    return Draw(kind, len(context) - prompt_tokens, 0, context, prompt_tokens, 2, matcher)


@pytest.mark.parametrize("temperature", [0.0, 1.0, 100.0])
def test_only_what_the_constraint_allows_is_drawn(temperature: float) -> None:
    """Also against a bias, and where the model gives it no probability to speak of."""
    logits = torch.zeros(50, VOCABULARY)
    logits[:, [5, 6]] = -200.0
    draws = [held(Only(5, 6), [1, 2], 1, temperature=temperature, seed=at, logit_bias={9: 1e6}) for at in range(50)]
    drawn = draw_rows(logits, draws)
    assert {one.token_id for one in drawn} == ({5} if temperature == 0.0 else {5, 6})
    assert draws[0].matcher.asked[0] == [2]  # outputs, not the prompt
    assert drawn[0].logprob == pytest.approx(float(torch.log_softmax(logits[0].double(), -1)[drawn[0].token_id]))


def test_a_constraint_touches_its_own_row_only() -> None:
    logits = some_logits(3)
    drawn = draw_rows(logits, [Draw(Sampling(), 0), held(Only(7)), Draw(Sampling(temperature=1.0, seed=4), 0)])
    alone = [
        draw_rows(logits[[row]], [draw])[0]
        for row, draw in ((0, Draw(Sampling(), 0)), (2, Draw(Sampling(temperature=1.0, seed=4), 0)))
    ]
    assert [drawn[0], drawn[2]] == alone
    assert drawn[1].token_id == 7


def test_the_last_token_of_a_constraint_says_so() -> None:
    matcher = Only(7, length=2)
    drawn = draw_rows(some_logits(2), [held(matcher), held(matcher, [3, 7], 1)])
    assert [one.complete for one in drawn] == [False, True]


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_row_without_anything_left_is_an_error_of_its_own(temperature: float) -> None:
    draws = [
        held(Only(3), temperature=temperature),
        held(Only(4, 5), temperature=temperature, bad_words=((4,), (5,))),
        held(Only(), temperature=temperature),
        held(Only(3, error="too complex"), temperature=temperature),
    ]
    first, *others = draw_rows(some_logits(4), draws)
    assert first.token_id == 3
    assert [type(other) for other in others] == [ConstraintError] * 3
    assert "no token may come next" in str(others[0])
    assert "no token may come next" in str(others[1])
    assert str(others[2]) == "too complex"


def test_a_constraint_without_a_matcher_is_never_ignored() -> None:
    with pytest.raises(ValueError, match="needs a matcher"):
        draw_rows(some_logits(1), [held(None)])
