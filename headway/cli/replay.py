"""`headway replay`: a trace against real services with simulated engines, beside what the simulator says of it."""

from __future__ import annotations

import argparse
import sys
from dataclasses import replace
from typing import Any

from tqdm import tqdm

from headway.cli.show import table
from headway.cli.simulate import add_arguments as add_simulate_arguments
from headway.cli.simulate import load_trace, make_objective, make_policies, make_scenario
from headway.fleet import FleetError
from headway.replay.live import Live, replay
from headway.replay.seen import SUMMARY_HEADS, live_row, simulated_row
from headway.sim.fleet import SimFleet
from headway.sim.objective import Objective
from headway.sim.policies import Entry
from headway.sim.presets import HardwareError
from headway.sim.scenario import Scenario
from headway.sim.trace import Trace, TraceError


def run(arguments: argparse.Namespace) -> int:
    try:
        trace = load_trace(arguments)
        scenario = live_scenario(make_scenario(arguments))
        policies = [entry for entry in make_policies(arguments) if entry.queue_tokens is None]
    except (TraceError, HardwareError, ValueError) as error:
        print(f"headway replay: {error}", file=sys.stderr)
        return 2
    objective = make_objective(arguments)
    for speed in arguments.speed:
        rows = []
        for entry in policies:
            try:
                rows += _both(trace.faster(speed), scenario, entry, objective)
            except FleetError as error:
                print(f"headway replay: {error}", file=sys.stderr)
                return 1
        print(f"\n{trace.name} at {speed:g} times its speed: {len(trace)} requests in {trace.span_s / speed:.0f} s\n")
        print(table(SUMMARY_HEADS, rows))
    return 0


def add_arguments(command: argparse.ArgumentParser) -> None:
    """Those of `headway simulate`."""
    add_simulate_arguments(command)


def live_scenario(scenario: Scenario) -> Scenario:
    """As a local fleet deals workers to nodes: a prefill and a decode worker share one, unless said otherwise."""
    nodes = scenario.nodes or max(scenario.prefill, scenario.decode)
    return replace(scenario, nodes=nodes, limits=replace(scenario.limits, batch=scenario.hardware.batch))


def _moved(bar: tqdm[Any]) -> None:
    bar.update()


def _both(trace: Trace, scenario: Scenario, entry: Entry, objective: Objective) -> list[list[Any]]:
    with tqdm(total=len(trace), desc=f"{entry.name}, live", unit="request", leave=False, disable=None) as bar:
        seen = replay(trace, Live(scenario, entry), on_done=lambda _: _moved(bar))
    outcome = SimFleet(trace, scenario, entry).run()
    return [live_row(entry.name, seen, scenario.hardware, objective), simulated_row(outcome, objective)]
