"""Sampling on a device against sampling on the host: the same tokens, and nothing that a device cannot do by itself."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from headway.core.sampling import Sampling
from headway.engine import sampling_device
from headway.engine.contract import Draw, Drawn
from headway.engine.plan_device import moved
from headway.engine.sampling import adjust, candidates, draw_rows, uniform
from headway.engine.sampling_device import draw, greedy, prepare, read

VOCABULARY = 300
DEVICE = torch.device("cuda:0" if torch.cuda.is_available() else "cpu")


def some_logits(rows: int, seed: int = 0, vocabulary: int = VOCABULARY) -> torch.Tensor:
    return torch.randn(rows, vocabulary, generator=torch.Generator().manual_seed(seed)) * 3


def drawn_there(logits: torch.Tensor, draws: Sequence[Draw]) -> list[Drawn]:
    prepared = prepare(draws, logits.shape[1])
    there = logits.to(DEVICE)
    table = draw(there, prepared, moved(prepared.vectors, DEVICE) if prepared.vectors else [])
    rows = there[prepared.on_host].cpu() if prepared.on_host else None
    return read(table.cpu().numpy(), prepared, rows)


@st.composite
def samplings(drawn: st.DrawFn) -> Sampling:
    off = drawn(st.booleans())
    return Sampling(
        temperature=drawn(st.sampled_from([0.0, 0.3, 0.8, 1.0, 2.5])),
        top_p=drawn(st.sampled_from([1.0, 1.0, 0.9, 0.5, 1e-9, 0.99999])),
        top_k=drawn(st.sampled_from([0, 0, 1, 5, 40, VOCABULARY, 10_000])),
        min_p=drawn(st.sampled_from([0.0, 0.0, 0.01, 0.2, 1.0])),
        repetition_penalty=1.0 if off else drawn(st.sampled_from([1.0, 1.3, 0.7])),
        presence_penalty=0.0 if off else drawn(st.sampled_from([0.0, 0.5, -1.0])),
        frequency_penalty=0.0 if off else drawn(st.sampled_from([0.0, 0.25])),
        seed=drawn(st.integers(-5, 1 << 40)),
        logit_bias=drawn(st.dictionaries(st.integers(0, VOCABULARY - 1), st.floats(-50, 50), max_size=4)),
        bad_words=drawn(st.sampled_from([(), ((5,),), ((5,), (7, 9), (7, 9)), ((1, 2, 3), (3,))])),
    )


@st.composite
def many_draws(drawn: st.DrawFn) -> list[Draw]:
    draws = []
    for _ in range(drawn(st.integers(1, 5))):
        context = drawn(st.lists(st.integers(0, 20), max_size=12))
        draws.append(
            Draw(
                drawn(samplings()),
                drawn(st.integers(0, 1000)),
                drawn(st.integers(0, 3)),
                context,
                drawn(st.integers(0, len(context))),
                drawn(st.sampled_from([None, None, 0, 1, 5])),
            )
        )
    return draws


@settings(max_examples=150, deadline=None)
@given(many_draws(), st.integers(0, 1 << 20), st.booleans())
def test_draws_what_the_host_draws(draws: list[Draw], seed: int, coarse: bool) -> None:
    """Also of logits with many equal ones, as half precision gives them."""
    logits = some_logits(len(draws), seed)
    if coarse:
        logits = (logits * 2).round() / 2
    wanted = draw_rows(logits, draws)
    for row, (found, on_host) in enumerate(zip(drawn_there(logits, draws), wanted, strict=True)):
        if found.token_id != on_host.token_id:
            assert _at_a_border(logits[row], draws[row], found.token_id, on_host.token_id)
            continue
        assert (found.logprob is None) == (on_host.logprob is None)
        if on_host.logprob is not None:
            assert found.logprob == pytest.approx(on_host.logprob, rel=1e-9)
        assert len(found.top_logprobs) == len(on_host.top_logprobs)
        for (_, ours), (_, theirs) in zip(found.top_logprobs, on_host.top_logprobs, strict=True):
            assert ours == pytest.approx(theirs, rel=1e-9)


def _at_a_border(logits: torch.Tensor, one: Draw, found: int, wanted: int) -> bool:
    """Whether the uniform number lies within rounding of the border between the two tokens."""
    if one.sampling.greedy:
        return False
    ids, weights = candidates(adjust(logits[None], [one])[0], one.sampling)
    borders = np.cumsum(weights) / weights.sum()
    at = [int(np.flatnonzero(ids == token)[0]) for token in (found, wanted) if token in ids]
    lies = uniform(one.sampling.seed, one.choice, one.output_index)
    return len(at) == 2 and abs(at[0] - at[1]) == 1 and abs(borders[min(at)] - lies) < 1e-9


@pytest.mark.parametrize("sampling", [{}, {"top_k": 3}, {"top_p": 0.7}, {"min_p": 0.2}])
def test_frequencies(sampling: dict[str, float]) -> None:
    """Chi-square of 4,000 draws; 40 is far past the 99.9th percentile for at most 7 degrees of freedom."""
    logits = torch.tensor([[2.0, 1.5, 1.0, 0.0, -1.0, -2.0, 0.5, -torch.inf]])
    draws = 4000
    kind = Sampling(temperature=0.9, seed=77, **sampling)  # type: ignore[arg-type]
    ids, weights = candidates(logits[0], kind)
    wanted = np.zeros(8)
    wanted[ids] = weights / weights.sum() * draws
    tokens = [one.token_id for one in drawn_there(logits.expand(draws, 8), [Draw(kind, at) for at in range(draws)])]
    found = np.bincount(tokens, minlength=8)
    assert (found[wanted == 0] == 0).all()
    likely = wanted > 0
    assert ((found[likely] - wanted[likely]) ** 2 / wanted[likely]).sum() < 40


def test_a_row_is_drawn_alike_in_every_batch() -> None:
    logits = some_logits(4, 3)
    kinds = [Sampling(temperature=1.0, seed=4), Sampling(), Sampling(temperature=1.3, top_p=0.6, frequency_penalty=0.2)]
    draws = [Draw(kind, 5, 0, [1, 2, 2], 1, top_logprobs=3) for kind in [*kinds, Sampling(temperature=0.7, top_k=9)]]
    assert drawn_there(logits, draws) == [drawn_there(logits[[at]], [one])[0] for at, one in enumerate(draws)]


def test_no_word_to_the_host_in_between() -> None:
    """Tensors of the device "meta" have no numbers: whatever asks for one raises."""
    meta = torch.device("meta")
    kinds = [
        Sampling(),
        Sampling(temperature=0.7, top_k=3, top_p=0.9, min_p=0.1, repetition_penalty=1.2, frequency_penalty=0.1),
        Sampling(temperature=1.0, logit_bias={3: 1.0}, bad_words=((4,),)),
    ]
    prepared = prepare([Draw(kind, at, 0, [1, 2], 1, 4) for at, kind in enumerate(kinds)], VOCABULARY)
    table = draw(torch.zeros(3, VOCABULARY, device=meta), prepared, moved(prepared.vectors, meta))
    assert tuple(table.shape) == (3, 3 + 2 * 4)
    assert tuple(greedy(torch.zeros(3, VOCABULARY, device=meta)).shape) == (3, 2)
    with pytest.raises((NotImplementedError, RuntimeError)):
        table[0, 0].item()


def test_a_greedy_batch_sends_nothing() -> None:
    prepared = prepare([Draw(Sampling(), at) for at in range(8)], VOCABULARY)
    assert (prepared.plain, prepared.vectors) == (True, [])
    logits = some_logits(8)
    found = read(greedy(logits).numpy(), prepared, None)
    assert [one.token_id for one in found] == logits.argmax(-1).tolist()


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_broken_logits_are_an_error(value: float) -> None:
    logits = some_logits(2)
    logits[1, 5] = value
    with pytest.raises(FloatingPointError):
        drawn_there(logits, [Draw(Sampling(), 0), Draw(Sampling(temperature=1.0), 0)])


@pytest.mark.parametrize("sampling", [{"logit_bias": {VOCABULARY: 1.0}}, {"bad_words": ((1, VOCABULARY),)}])
def test_an_unknown_token_is_refused_before_anything_is_sent(sampling: dict[str, object]) -> None:
    with pytest.raises(ValueError, match="names token 300"):
        prepare([Draw(Sampling(**sampling), 0)], VOCABULARY)  # type: ignore[arg-type]


def test_what_is_not_implemented_is_drawn_on_the_host(monkeypatch: pytest.MonkeyPatch) -> None:
    """A field that a later version adds, where it is set."""

    @dataclass(frozen=True)
    class Later(Draw):
        grammar: str | None = None

    monkeypatch.setattr(sampling_device, "_OTHERS_OF_DRAW", sampling_device._others(Later, sampling_device._DRAW))
    asked: list[Draw] = []

    def on_host(logits: torch.Tensor, draws: Sequence[Draw]) -> list[Drawn]:
        asked.extend(draws)
        return draw_rows(logits, draws)

    monkeypatch.setattr(sampling_device, "draw_rows", on_host)
    logits = some_logits(3)
    usual = Later(Sampling(temperature=1.0, seed=9), 3)
    draws = [usual, replace(usual, grammar="a+"), replace(usual, choice=1)]
    found = drawn_there(logits, draws)
    assert asked == draws[1:2]
    assert found == draw_rows(logits, draws)


def test_every_field_is_either_implemented_or_has_a_default() -> None:
    assert all(sampling_device.implemented(Draw(Sampling(temperature=t), 0)) for t in (0.0, 1.0))
    names = {name for name, _ in (*sampling_device._OTHERS_OF_DRAW, *sampling_device._OTHERS_OF_SAMPLING)}
    assert not names & {"temperature", "sampling", "context"}
