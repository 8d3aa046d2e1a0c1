"""Fits the predictor's coefficients to what forwards took, while they come."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import combinations
from typing import NamedTuple

from headway.core.predict import NOTHING, Coefficients, Predictor

# What an observation still counts for after each later one: the last few hundred decide.
KEEP = 0.995
# An error of more than so many times the usual one counts as if it were no larger (Huber, 1964).
CLIP = 3.0
WEIGHT = 0.05
# A first guess of the usual relative error.
USUAL = 0.2
# Observations before which nothing is an outlier: there is nothing yet to judge by.
WARM_UP = 8
# After so many observations one more changes little, and the equations (30 µs) are solved for every few only.
SETTLED, SELDOM = 64, 8
# What was known at first counts as so many observations for ever: a worker that computes short prompts for hours still
# knows what a long one takes.
ANCHOR = 8.0
# Keeps the equations solvable while all observations are alike.
RIDGE = 1e-6

# What a draft adds to a step, in times of what one sequence more adds, is within these.
LEAST_DRAFT, MOST_DRAFT = 1 / 8, 8.0
# One sequence more adds at least this to a step of one, whatever the fit says.
LEAST_ROW = 1 / 32

Features = tuple[float, float, float]
State = list[float]


class Fit:
    """Weighted least squares of seconds = a·x₀ + b·x₁ + c·x₂, with a, b, c ≥ 0.

    Each observation is weighted by 1/seconds², so that the relative error is what is small, for short work and long.
    `error`: running mean of |predicted − taken| / taken, of predictions made before the observation counted.
    """

    def __init__(self, start: Coefficients = NOTHING) -> None:
        self.coefficients = start
        self.error = 0.0
        self.count = 0
        self._usual = USUAL
        # Sums of products of the features, and of features with 1 (seconds over seconds), upper triangle.
        self._products = [0.0] * 6
        self._targets = [0.0] * 3
        self._anchor = ([0.0] * 6, [0.0] * 3)

    def predict(self, features: Features) -> float:
        a, b, c = self.coefficients
        return a * features[0] + b * features[1] + c * features[2]

    def observe(self, features: Features, seconds: float) -> None:
        """Work with these features took `seconds`; what took no time says nothing."""
        if seconds <= 0:
            return
        relative = abs(self.predict(features) - seconds) / seconds
        weight = 1.0
        if self.count >= WARM_UP:
            weight = min(1.0, CLIP * self._usual / relative) if relative > 0 else 1.0
            self._usual += WEIGHT * (min(relative, CLIP * self._usual) - self._usual)
            self.error += WEIGHT * (relative - self.error)
        self.count += 1
        x, y, z = (feature / seconds for feature in features)
        self._products = [
            KEEP * old + weight * new
            for old, new in zip(self._products, (x * x, x * y, x * z, y * y, y * z, z * z), strict=True)
        ]
        self._targets = [KEEP * old + weight * new for old, new in zip(self._targets, (x, y, z), strict=True)]
        if self.count < SETTLED or self.count % SELDOM == 0:
            self._solve()

    def anchor(self) -> None:
        """What is known now is never forgotten altogether."""
        share = ANCHOR / max(ANCHOR, min(self.count, 1 / (1 - KEEP)))
        self._anchor = [share * value for value in self._products], [share * value for value in self._targets]

    def times(self, factor: float) -> Fit:
        """One to start from where everything takes so many times as long, with the same anchor."""
        other = Fit()
        a, b, c = self.coefficients
        other.coefficients = (a * factor, b * factor, c * factor)
        products, targets = self._anchor
        other._anchor = [value / (factor * factor) for value in products], [value / factor for value in targets]
        return other

    def _solve(self) -> None:
        products, targets = self._anchor
        self.coefficients = _least_squares(
            [now + before for now, before in zip(self._products, products, strict=True)],
            [now + before for now, before in zip(self._targets, targets, strict=True)],
        )

    def state(self) -> State:
        """To go on from after a restart."""
        products, targets = self._anchor
        return [*self._products, *self._targets, self.error, self._usual, float(self.count), *products, *targets]

    def restore(self, state: Sequence[float]) -> None:
        """Go on from `state`. ValueError when it is none."""
        if len(state) != 21:
            raise ValueError(f"a fit's state has 21 numbers, not {len(state)}")
        self._products, self._targets = list(state[:6]), list(state[6:9])
        self.error, self._usual, self.count = state[9], max(state[10], 1e-6), int(state[11])
        self._anchor = list(state[12:18]), list(state[18:21])
        if self.count:
            self._solve()


def _least_squares(products: Sequence[float], targets: Sequence[float]) -> Coefficients:
    """Of all subsets of coefficients that are not forced to 0, the best one whose solution has none below 0."""
    xx, xy, xz, yy, yz, zz = products
    matrix = ((xx, xy, xz), (xy, yy, yz), (xz, yz, zz))
    best, least = NOTHING, 0.0
    for size in (1, 2, 3):
        for chosen in combinations(range(3), size):
            solved = _solve([[matrix[i][j] for j in chosen] for i in chosen], [targets[i] for i in chosen])
            if solved is None or min(solved) < 0:
                continue
            # The sum of squares falls by the solution's product with the targets; constants are left out.
            gain = sum(value * targets[i] for value, i in zip(solved, chosen, strict=True))
            if gain > least * (1 + 1e-9):
                values = [0.0, 0.0, 0.0]
                for value, i in zip(solved, chosen, strict=True):
                    values[i] = value
                best, least = (values[0], values[1], values[2]), gain
    return best


def _solve(matrix: list[list[float]], targets: list[float]) -> list[float] | None:
    """By elimination; None when the equations say the same thing twice."""
    size = len(targets)
    scales = [matrix[i][i] for i in range(size)]
    if min(scales) <= 0:
        return None
    rows = [[*(value for value in row), target] for row, target in zip(matrix, targets, strict=True)]
    for i in range(size):
        rows[i][i] += RIDGE * scales[i]
    for i in range(size):
        if rows[i][i] <= 1e-9 * scales[i]:
            return None
        for j in range(i + 1, size):
            factor = rows[j][i] / rows[i][i]
            rows[j] = [below - factor * value for below, value in zip(rows[j], rows[i], strict=True)]
    solved = [0.0] * size
    for i in reversed(range(size)):
        known = sum(rows[i][j] * solved[j] for j in range(i + 1, size))
        solved[i] = (rows[i][size] - known) / rows[i][i]
    return solved


class ForwardWork(NamedTuple):
    """What one forward computed: (new, cached) tokens of each prompt's chunk, and the batch that decoded beside."""

    prompts: Sequence[tuple[int, int]] = ()
    batch: int = 0
    kv_tokens: int = 0
    drafts: int = 0


