"""Drawing tokens. Randomness is a pure function of (seed, choice, output index); no row depends on its neighbours.

Order, as transformers applies its processors: bias, repetition penalty, presence and frequency penalties, bad words,
constraint, temperature, top-k, top-p, min-p; then the inverse of the cumulative distribution, over tokens in order of
their ids.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import torch

from headway.core.sampling import ConstraintError, Sampling
from headway.engine.contract import Draw, Drawn

_MASK = (1 << 64) - 1
_GOLDEN = 0x9E3779B97F4A7C15

NOTHING_LEFT = "no token may come next: the constraint and bad_words (or ignore_eos) leave none; change one of them"

Floats = npt.NDArray[np.float64]
Ids = npt.NDArray[np.int64]


def draw_rows(logits: torch.Tensor, draws: Sequence[Draw]) -> list[Drawn | ConstraintError]:
    """One token a row of `logits` (float32 [rows, vocabulary], the model's own; left unchanged), or why there is none.

    Greedy tokens are found where the logits lie; all that is drawn otherwise, on the host, the same on every device.
    Raises FloatingPointError where a row holds NaN or +inf, ValueError where a bias names an unknown token.
    """
    if not draws:
        return []
    peaks, tokens = logits.max(dim=-1)
    if not bool(torch.isfinite(peaks).all()):
        raise FloatingPointError("the model's logits are not finite")
    chosen: list[int] = tokens.tolist()
    if any(_needs_row(draw) for draw in draws):
        logits = logits.cpu()
    touched = [row for row, draw in enumerate(draws) if _touches(draw.sampling)]
    refused: dict[int, ConstraintError] = {}
    if touched:
        adjusted = adjust(logits[touched], [draws[row] for row in touched])
        refused = constrain(adjusted, [draws[row] for row in touched])
        refused = {touched[place]: error for place, error in refused.items()}
        for row, token in zip(touched, adjusted.argmax(dim=-1).tolist(), strict=True):
            chosen[row] = token
    places = {row: place for place, row in enumerate(touched)}
    for row, draw in enumerate(draws):
        if not draw.sampling.greedy and row not in refused:
            source = adjusted[places[row]] if row in places else logits[row]
            chosen[row] = _sample(source, draw)
    return [refused.get(row) or _drawn(logits[row], chosen[row], draw) for row, draw in enumerate(draws)]


def constrain(adjusted: torch.Tensor, draws: Sequence[Draw]) -> dict[int, ConstraintError]:
    """Takes from `adjusted` [rows, vocabulary] what each row's constraint forbids; row → why nothing is left.

    Raises ValueError where a draw has a constraint and no matcher.
    """
    refused = {}
    for row, draw in enumerate(draws):
        if draw.sampling.constraint is None:
            continue
        if draw.matcher is None:
            raise ValueError("a draw with a constraint needs a matcher")
        try:
            adjusted[row].masked_fill_(torch.from_numpy(~draw.matcher.allowed(draw.outputs)), -torch.inf)
            if float(adjusted[row].max()) == -math.inf:
                raise ConstraintError(NOTHING_LEFT)
        except ConstraintError as error:
            refused[row] = error
    return refused


def uniform(seed: int, choice: int, output_index: int) -> float:
    """A number in [0, 1) from a counter-based generator: three rounds of splitmix64 (Steele, Lea, Flood 2014)."""
    state = 0
    for word in (seed, choice, output_index):
        state = _mix((state ^ (word & _MASK)) + _GOLDEN)
    return (state >> 11) * 2.0**-53


def adjust(logits: torch.Tensor, draws: Sequence[Draw]) -> torch.Tensor:
    """Biased and penalised copy of `logits` [rows, vocabulary], all rows at once; one draw a row."""
    result = logits.clone()
    vocabulary = logits.shape[1]
    rows, ids, values = _biases(draws, vocabulary)
    result[rows, ids] += values
    # (row, token) pairs that any penalty touches, how often each token was put out, and the rows' own strengths
    rows, ids, outputs = _counts(draws, vocabulary)
    repetition = torch.tensor([draw.sampling.repetition_penalty for draw in draws])[rows]
    presence = torch.tensor([draw.sampling.presence_penalty for draw in draws])[rows]
    frequency = torch.tensor([draw.sampling.frequency_penalty for draw in draws])[rows]
    values = result[rows, ids]
    values = torch.where(values < 0, values * repetition, values / repetition)
    result[rows, ids] = values - (presence * (outputs > 0) + frequency * outputs)
    for row, draw in enumerate(draws):
        if draw.sampling.bad_words:
            result[row, _forbidden(draw, vocabulary)] = -torch.inf
    return result


def candidates(logits: torch.Tensor, sampling: Sampling) -> tuple[Ids, Floats]:
    """The tokens that may be drawn, by id, and their unnormalised probabilities; `logits` [vocabulary]."""
    scaled = (logits / sampling.temperature).double()
    ids = torch.arange(len(scaled))
    if 0 < sampling.top_k < len(scaled):
        ids = torch.nonzero(scaled >= scaled.topk(sampling.top_k).values[-1]).flatten()
        scaled = scaled[ids]
    weights = np.exp((scaled - scaled.max()).numpy())
    keep = (weights >= sampling.min_p) & (weights > 0.0)  # the likeliest weighs 1
    if sampling.top_p < 1.0:
        keep &= weights >= _nucleus(weights, sampling.top_p)
    kept = np.flatnonzero(keep)
    return ids.numpy()[kept], weights[kept]


def _nucleus(weights: Floats, top_p: float) -> float:
    """The smallest weight among the fewest likeliest tokens whose probabilities reach top_p (Holtzman et al. 2020)."""
    total = float(weights.sum())
    count = min(256, len(weights))
    while True:
        likeliest = np.sort(np.partition(weights, len(weights) - count)[len(weights) - count :])[::-1]
        reached = np.cumsum(likeliest) >= top_p * total
        if reached.any():
            return float(likeliest[np.argmax(reached)])
        if count == len(weights):
            return 0.0
        count = min(count * 8, len(weights))


def _sample(logits: torch.Tensor, draw: Draw) -> int:
    ids, weights = candidates(logits, draw.sampling)
    cumulative = np.cumsum(weights)
    target = uniform(draw.sampling.seed, draw.choice, draw.output_index) * cumulative[-1]
    place = int(np.searchsorted(cumulative, target, side="right"))
    return int(ids[min(place, len(ids) - 1)])


def _drawn(logits: torch.Tensor, token: int, draw: Draw) -> Drawn | ConstraintError:
    try:
        complete = draw.matcher is not None and draw.matcher.complete([*draw.outputs, token])
    except ConstraintError as error:
        return error
    if draw.top_logprobs is None:
        return Drawn(token, complete=complete)
    logprobs = torch.log_softmax(logits.double(), dim=-1)
    top = logprobs.topk(min(draw.top_logprobs, len(logprobs)))
    named = zip(top.indices.tolist(), top.values.tolist(), strict=True)
    return Drawn(token, float(logprobs[token]), tuple(named), complete=complete)


def _needs_row(draw: Draw) -> bool:
    """More than the likeliest token is asked of the row."""
    return not draw.sampling.greedy or draw.top_logprobs is not None or _touches(draw.sampling)


def _touches(sampling: Sampling) -> bool:
    return bool(sampling.logit_bias or sampling.bad_words) or sampling.uses_context


def _forbidden(draw: Draw, vocabulary: int) -> list[int]:
    """The tokens that would complete one of the bad words."""
    phrases = draw.sampling.bad_words
    if unknown := [token for phrase in phrases for token in phrase if not 0 <= token < vocabulary]:
        raise ValueError(f"bad_words names token {unknown[0]}; the vocabulary has {vocabulary}")
    longest = max((len(phrase) for phrase in phrases), default=1) - 1
    end = tuple(draw.context[max(0, len(draw.context) - longest) :])
    return [phrase[-1] for phrase in phrases if len(phrase) == 1 or end[-(len(phrase) - 1) :] == phrase[:-1]]


def _biases(draws: Sequence[Draw], vocabulary: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    entries = [(row, token, bias) for row, draw in enumerate(draws) for token, bias in draw.sampling.logit_bias.items()]
    for _, token, _ in entries:
        if not 0 <= token < vocabulary:
            raise ValueError(f"logit_bias names token {token}; the vocabulary has {vocabulary}")
    rows = torch.tensor([row for row, _, _ in entries], dtype=torch.int64)
    ids = torch.tensor([token for _, token, _ in entries], dtype=torch.int64)
    return rows, ids, torch.tensor([bias for _, _, bias in entries], dtype=torch.float32)


def _counts(draws: Sequence[Draw], vocabulary: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(rows, ids, how often among the outputs) of every token of each context; all int64 but the counts, float32."""
    rows: list[Ids] = [np.zeros(0, np.int64)]
    ids: list[Ids] = [np.zeros(0, np.int64)]
    outputs: list[Ids] = [np.zeros(0, np.int64)]
    for row, draw in enumerate(draws):
        if draw.sampling.penalises:
            context = np.asarray(draw.context, np.int64)
            seen = np.unique(context)
            rows.append(np.full(len(seen), row, np.int64))
            ids.append(seen)
            outputs.append(np.bincount(context[draw.prompt_tokens :], minlength=vocabulary)[seen])
    return (
        torch.from_numpy(np.concatenate(rows)),
        torch.from_numpy(np.concatenate(ids)),
        torch.from_numpy(np.concatenate(outputs)).float(),
    )


def _mix(state: int) -> int:
    state &= _MASK
    state = (state ^ (state >> 30)) * 0xBF58476D1CE4E5B9 & _MASK
    state = (state ^ (state >> 27)) * 0x94D049BB133111EB & _MASK
    return state ^ (state >> 31)
