"""A trace against real services with simulated engines."""

from __future__ import annotations

import grpc

from headway.core.predict import Predictor
from headway.core.step import StepLimits
from headway.replay.live import Live, replay
from headway.replay.prompts import Prompts
from headway.replay.seen import SUMMARY_HEADS, live_row, simulated_row
from headway.sim.fleet import SimFleet
from headway.sim.hardware import Linear
from headway.sim.objective import Objective
from headway.sim.policies import entries
from headway.sim.scenario import Scenario
from headway.sim.trace import Trace, TraceRequest

KEYS = [bytes([at]) * 16 for at in range(8)]


def test_prompts_share_what_their_blocks_say() -> None:
    shared, long = TraceRequest(0.0, 40, 1, KEYS[:3]), TraceRequest(0.0, 50, 1, [*KEYS[:2], *KEYS[5:7]])
    prompts = Prompts(Trace("t", 16, [shared, long]), vocabulary=100)
    one, other = prompts.tokens(shared), prompts.tokens(long)
    assert (len(one), len(other)) == (40, 50)
    assert one[:32] == other[:32]
    assert one[32:] != other[32:40]
    assert max(one + other) < 100
    assert Prompts(Trace("t", 16, [])).tokens(TraceRequest(0.0, 40, 1, KEYS[:3]))[:5] == [
        token % 128 for token in Prompts(Trace("t", 16, [])).tokens(shared)[:5]
    ]
    without = TraceRequest(0.0, 30, 1)
    assert prompts.tokens(without) != prompts.tokens(without)


def test_a_replay_serves_every_request_and_finds_the_shared_prefixes() -> None:
    hardware = Linear("h", "", Predictor((0.002, 1e-5, 0.0), (0.005, 0.0, 0.0)), 8, 64_000, 16)
    scenario = Scenario(
        hardware, 2, 2, nodes=2, limits=StepLimits(16, 1 << 20, 0.25, 0.05), link_bytes_per_s=1e9, link_latency_s=0.01
    )
    requests = [TraceRequest(0.1 * at, 16 * 5 + 3, 4, [*KEYS[:4], bytes([100 + at]) * 16]) for at in range(8)]
    trace = Trace("t", 16, requests)
    entry = entries()["headway"]
    done = []
    seen = replay(trace, Live(scenario, entry, routers=2), on_done=done.append)
    assert len(seen) == len(done) == 8
    assert all(one.ok and one.tokens == 4 and one.ttft_s and one.ttft_s > 0 for one in seen)
    assert sum(one.cached_tokens >= 64 for one in seen) >= 6
    row = live_row("headway", seen, hardware, Objective())
    simulated = simulated_row(SimFleet(trace, scenario, entry).run(), Objective())
    assert len(row) == len(simulated) == len(SUMMARY_HEADS)
    assert (row[1], simulated[1], row[-1]) == ("live", "simulated", "0")


def test_a_replay_refuses_live_and_simulated_what_cannot_be_in_time() -> None:
    hardware = Linear("h", "", Predictor((0.002, 1e-3, 0.0), (0.005, 0.0, 0.0)), 8, 64_000, 16)
    scenario = Scenario(
        hardware, 1, 1, nodes=1, limits=StepLimits(16, 1 << 20, 0.25, 0.05), objective=Objective(0.5, 1.0)
    )
    # Each takes half a second and is due after one: the second would be in time, but for the margin.
    requests = [
        TraceRequest(0.01 * at, 16 * 30 + 5, 2, [bytes([at, number]) * 8 for number in range(31)]) for at in range(8)
    ]
    trace = Trace("t", 16, requests)
    entry = entries()["headway"]
    seen = replay(trace, Live(scenario, entry), on_done=lambda _: None)
    refused = [one for one in seen if not one.ok]
    assert {one.code for one in refused} == {grpc.StatusCode.RESOURCE_EXHAUSTED}
    outcome = SimFleet(trace, scenario, entry).run()
    assert abs(len(refused) - sum(s.refused for s in outcome.sequences)) <= 1
    assert len(refused) in (6, 7)
