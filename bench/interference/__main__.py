"""What long prompts do to chats: phases apart on two cores, against one process that does both, on the same two.

python -m bench.interference [--weights float,int4] [--quick]
    [--peers-python PYTHON --gguf FILE.gguf]

Four chats (64 tokens in, 128 out, one after the other) alone; with a prompt of 1,500 tokens every 8 s; and with one
every 2 s, which is more than the machine can compute: what cannot be in time is refused. Apart: one prefill and one
decode worker, which keeps one core; prompts get what is left. Together: one mixed worker with both cores, in chunks of
each of several sizes. Alone, for the marks, is the same fleet without long prompts. OpenVINO and llama.cpp, where they
are installed and the GGUF file is given that the default model was made of: in chunks of 256, called in their own
processes. --quick: shorter, two chunk sizes.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from bench.engine.peers import Maker, find_peers
from bench.engine.quality import read_texts
from bench.interference.load import Load
from bench.interference.peer import ENGINES, Asked
from bench.interference.seen import Seen, figures
from bench.report import finish, mark, plot_lines, progress
from headway.fleet import Fleet, FleetSpec
from headway.models import resolve

MODEL = "smollm2"
APART, TOGETHER = "apart", "chunks of 256"
CHUNKS = (64, 128, 256, 512)
Table = dict[str, dict[str, Any]]
Cases = dict[str, tuple[float | None, float]]
# Seconds between long prompts, seconds of load.
CASES: Cases = {"alone": (None, 15.0), "every 8 s": (8.0, 42.0), "every 2 s": (2.0, 16.0)}
QUICK_CASES: Cases = {case: (every_s, min(seconds, 12.0)) for case, (every_s, seconds) in CASES.items()}
QUICK_CHUNKS = (64, 256)
ITL_S = {"float": 0.15, "bfloat16": 0.1, "int8": 0.1, "int4": 0.1}
# Stands for a ratio of which one side is not there; holds nowhere.
NOBODY = 99.0
NO_BOUND, NO_OBJECTIVE = "1000", ("--itl-objective-s", "0")


def specs(weights: str, chunks: Sequence[int]) -> dict[str, FleetSpec]:
    """By name."""
    flags = ("--weights", weights, "--kv-dtype", "float32" if weights == "float" else "bfloat16")
    found = {APART: FleetSpec(1, 1, model=MODEL, worker_flags=flags)}
    for chunk in chunks:
        bounds = ("--chunk-tokens", str(chunk), "--chunk-s", NO_BOUND, "--shared-chunk-s", NO_BOUND, *NO_OBJECTIVE)
        found[f"chunks of {chunk}"] = FleetSpec(
            0, 0, mixed=1, model=MODEL, worker_flags=(*flags, *bounds), flags={"router": NO_OBJECTIVE}
        )
    return found


def measure(runner: asyncio.Runner, spec: FleetSpec, cases: Cases, itl_s: float) -> dict[str, list[Seen]]:
    """case → what came of each request."""
    text, found = text_ids(), {}
    with tempfile.TemporaryDirectory() as folder, Fleet(spec, Path(folder)) as fleet:
        fleet.wait_ready()
        # Kernels are made on their first use.
        runner.run(Load(fleet.address, text, 2.0, 5.0, seed=0).run())
        for seed, (case, (every_s, seconds)) in enumerate(cases.items(), 1):
            # Other prompts than in the case before, or they would be cached.
            found[case] = runner.run(Load(fleet.address, text, every_s, seconds, seed).run())
            progress(f"  {case:10s} {figures(found[case], seconds, itl_s)}")
    return found


def marks(table: Table) -> dict[str, Any]:
    """Of one kind of weights, with a long prompt every 8 s."""
    ours, alone = table[APART]["every 8 s"], table[APART]["alone"]
    theirs = table[TOGETHER]["every 8 s"]
    best = max(cases["every 8 s"]["good_tokens_per_s"] for name, cases in table.items() if name.startswith("chunks"))
    ratios = {
        "itl_p99_vs_alone": (ours["stream_itl_ms"]["p99"] / alone["stream_itl_ms"]["p99"], 1.3),
        "itl_p99_vs_aggregated": (ours["stream_itl_ms"]["p99"] / theirs["stream_itl_ms"]["p99"], 0.3),
        "stream_ttft_max_vs_alone": (ours["stream_ttft_ms"]["max"] / alone["stream_ttft_ms"]["max"], 1.5),
        "long_ttft_vs_aggregated": (_long_ratio(ours, theirs), 1.8),
    }
    held = {name: mark(value, limit, "ratio", at_most=True) for name, (value, limit) in ratios.items()}
    goodput = ours["good_tokens_per_s"] / best if best else 0.0
    return held | {"goodput_vs_best_aggregated": mark(goodput, 1.0, "ratio", at_most=False)}


def _long_ratio(ours: dict[str, Any], theirs: dict[str, Any]) -> float:
    """NOBODY where no long prompt had a first token on one side."""
    times = [case["long_ttft_ms"].get("p50", 0.0) for case in (ours, theirs)]
    return times[0] / times[1] if all(times) else NOBODY


def plot(weights: str, apart: Sequence[Seen], together: Sequence[Seen]) -> None:
    lines = {}
    for name, seen in ((APART, apart), (TOGETHER, together)):
        chats = [one for one in seen if one.kind == "stream"]
        points = sorted((at, gap) for one in chats for at, gap in zip(one.token_s[1:], one.gaps_s, strict=True))
        lines[name] = ([at for at, _ in points], [gap * 1e3 for _, gap in points])
    plot_lines(f"interference-{weights}", f"gaps between a chat's tokens, {weights}", "s", "ms", lines)


def measure_peer(name: str, maker: Maker, cases: Cases) -> dict[str, Any]:
    """case → figures, or why there are none; its weights are those of the GGUF file."""
    found: dict[str, Any] = {}
    for case, (every_s, seconds) in cases.items():
        asked = Asked(maker.model, os.cpu_count() or 1, 256, text_ids(), every_s, seconds)
        command = [maker.python, "-m", "bench.interference.peer", name]
        done = subprocess.run(command, input=json.dumps(asdict(asked)), stdout=subprocess.PIPE, text=True, check=False)
        if done.returncode:
            found[case] = {"failed": f"{' '.join(command)} ended with {done.returncode}"}
        else:
            seen = [Seen(**one) for one in json.loads(done.stdout.splitlines()[-1])]
            found[case] = figures(seen, seconds, ITL_S["int4"])
        progress(f"{name} {case:10s} {found[case]}")
    return found


def text_ids() -> list[int]:
    """Of which prompts are pieces."""
    return [token for ids in read_texts(resolve(MODEL), 1 << 20).values() for token in ids]


def run(
    runner: asyncio.Runner, weights: str, names: Sequence[str], *, quick: bool
) -> tuple[dict[str, Any], dict[str, Any]]:
    """All fleets, or those of these names: fleet → case → figures; and the marks where there are all for them."""
    seen, table = {}, {}
    for name, spec in specs(weights, QUICK_CHUNKS if quick else CHUNKS).items():
        if names and name not in names:
            continue
        progress(f"{weights}, {name}")
        cases = QUICK_CASES if quick else CASES
        seen[name] = measure(runner, spec, cases, ITL_S[weights])
        table[name] = {case: figures(of, cases[case][1], ITL_S[weights]) for case, of in seen[name].items()}
    if not {APART, TOGETHER} <= table.keys():
        return table, {}
    plot(weights, seen[APART]["every 8 s"], seen[TOGETHER]["every 8 s"])
    return table, {f"{weights}_{name}": value for name, value in marks(table).items()}


def main() -> None:
    parser = argparse.ArgumentParser(prog="bench.interference", description=__doc__.splitlines()[0])
    parser.add_argument("--weights", default="float,int4", help="separated by commas")
    parser.add_argument("--only", default="", help="fleets, separated by commas")
    parser.add_argument("--peers-python", default=os.environ.get("HEADWAY_PEERS_PYTHON", sys.executable))
    parser.add_argument("--gguf", type=Path, help=f"of the peers: {', '.join(ENGINES)}")
    parser.add_argument("--quick", action="store_true")
    arguments = parser.parse_args()
    if arguments.gguf and not arguments.gguf.is_file():
        parser.error(f"there is no file {arguments.gguf}")
    peers = find_peers(ENGINES, resolve(MODEL), arguments.peers_python, arguments.gguf)
    progress(f"peers: {peers.said}")
    names = [name for name in arguments.only.split(",") if name]
    result: dict[str, Any] = {"quick": arguments.quick, "peers": peers.said, "marks": {}}
    with asyncio.Runner() as runner:
        for weights in arguments.weights.split(","):
            result[weights], held = run(runner, weights, names, quick=arguments.quick)
            result["marks"] |= held
    cases = QUICK_CASES if arguments.quick else CASES
    result |= {name: measure_peer(name, maker, cases) for name, maker in peers.makers.items()}
    finish("interference", result)


if __name__ == "__main__":
    main()
