"""`headway simulate`: what a fleet would do with a trace, policy by policy."""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from tqdm import tqdm

from headway.cli.show import table
from headway.core.order import Order
from headway.core.step import StepLimits
from headway.sim.fleet import SimFleet
from headway.sim.objective import Objective
from headway.sim.policies import Entry, entries
from headway.sim.presets import HardwareError, hardware
from headway.sim.report import HEADS, draw, table_rows, write_csv, write_json
from headway.sim.scenario import WHOLE, Outcome, Scenario
from headway.sim.summary import Summary, summarise
from headway.sim.trace import Trace, TraceError, read_trace
from headway.sim.workload import WORKLOADS, make_trace, scaled

USUAL = "headway,reference,round-robin"


def run(arguments: argparse.Namespace) -> int:
    try:
        trace = load_trace(arguments)
        scenario = make_scenario(arguments)
        policies = make_policies(arguments)
    except (TraceError, HardwareError, ValueError) as error:
        print(f"headway simulate: {error}", file=sys.stderr)
        return 2
    objective = make_objective(arguments)
    summaries: dict[float, list[Summary]] = {}
    outcomes: list[Outcome] = []
    for speed in arguments.speed:
        outcomes = [_simulate(trace.faster(speed), scenario, entry) for entry in policies]
        summaries[speed] = [summarise(outcome, objective) for outcome in outcomes]
        rate = len(trace) / max(trace.span_s / speed, 1e-9)
        print(f"\n{trace.name} at {speed:g} times its speed: {len(trace)} requests, {rate:.2f} a second\n")
        print(table(HEADS, table_rows(summaries[speed])))
    if arguments.out:
        return _write(Path(arguments.out), arguments, trace, outcomes, summaries)
    return 0


def add_arguments(command: argparse.ArgumentParser) -> None:
    """Which trace, which fleet, which policies."""
    add_trace_arguments(command)
    fleet = command.add_argument_group("fleet")
    fleet.add_argument("--prefill", type=int, default=8, metavar="N", help="prefill workers (default: %(default)s)")
    fleet.add_argument("--decode", type=int, default=6, metavar="M", help="decode workers (default: %(default)s)")
    fleet.add_argument(
        "--nodes", type=int, default=0, metavar="K", help="shared by the workers; 0: one for each worker"
    )
    fleet.add_argument(
        "--hardware", default="h100x4-70b", help="a preset or a file (default: %(default)s); see docs/routing.md"
    )
    fleet.add_argument(
        "--link-gb-s", type=float, default=25.0, help="between nodes; 0: nothing is pulled (default: %(default)s)"
    )
    fleet.add_argument("--chunk-s", type=float, default=0.0, help="seconds of a forward of prompts; 0: whole prompts")
    fleet.add_argument(
        "--local-prefill-tokens",
        type=int,
        default=2048,
        help="of a prompt, that decode workers compute themselves (default: %(default)s)",
    )
    fleet.add_argument("--itl-objective-s", type=float, default=0.1, help="which that must keep (default: %(default)s)")
    policy = command.add_argument_group("policy")
    names = ", ".join(entries())
    policy.add_argument("--policy", default=USUAL, metavar="NAMES", help=f"of {names}, or all (default: %(default)s)")
    policy.add_argument(
        "--ageing", type=float, default=Order().ageing, help="of headway's order (default: %(default)s)"
    )
    policy.add_argument("--noise", type=float, default=0.0, help="log-normal error of what computing takes, e.g. 0.2")
    policy.add_argument("--stale-s", type=float, default=0.0, help="how late the router hears from workers")
    policy.add_argument(
        "--slo-s", type=float, default=1.0, help="objective: first token after this (default: %(default)s)"
    )
    policy.add_argument(
        "--slo-factor", type=float, default=2.0, help="and so many times the prompt's own time (default: %(default)s)"
    )
    policy.add_argument("--refuse-late", action="store_true", help="refuse what cannot meet the objective")
    policy.add_argument(
        "--max-wait-s", type=float, default=0.0, help="predicted seconds of a worker's queue, at most; 0: no bound"
    )
    command.add_argument("--out", metavar="DIR", help="write report.json, requests.csv and report.png there")