class DraftCost:
    """What a draft adds to a step. Starts from what a sequence more adds, and returns there where none are tried."""

    def __init__(self) -> None:
        self._drafts = self._seconds = 0.0

    def observe(self, drafts: int, seconds: float, row_s: float) -> None:
        """A step with so many drafts took `seconds` more than it should have without; one sequence more: `row_s`."""
        most_s = MOST_DRAFT * drafts * row_s
        self._drafts = KEEP * self._drafts + drafts
        self._seconds = KEEP * self._seconds + max(-most_s, min(most_s, seconds))

    def fade(self) -> None:
        """A step had none."""
        self._drafts *= KEEP
        self._seconds *= KEEP

    def seconds(self, row_s: float) -> float:
        """Of one draft; one sequence more: `row_s`."""
        return max(LEAST_DRAFT * row_s, (self._seconds + ANCHOR * row_s) / (self._drafts + ANCHOR))


class Timing:
    """The predictor of one worker, fitted to its forwards; starts from a guess that only has to order work."""

    def __init__(self, prefill: Coefficients = (0.0, 1e-3, 0.0), step: Coefficients = (1e-2, 0.0, 0.0)) -> None:
        self.prefill = Fit(prefill)
        self.step = Fit(step)
        self.draft = DraftCost()
        self.predictor = Predictor(prefill, step)

    @property
    def prefill_token_s(self) -> float:
        """Seconds per prefilled token of a prompt of 1,024; 0 until measured."""
        return self.predictor.prefill_s(1024, 0) / 1024 if self.prefill.count else 0.0

    @property
    def draft_s(self) -> float:
        """Seconds that a draft adds to a step."""
        return self.draft.seconds(self._row_s)

    @property
    def _row_s(self) -> float:
        """That one sequence more adds to a step; the fit may put all of it into the other coefficients."""
        return max(self.predictor.step[1], LEAST_ROW * self.predictor.step_s(1, 0))

    def observe(self, work: ForwardWork, seconds: float) -> None:
        """A forward took `seconds`. One of prompts and steps together is split by what the steps should take.

        One with drafts has no prompts, and says nothing of steps without.
        """
        if work.prompts:
            step_s = self.predictor.step_s(work.batch, work.kv_tokens) if work.batch else 0.0
            if not work.batch or self.step.count:
                self.prefill.observe(prefill_features(work.prompts), seconds - step_s)
        elif work.drafts:
            more_s = seconds - self.predictor.step_s(work.batch, work.kv_tokens)
            self.draft.observe(work.drafts, more_s, self._row_s)
        elif work.batch:
            self.draft.fade()
            self.step.observe((1.0, work.batch, work.kv_tokens), seconds)
        self.predictor = Predictor(self.prefill.coefficients, self.step.coefficients)

    def anchor(self) -> None:
        """What is known now is never forgotten altogether."""
        self.prefill.anchor()
        self.step.anchor()

    def times(self, factor: float) -> Timing:
        """One to start from where everything takes so many times as long."""
        other = Timing()
        other.prefill, other.step = self.prefill.times(factor), self.step.times(factor)
        other.predictor = Predictor(other.prefill.coefficients, other.step.coefficients)
        return other

    def state(self) -> dict[str, State]:
        return {"prefill": self.prefill.state(), "step": self.step.state()}

    def restore(self, state: dict[str, Sequence[float]]) -> None:
        """Go on from a former `state()`. ValueError when it is none."""
        try:
            self.prefill.restore([float(value) for value in state["prefill"]])
            self.step.restore([float(value) for value in state["step"]])
        except (KeyError, TypeError) as error:
            raise ValueError(f"no state of a worker's timing: {error}") from None
        self.predictor = Predictor(self.prefill.coefficients, self.step.coefficients)


def prefill_features(prompts: Iterable[tuple[int, int]]) -> Features:
    """Of one forward over chunks of (new, cached) tokens; see core.predict."""
    new = attended = 0.0
    for count, cached in prompts:
        new += count
        attended += count * (cached + count / 2)
    return (1.0, new, attended)
