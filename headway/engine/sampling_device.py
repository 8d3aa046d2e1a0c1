"""Drawing tokens where the logits lie, without a word to the host in between: see engine.sampling for what is drawn.

The host says all that it knows beforehand (`prepare`): each draw's uniform number, its biases, what it counts. The
device answers with one row of numbers a draw (`draw`), which the host reads when the step is over (`read`). Draws that
need something else than is implemented here take their logits to the host (`Prepared.on_host`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import MISSING, Field, fields
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch

from headway.core.sampling import ConstraintError, Sampling
from headway.engine.contract import Draw, Drawn
from headway.engine.sampling import _biases, _counts, _forbidden, _touches, draw_rows, uniform

Numbers = npt.NDArray[np.float64]

# What is implemented here; whoever sets another field is drawn for on the host.
_SAMPLING = {
    "temperature", "top_p", "top_k", "min_p", "repetition_penalty", "presence_penalty", "frequency_penalty", "seed",
    "logit_bias", "bad_words",
}  # fmt: skip
_DRAW = {"sampling", "output_index", "choice", "context", "prompt_tokens", "top_logprobs"}


class Prepared(NamedTuple):
    """vectors: int64 each, or float64 as int64 of the same bits, for the device. drawn, touched: rows that are not
    greedy, and those whose logits change first. nucleus, most: whether any draw has a top_p, and the largest top_k.
    named: the most log probabilities that any draw wants, None: nobody wants any. on_host: rows that the host draws.
    """

    draws: Sequence[Draw]
    vectors: list[torch.Tensor]
    drawn: bool
    touched: bool
    nucleus: bool
    most: int
    named: int | None
    on_host: list[int]

    @property
    def plain(self) -> bool:
        """Nothing is wanted but the likeliest token of each row."""
        return not (self.drawn or self.touched or self.on_host) and self.named is None


def prepare(draws: Sequence[Draw], vocabulary: int) -> Prepared:
    """Raises ValueError where a bias or a bad word names an unknown token."""
    if all(_is_plain(draw) for draw in draws):
        return Prepared(draws, [], False, False, False, 0, None, [])
    on_host = [row for row, draw in enumerate(draws) if not implemented(draw)]
    left = set(on_host)
    ours = [Draw(Sampling(), 0) if row in left else draw for row, draw in enumerate(draws)]
    rows = [row for row, draw in enumerate(ours) if not draw.sampling.greedy]
    touched = any(_touches(draw.sampling) for draw in ours)
    vectors = _changes(ours, vocabulary) if touched else []
    tops = [ours[row].sampling.top_k for row in rows]
    tops = [top if 0 < top < vocabulary else 0 for top in tops]
    nucleus = any(ours[row].sampling.top_p < 1.0 for row in rows)
    if rows:
        vectors += [torch.tensor(rows), torch.tensor(tops), *_chances([ours[row] for row in rows])]
    named = [draw.top_logprobs for draw in ours if draw.top_logprobs is not None]
    most_named = min(max(named), vocabulary) if named else None
    return Prepared(draws, vectors, bool(rows), touched, nucleus, max(tops, default=0), most_named, on_host)


def implemented(draw: Draw) -> bool:
    """Whether it is drawn here."""
    if not _OTHERS_OF_DRAW and not _OTHERS_OF_SAMPLING:
        return True
    others = ((draw, _OTHERS_OF_DRAW), (draw.sampling, _OTHERS_OF_SAMPLING))
    return all(getattr(at, name) == usual for at, names in others for name, usual in names)


def greedy(logits: torch.Tensor) -> torch.Tensor:
    """float32 [rows, vocabulary] → float64 [rows, 2]: likeliest token, its logit."""
    peaks, tokens = logits.max(dim=-1)
    return torch.stack([tokens.double(), peaks.double()], 1)


def draw(logits: torch.Tensor, prepared: Prepared, vectors: Sequence[torch.Tensor]) -> torch.Tensor:
    """logits: float32 [draws, vocabulary], left unchanged; vectors: those of `prepared` on their device. → float64
    [draws, 2 or more]: token, largest logit, and if anybody wants log probabilities: the token's, the ids of the
    likeliest, and theirs. Rows that the host draws hold their likeliest token.
    """
    given = list(vectors)
    table = greedy(logits)
    tokens, changed = table[:, 0].long(), logits
    if prepared.touched:
        changed, given = _changed(logits, given), given[9:]
        tokens = changed.argmax(dim=-1)
    if prepared.drawn:
        rows, tops, *chances = given
        chosen = _sample(changed.index_select(0, rows), tops, [part.view(torch.float64) for part in chances], prepared)
        tokens = tokens.index_copy(0, rows, chosen)
    columns = [tokens.double()[:, None], table[:, 1:]]
    if prepared.named is not None:
        logprobs = torch.log_softmax(logits.double(), dim=-1)
        top = logprobs.topk(prepared.named)
        columns += [logprobs.gather(1, tokens[:, None]), top.indices.double(), top.values]
    return torch.cat(columns, 1)


def read(table: Numbers, prepared: Prepared, rows: torch.Tensor | None) -> list[Drawn | ConstraintError]:
    """What was drawn, from the table of `draw` (or `greedy`) on the host. rows: float32 [on_host, vocabulary], there.

    Raises FloatingPointError where a row holds NaN or +inf.
    """
    if not np.isfinite(table[:, 1]).all():
        raise FloatingPointError("the model's logits are not finite")
    drawn: list[Drawn | ConstraintError] = [
        _read(line, one, prepared.named or 0) for line, one in zip(table, prepared.draws, strict=True)
    ]
    if rows is not None:
        on_host = draw_rows(rows, [prepared.draws[row] for row in prepared.on_host])
        for row, one in zip(prepared.on_host, on_host, strict=True):
            drawn[row] = one
    return drawn


def _is_plain(draw: Draw) -> bool:
    """Whether nothing is wanted but the likeliest token."""
    sampling = draw.sampling
    return sampling.greedy and draw.top_logprobs is None and not _touches(sampling) and implemented(draw)


def _read(line: Numbers, draw: Draw, named: int) -> Drawn:
    if draw.top_logprobs is None or len(line) == 2:
        return Drawn(int(line[0]))
    ids, values = line[3 : 3 + named], line[3 + named :]
    wanted = min(draw.top_logprobs, named)
    top = zip(ids[:wanted].astype(np.int64).tolist(), values[:wanted].tolist(), strict=True)
    return Drawn(int(line[0]), float(line[2]), tuple(top))


def _chances(draws: Sequence[Draw]) -> list[torch.Tensor]:
    """temperature, top_p, min_p and the uniform number of each."""
    settings = [draw.sampling for draw in draws]
    columns = (
        [sampling.temperature for sampling in settings],
        [sampling.top_p for sampling in settings],
        [sampling.min_p for sampling in settings],
        [uniform(draw.sampling.seed, draw.choice, draw.output_index) for draw in draws],
    )
    return [_bits(column) for column in columns]


def _changes(draws: Sequence[Draw], vocabulary: int) -> list[torch.Tensor]:
    """Nine vectors for `_changed`: rows, ids and values of biases; rows, ids and counts of tokens so far; the rows'
    penalties; rows, ids of bad words.
    """
    rows, ids, values = _biases(draws, vocabulary)
    seen_rows, seen_ids, counts = _counts(draws, vocabulary)
    penalties = [
        (each.repetition_penalty, each.presence_penalty, each.frequency_penalty)
        for each in (draw.sampling for draw in draws)
    ]
    bad = [(row, id_) for row, draw in enumerate(draws) for id_ in set(_forbidden(draw, vocabulary))]
    bad_rows, bad_ids = torch.tensor(bad, dtype=torch.int64).view(-1, 2).unbind(1)
    return [
        rows, ids, _bits(values.tolist()), seen_rows, seen_ids, _bits(counts.tolist()), _bits(penalties),
        bad_rows, bad_ids,
    ]  # fmt: skip


def _changed(logits: torch.Tensor, vectors: Sequence[torch.Tensor]) -> torch.Tensor:
    """As sampling.adjust."""
    rows, ids, values, seen_rows, seen_ids, counts, penalties, bad_rows, bad_ids = vectors[:9]
    result = logits.clone()
    result.index_put_((rows, ids), result[rows, ids] + values.view(torch.float64).float())
    strengths = penalties.view(torch.float64).float().index_select(0, seen_rows)
    repetition, presence, frequency = strengths.unbind(1)
    outputs = counts.view(torch.float64).float()
    found = result[seen_rows, seen_ids]
    found = torch.where(found < 0, found * repetition, found / repetition)
    result.index_put_((seen_rows, seen_ids), found - (presence * (outputs > 0) + frequency * outputs))
    never = torch.full((), -torch.inf, dtype=result.dtype, device=result.device)
    return result.index_put_((bad_rows, bad_ids), never)


def _sample(
    logits: torch.Tensor, tops: torch.Tensor, chances: Sequence[torch.Tensor], prepared: Prepared
) -> torch.Tensor:
    """int64 [rows]: the inverse of each row's cumulative distribution, over the tokens that may be drawn."""
    temperature, top_p, min_p, uniforms = (part[:, None] for part in chances)
    cool = logits / temperature.float()
    scaled = cool.double()
    peak = scaled.amax(-1, keepdim=True)
    weights = torch.exp(scaled - peak)
    may = weights >= min_p  # the likeliest weighs 1
    if prepared.nucleus or prepared.most:
        ordered = (
            cool.sort(-1, descending=True).values if prepared.nucleus else cool.topk(prepared.most).values
        ).double()
        last = ordered.gather(1, (tops[:, None] - 1).clamp_min(0))
        last = torch.where(tops[:, None] > 0, last, -torch.inf)
        may &= scaled >= last
        if prepared.nucleus:
            may &= weights >= _least(torch.exp(ordered - peak) * (ordered >= last), top_p)
    cumulative = torch.where(may, weights, 0.0).cumsum(-1)
    # A parallel sum need not grow everywhere; what was not kept must not be drawn all the same.
    total = torch.where(may, cumulative, 0.0).amax(-1, keepdim=True)
    target = torch.minimum(uniforms * total, torch.nextafter(total, torch.zeros_like(total)))
    return ((cumulative > target) & may).to(torch.uint8).argmax(-1)


def _least(ordered: torch.Tensor, top_p: torch.Tensor) -> torch.Tensor:
    """The smallest weight of the nucleus of each row (see sampling.candidates); `ordered` from the likeliest on."""
    reached = ordered.cumsum(-1) >= top_p * ordered.sum(-1, keepdim=True)
    least = ordered.gather(1, reached.to(torch.uint8).argmax(-1, keepdim=True))
    return torch.where(reached.any(-1, keepdim=True) & (top_p < 1.0), least, 0.0)


def _bits(numbers: Sequence[Any]) -> torch.Tensor:
    """float64 as int64 of the same bits: what the host says goes over in one piece."""
    return torch.tensor(numbers, dtype=torch.float64).view(torch.int64)


def _others(of: type, known: set[str]) -> list[tuple[str, object]]:
    """Names and defaults of fields that are not implemented here."""
    return [(field.name, _default(field)) for field in fields(of) if field.name not in known]


def _default(field: Field[Any]) -> object:
    return field.default_factory() if field.default_factory is not MISSING else field.default


_OTHERS_OF_DRAW = _others(Draw, _DRAW)
_OTHERS_OF_SAMPLING = _others(Sampling, _SAMPLING)
