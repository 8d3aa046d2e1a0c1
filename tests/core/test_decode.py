"""Who goes on with an answer, and when a decode worker computes the prompt by itself."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from headway.core.ask import Why
from headway.core.load import Share
from headway.core.place import Placer
from headway.core.predict import Predictor
from headway.core.step import UNCUT, StepLimits
from tests.core.placing import ask, picked, placer, reasons, weighed, worker


def test_decode_computes_little_by_itself() -> None:
    made = placer(worker("p0", queued_s=0.5), worker("d0"))
    assert picked(made, resident={"n": 80}) == (None, "d0")
    assert picked(made, resident={"n": 64}) == ("p0", "d0")
    assert picked(made, resident={"n": 80}, force_apart=True) == ("p0", "d0")


def test_decode_computes_nothing_that_breaks_its_pace() -> None:
    made = placer(worker("p0", queued_s=5.0), worker("d0", running=4), itl_objective_s=0.03)
    assert picked(made, resident={"n": 80}) == ("p0", "d0")
    assert "the objective is 30 ms" in reasons(weighed(made, ask(resident={"n": 80})))["d0"]
    made = placer(worker("p0", queued_s=5.0), worker("d0", running=4), itl_objective_s=0.04)
    assert picked(made, resident={"n": 80}) == (None, "d0")


def test_the_chunk_that_counts_against_its_pace_is_no_longer_than_its_forwards_take() -> None:
    """But not as short as its own objective would cut it: streams would go at that pace for as long as it takes."""
    for limits, wanted in (
        (UNCUT, ("p0", "d0")),
        (replace(UNCUT, chunk_tokens=16), (None, "d0")),
        (replace(UNCUT, itl_s=0.04), ("p0", "d0")),
    ):
        decode = worker("d0", running=4, limits=limits)
        made = placer(worker("p0", queued_s=5.0), decode, itl_objective_s=0.04, local_prefill_tokens=50)
        assert picked(made, resident={"n": 64}) == wanted


def test_prompts_that_a_decode_worker_has_already_count_against_its_pace() -> None:
    made = placer(worker("p0", queued_s=5.0), worker("d0", running=4), itl_objective_s=0.04)
    option = made.place(ask(prompt_tokens=15), 0.0)
    assert option is not None
    assert option.worker == "d0"
    made.reserve("first", ask(prompt_tokens=15), option, 0.0)
    assert picked(made, prompt_tokens=15) == ("p0", "d0")


def test_more_sequences_than_a_batch_has_places_take_turns() -> None:
    """A step is no longer for them, but each has its turn more seldom."""
    full, over = (worker("d0", running=running, limits=StepLimits(batch=4)) for running in (4, 8))
    assert over.step_s() == full.step_s() == pytest.approx(0.014)
    assert worker("d0", running=3, limits=StepLimits(batch=4)).itl_s(0) == pytest.approx(0.014)
    assert full.itl_s(0) == pytest.approx(0.014 * 5 / 4)
    assert over.itl_s(0) == pytest.approx(0.014 * 9 / 4)
    # So that a decode worker with too many takes no prompt that prefill workers can have.
    made = placer(worker("p0", queued_s=5.0), over, itl_objective_s=0.04, local_prefill_tokens=50)
    assert picked(made, prompt_tokens=10) == ("p0", "d0")


def test_a_prompt_at_a_decode_worker_shares_its_steps() -> None:
    busy = placer(worker("d0", running=4, limits=StepLimits(shared_chunk_s=0.02))).place(ask(), 0.0)
    assert busy is not None
    # 100 ms in five chunks, each beside a step of 14 ms.
    assert busy.compute_s == pytest.approx(0.1 + 5 * 0.014)


def test_how_many_steps_a_prompt_shares_follows_from_all_limits_of_the_worker() -> None:
    def steps(**limits: Any) -> int:
        # A step takes 14 ms; 100 tokens take 100 ms.
        return worker("m0", running=4, limits=replace(UNCUT, **limits)).steps_of(100, 0.1)

    assert steps() == 1
    assert steps(chunk_tokens=30) == 4
    assert steps(shared_chunk_s=0.02) == 5
    assert steps(itl_s=0.064) == 2
    assert steps(itl_s=0.064, chunk_tokens=40, shared_chunk_s=0.08) == 3
    assert steps(itl_s=0.001) == 7, "a block of 16 tokens goes into every step"
    assert worker("m0", running=4).steps_of(0, 0.0) == 0
    unknown = worker("m0", running=4, limits=replace(UNCUT, itl_s=0.001))
    assert unknown.steps_of(100, 0.0) == 1, "it has not said how fast it is"


@pytest.mark.parametrize("away", [{"ready": False}, {"draining": True}])
def test_decode_computes_all_when_no_prefill_worker_is_there(away: dict[str, bool]) -> None:
    made = placer(worker("p0", **away), worker("d0"))
    assert picked(made) == (None, "d0")
    assert made.place(ask(force_apart=True), 0.0) is None


def test_busy_prefill_workers_are_there_all_the_same() -> None:
    made = placer(worker("p0", reported=10), worker("d0"))
    assert made.place(ask(), 0.0) is None
    assert any(option.refused and option.refused.why is Why.BUSY for option in weighed(made, ask()))


def test_mixed_worker_joins_only_where_nobody_else_can() -> None:
    assert picked(placer(worker("p0", queued_s=0.05), worker("m0"))) == (None, "m0")
    loaded = worker("m0", queued_s=0.05)
    assert picked(placer(worker("p0"), loaded)) == ("p0", "m0")
    assert picked(placer(worker("p0"), loaded, worker("d0", running=8))) == ("p0", "d0")


def test_decode_goes_to_another_node_where_its_pace_is_better() -> None:
    def made(latency_s: float, here: int) -> Placer:
        workers = [worker("p0", node="a"), worker("d0", node="a", running=here), worker("d1", node="b")]
        return placer(*workers, latency_s=latency_s)

    assert picked(made(0.005, 0)) == ("p0", "d0")
    assert picked(made(0.005, 1)) == ("p0", "d1")
    assert picked(made(0.5, 1)) == ("p0", "d0")


def test_a_decode_worker_without_room_for_the_answer_is_the_last_choice() -> None:
    roomy, tight = worker("d0", running=9), worker("d1", node="b", total_slots=10)
    tight.others_are(Share(0, 50))
    assert picked(placer(worker("p0"), roomy, tight), expected_tokens=20) == ("p0", "d0")
    tight.others_are(Share(0, 20))
    assert picked(placer(worker("p0"), roomy, tight), expected_tokens=20) == ("p0", "d1")


def test_full_batch_is_the_last_choice() -> None:
    full = worker("d0", running=4, limits=StepLimits(batch=4), predictor=Predictor())
    assert picked(placer(worker("p0"), full, worker("d1", running=9))) == ("p0", "d1")
    assert picked(placer(worker("p0"), full)) == ("p0", "d0")


def test_those_to_come_count_for_decode_and_not_against_computing_there() -> None:
    decode = worker("d0")
    for _ in range(60):
        decode.join(100, 20)
    made = placer(worker("p0", queued_s=5.0), decode, worker("d1", running=3), itl_objective_s=0.05)
    assert picked(made, resident={"n": 80}) == (None, "d0")
    assert picked(made, force_apart=True) == ("p0", "d1")
