"""Whole fleets in virtual time: what must come out whatever the policy, and what ours is for."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest

from headway.core.ask import Ask
from headway.core.baselines import LeastTokens
from headway.core.order import Order, Rule
from headway.core.policy import Candidate
from headway.core.predict import Predictor
from headway.core.step import StepLimits
from headway.sim.fleet import SimFleet
from headway.sim.hardware import Linear
from headway.sim.objective import Objective
from headway.sim.policies import entries
from headway.sim.presets import STUDY
from headway.sim.scenario import Outcome, Scenario
from headway.sim.summary import clairvoyant_s, summarise, waiting_over_time
from headway.sim.trace import Trace, TraceRequest
from headway.sim.workload import Workload, make_trace

CHAT = make_trace(Workload("chat", 1.2, 120.0, turns=4.0, turn_tokens=3000, pause_s=10.0))
POLICIES = entries()


def run(policy: str, trace: Trace = CHAT, **scenario: Any) -> Outcome:
    return SimFleet(
        trace, Scenario(**{"hardware": STUDY, "prefill": 4, "decode": 3, **scenario}), POLICIES[policy]
    ).run()


@pytest.mark.parametrize("policy", POLICIES)
def test_every_request_ends_in_order_and_nothing_is_left(policy: str) -> None:
    fleet = SimFleet(CHAT, Scenario(STUDY, 4, 3, local_prefill_tokens=2048), POLICIES[policy])
    outcome = fleet.run()
    assert len(outcome.sequences) == len(CHAT)
    for s in outcome.sequences:
        assert not s.refused
        assert s.started_s is not None
        assert s.first_token_s is not None
        assert s.finished_s is not None
        assert s.arrival_s <= s.started_s < s.first_token_s <= s.finished_s
        assert 0 <= s.cached < s.request.prompt_tokens
    for load in fleet._placer.loads.values():
        assert (len(load.backlog), load.backlog.tokens, load.running, load.memory.committed_tokens) == (0, 0, 0, 0)
    assert fleet._placer.promises.overlap(CHAT.requests[0].keys) == {}
    tokens = sum(tokens for _, tokens in outcome.steps)
    assert tokens == sum(r.output_tokens - 1 for r in CHAT.requests)
    assert 0 < outcome.load < 2


def test_a_run_is_the_same_every_time_and_differs_by_seed() -> None:
    def times(seed: int) -> list[float | None]:
        return [s.first_token_s for s in run("reference", noise=0.2, seed=seed).sequences]

    assert times(1) == times(1)
    assert times(1) != times(2)


@pytest.mark.parametrize("policy", ["headway", "reference", "round-robin", "mooncake"])
def test_nobody_beats_who_knows_all(policy: str) -> None:
    bound = clairvoyant_s(CHAT, STUDY, 4)
    assert len(bound) == len(CHAT)
    assert sum(bound) / len(bound) <= summarise(run(policy)).mean_s


def test_ours_waits_less_than_round_robin_and_the_reference() -> None:
    busy = CHAT.faster(1.6)
    mean = {policy: summarise(run(policy, busy)).mean_s for policy in ("headway", "reference", "round-robin")}
    assert mean["headway"] < 0.8 * mean["reference"] < mean["round-robin"]


def test_predictions_come_true_while_nothing_comes_between() -> None:
    calm = CHAT.faster(0.1)
    assert summarise(run("headway", calm)).prediction_error < 0.01
    assert summarise(run("headway", calm, noise=0.2)).prediction_error == pytest.approx(0.13, abs=0.05)


def test_late_news_and_noise_cost_something_but_not_much() -> None:
    exact, blurred = summarise(run("headway")), summarise(run("headway", noise=0.2, stale_s=0.1))
    assert blurred.mean_s < 1.5 * exact.mean_s


def request(arrival_s: float, tokens: int, *keys: int, output: int = 1, **fields: Any) -> TraceRequest:
    return TraceRequest(arrival_s, tokens, output, [bytes([key]) * 16 for key in keys], **fields)


def trace(*requests: TraceRequest) -> Trace:
    return Trace("t", 512, requests)


def test_a_burst_of_siblings_computes_its_prefix_once() -> None:
    prefix = range(1, 41)
    siblings = [request(0.001 * at, 40 * 512 + 100, *prefix, 100 + at) for at in range(6)]

    def computed(policy: str) -> int:
        return sum(s.request.prompt_tokens - s.cached for s in run(policy, trace(*siblings)).sequences)

    assert computed("headway") < 1.1 * 40 * 512
    assert computed("round-robin") > 2 * computed("headway")


def test_hot_prefixes_spread_by_being_pulled_and_no_worker_starves() -> None:
    prefix = range(1, 41)
    first = request(0.0, 40 * 512, *prefix)
    later = [request(10.0 + 0.01 * at, 40 * 512 + 3000, *prefix, *range(50 + at, 56 + at)) for at in range(12)]
    outcome = run("headway", trace(first, *later))
    served = {s.worker for s in outcome.sequences[1:]}
    assert len(served) == 4
    assert sum(s.pulled > 0 for s in outcome.sequences) >= 3
    assert all(s.cached >= 40 * 512 for s in outcome.sequences[1:])
    without = run("headway", trace(first, *later), link_bytes_per_s=0.0)
    assert not any(s.pulled for s in without.sequences)
    assert summarise(without).mean_s > summarise(outcome).mean_s


def test_a_prefix_that_was_evicted_costs_a_recompute_and_nothing_else() -> None:
    tight = replace(STUDY, cache_tokens=200 * 512)
    outcome = run("headway", hardware=tight)
    assert all(s.finished_s is not None or s.refused for s in outcome.sequences)
    assert 0 < summarise(outcome).hit < summarise(run("headway")).hit


def test_an_idle_decode_worker_helps_while_its_pace_allows() -> None:
    burst = trace(*(request(0.001 * at, 2000, output=2) for at in range(40)))
    alone = run("headway", burst)
    helped = run("headway", burst, local_prefill_tokens=2048, itl_objective_s=0.15)
    assert summarise(helped).mean_s < 0.75 * summarise(alone).mean_s
    assert {s.worker[0] for s in helped.sequences} == {"p", "d"}
    assert {s.worker[0] for s in alone.sequences} == {"p"}


def test_what_is_admitted_is_in_time_and_the_rest_is_refused_at_once() -> None:
    rush = CHAT.faster(4.0)
    objective = Objective(0.5, 2.0)
    outcome = run("headway", rush, objective=objective)
    admitted = [sequence for sequence in outcome.sequences if sequence.worker]
    refused = [sequence for sequence in outcome.sequences if not sequence.worker]
    assert all(sequence.refused for sequence in refused)
    late = [sequence for sequence in admitted if sequence.ttft_s is None]
    assert len(late) <= 0.01 * len(admitted)
    assert 0.2 * len(rush) < len(admitted) < len(rush)


def test_what_is_late_is_given_up_when_its_time_is_over() -> None:
    objective = Objective(0.5, 2.0)
    outcome = run("headway", CHAT.faster(4.0), objective=objective, noise=0.8)
    hardware = outcome.scenario.hardware
    assert any(sequence.refused and sequence.worker for sequence in outcome.sequences), "promised, and not kept"
    assert all(s.refused or objective.met(s.request, s.ttft_s, hardware) for s in outcome.sequences)
    assert all(sequence.ttft_s is None for sequence in outcome.sequences if sequence.refused)


def test_a_queue_that_is_too_long_gets_nothing_more() -> None:
    outcome = run("headway", CHAT.faster(20.0), max_wait_s=1.0)
    served = [sequence.ttft_s for sequence in outcome.sequences if sequence.ttft_s is not None]
    assert len(served) < len(outcome.sequences)
    assert max(served) < max(s.ttft_s or 0.0 for s in run("headway", CHAT.faster(20.0)).sequences)


def test_priority_goes_first() -> None:
    crowd = [request(0.001 * at, 5000) for at in range(40)]
    urgent = request(0.1, 5000, priority=1)
    outcome = run("headway", trace(*crowd, urgent))
    ttfts = sorted(s.ttft_s or 0.0 for s in outcome.sequences[:-1])
    assert (outcome.sequences[-1].ttft_s or math.inf) < ttfts[8]


def test_a_tenants_flood_delays_the_tenant_and_not_the_others() -> None:
    flood = [request(0.01 * number, 2000, tenant="flood") for number in range(400)]

    def waited(tenant: str) -> float:
        requests = sorted([*flood, request(1.0, 4000, tenant=tenant)], key=lambda r: r.arrival_s)
        sequences = run("headway", trace(*requests), prefill=2, decode=1).sequences
        return next(s.ttft_s or 0.0 for s in sequences if s.request.prompt_tokens == 4000)

    assert waited("other") < 2.0
    assert waited("flood") > 10.0


def test_ageing_bounds_what_goes_before_a_long_prompt() -> None:
    """Short prompts that come for ever, at the full load of the worker."""
    hardware = Linear("h", "", Predictor((0.0, 1e-3, 0.0), (0.01, 0.0, 0.0)), 8, 1 << 20)
    shorts = [request(0.1 * at, 101) for at in range(1, 400)]
    stream = trace(request(0.0, 1000), request(0.0, 1000), *shorts)

    def second_long(ageing: float) -> float:
        entry = entries(Order(Rule.SHORTEST, ageing))["headway"]
        outcome = SimFleet(stream, Scenario(hardware, 1, 1, link_bytes_per_s=0.0), entry).run()
        return max(s.ttft_s or 0.0 for s in outcome.sequences[:2])

    assert second_long(0.0) > 35
    assert second_long(0.25) < 6


def test_workers_that_share_nodes_share_caches() -> None:
    turns = trace(request(0.0, 2048, 1, 2, 3, 4), request(5.0, 2560, 1, 2, 3, 4, 5))
    outcome = run("round-robin", turns, nodes=1)
    assert outcome.sequences[1].cached == 2048
    assert run("round-robin", turns).sequences[1].cached == 0


def test_summary_objective_and_waiting() -> None:
    outcome = run("headway", trace(request(0.0, 2000), request(0.0, 2000)), prefill=1)
    summary = summarise(outcome, Objective(0.0, 1.5))
    assert (summary.requests, summary.in_slo) == (2, 0.5)
    alone = STUDY.prefill_s(2000, 0)
    assert summary.mean_s == pytest.approx(1.5 * alone)
    times, counts = waiting_over_time(outcome.sequences)
    assert counts[-1] == 0
    assert max(counts) == 2
    assert times[-1] == pytest.approx(alone)


def test_chunks_let_short_prompts_in() -> None:
    long, short = request(0.0, 60_000), request(0.5, 500)
    whole = run("headway", trace(long, short), prefill=1)
    chunked = run("headway", trace(long, short), prefill=1, limits=StepLimits(64, 1 << 40, 0.5))
    assert (chunked.sequences[1].ttft_s or 0) < 0.2 * (whole.sequences[1].ttft_s or 0)
    assert (chunked.sequences[0].ttft_s or 0) < 1.1 * (whole.sequences[0].ttft_s or 0)


def test_the_router_hears_how_far_a_prompt_is_while_it_is_computed() -> None:
    """As workers' status tells it after every forward."""
    seen: list[int] = []
    running: list[object] = []

    class Probe(LeastTokens):
        def cost(self, ask: Ask, candidate: Candidate) -> float:
            backlog = candidate[0].backlog
            seen.append(backlog.tokens)
            running.append(backlog.running and (backlog.running.name, backlog.left_s(ask.arrival_s) > 0))
            return super().cost(ask, candidate)

    requests = [TraceRequest(float(at), 40_000, 2, (bytes([at]) * 16,)) for at in range(4)]
    chunked = StepLimits(batch=64, chunk_tokens=1 << 20, chunk_s=0.25)
    scenario = Scenario(STUDY, 1, 1, limits=chunked)
    SimFleet(Trace("long", 40_000, requests), scenario, replace(POLICIES["least-loaded"], make=Probe)).run()
    assert seen[0] == 0
    # A second computes some 9,000 tokens at first, and fewer the more come before them.
    computed = [at * 40_000 - left for at, left in enumerate(seen)]
    assert 5_000 < computed[1] < 10_000
    assert computed[1] + 3_000 < computed[2] < computed[3]
    # The first, while the others wait.
    assert running == [None, (0, True), (0, True), (0, True)]