def add_trace_arguments(command: argparse.ArgumentParser) -> None:
    """A trace file, or a made-up trace."""
    trace = command.add_argument_group("trace")
    trace.add_argument("--trace", metavar="FILE", help="Mooncake JSONL or Azure CSV, also gzipped")
    trace.add_argument(
        "--workload", default="chat", choices=WORKLOADS, help="made up, without --trace (default: %(default)s)"
    )
    trace.add_argument("--rate", type=float, metavar="R", help="requests a second of the workload")
    trace.add_argument("--seconds", type=float, metavar="S", help="length of the workload (default: 600)")
    trace.add_argument("--seed", type=int, default=0, help="of the workload, of ties and noise (default: %(default)s)")
    trace.add_argument("--requests", type=int, metavar="N", help="only the first N")
    trace.add_argument("--speed", type=_speeds, default=[1.0], metavar="X,…", help="times as fast; several: a curve")


def load_trace(arguments: argparse.Namespace) -> Trace:
    """Raises TraceError."""
    if arguments.trace:
        trace = read_trace(Path(arguments.trace))
    else:
        workload = scaled(WORKLOADS[arguments.workload], arguments.rate, arguments.seconds)
        trace = make_trace(workload, arguments.seed)
    if not trace.requests:
        raise TraceError("the workload has no requests; raise --rate or --seconds")
    return trace.first(arguments.requests) if arguments.requests else trace


def make_scenario(arguments: argparse.Namespace) -> Scenario:
    """Raises HardwareError, ValueError."""
    if min(arguments.prefill, arguments.decode) < 1:
        raise ValueError("a fleet needs at least one prefill and one decode worker")
    limits = StepLimits(chunk_s=arguments.chunk_s, chunk_tokens=1 << 40) if arguments.chunk_s else WHOLE
    return Scenario(
        hardware(arguments.hardware),
        prefill=arguments.prefill,
        decode=arguments.decode,
        nodes=arguments.nodes,
        limits=limits,
        link_bytes_per_s=arguments.link_gb_s * 1e9,
        noise=arguments.noise,
        stale_s=arguments.stale_s,
        local_prefill_tokens=arguments.local_prefill_tokens,
        itl_objective_s=arguments.itl_objective_s or math.inf,
        objective=make_objective(arguments) if arguments.refuse_late else None,
        max_wait_s=arguments.max_wait_s or math.inf,
        seed=arguments.seed,
    )


def make_objective(arguments: argparse.Namespace) -> Objective:
    return Objective(arguments.slo_s, arguments.slo_factor)


def make_policies(arguments: argparse.Namespace) -> list[Entry]:
    """Raises ValueError."""
    known = entries(Order(ageing=arguments.ageing))
    names = list(known) if arguments.policy == "all" else arguments.policy.split(",")
    unknown = [name for name in names if name not in known]
    if unknown:
        raise ValueError(f"there is no policy {unknown[0]!r}; there are {', '.join(known)}")
    return [known[name] for name in names]


def _simulate(trace: Trace, scenario: Scenario, entry: Entry) -> Outcome:
    with tqdm(total=len(trace), desc=entry.name, unit="request", leave=False, disable=None) as bar:
        return SimFleet(trace, scenario, entry, _every(bar)).run()


def _every(bar: tqdm[Any]) -> Callable[[int], None]:
    """Moves the bar now and then."""

    def done(count: int) -> None:
        if count % 100 == 0:
            bar.update(count - bar.n)

    return done


def _write(
    out: Path,
    arguments: argparse.Namespace,
    trace: Trace,
    outcomes: Sequence[Outcome],
    summaries: dict[float, list[Summary]],
) -> int:
    settings = {name: value for name, value in vars(arguments).items() if name != "run"}
    settings["predictor"] = asdict(outcomes[0].scenario.hardware.predictor)
    try:
        out.mkdir(parents=True, exist_ok=True)
        write_json(out / "report.json", settings, summaries)
        write_csv(out / "requests.csv", outcomes)
        drawn = draw(out / "report.png", f"{trace.name}, last speed {arguments.speed[-1]:g}", outcomes, summaries)
    except OSError as error:
        print(f"headway simulate: the report cannot be written: {error}", file=sys.stderr)
        return 1
    missing = "" if drawn else " (no picture: pip install 'headway[bench]')"
    print(f"\nwrote {out}{missing}")
    return 0


def _speeds(text: str) -> list[float]:
    try:
        speeds = [float(part) for part in text.split(",")]
    except ValueError:
        speeds = []
    if not speeds or min(speeds) <= 0:
        raise argparse.ArgumentTypeError(f"{text!r} is no list of numbers above 0")
    return speeds
