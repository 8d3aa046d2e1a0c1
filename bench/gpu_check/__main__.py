"""Everything worth knowing about Headway on one GPU, within ten minutes and without a download; one JSON.

bench/gpu_check.sh [--device cuda:0] [--out FILE] [--sections info,handoff,…]

Needs Python 3.11+, torch, CuPy and transformers, and nothing else. Each section runs in a process of its own with a
limit in seconds; one that fails is an "error" in the JSON. `--device cpu` is a dry run with tiny sizes over NumPy: it
says nothing about a GPU. The last line of the output is the JSON, the exit status is 1 if a section failed.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from bench.gpu_check.sizes import FULL, TINY
from bench.report import finish, progress

TOTAL_S = 590.0
LIMITS_S = {"info": 60, "handoff": 60, "staging": 60, "equality": 150, "steps": 150, "together": 150, "peer": 60}
ROOT = Path(__file__).resolve().parents[2]
# Some images turn TF32 on for all that float32 multiplies, which is no float32 to compare.
EXACT = {"NVIDIA_TF32_OVERRIDE": "0", "TORCH_ALLOW_TF32_CUBLAS_OVERRIDE": "0"}
MARK = "headway-gpu-check:"


def main() -> int:
    parser = argparse.ArgumentParser(prog="gpu_check", description="Headway on one GPU, as one JSON.")
    parser.add_argument("--device", default="cuda:0", help="cuda:N, or cpu for a dry run (default: cuda:0)")
    parser.add_argument("--out", help="file for the JSON; without it, only the last line of the output")
    parser.add_argument("--sections", default=",".join(LIMITS_S), help=f"some of {', '.join(LIMITS_S)}")
    parser.add_argument("--section", help=argparse.SUPPRESS)
    given = parser.parse_args()
    device = "numpy:0" if given.device == "cpu" else given.device
    if given.section:
        return _section(given.section, device)
    wanted = given.sections.split(",")
    unknown = [name for name in wanted if name not in LIMITS_S]
    if unknown:
        parser.error(f"there is no section {', '.join(unknown)}")
    result = _all(wanted, device)
    if given.out:
        Path(given.out).write_text(json.dumps({"bench": "gpu_check", **result}, indent=1) + "\n")
    finish("gpu_check", result)
    return 1 if result["failed"] else 0


def _all(wanted: list[str], device: str) -> dict[str, Any]:
    started = time.monotonic()
    sections: dict[str, Any] = {}
    for name in wanted:
        limit_s = min(LIMITS_S[name], TOTAL_S - (time.monotonic() - started))
        progress(f"gpu_check: {name} (at most {limit_s:.0f} s)")
        sections[name] = _apart(name, device, limit_s) if limit_s > 1 else {"error": "no time was left for it"}
        if "error" in sections[name]:
            progress(f"gpu_check: {name} failed: {sections[name]['error'].strip().splitlines()[-1]}")
    failed = [name for name, found in sections.items() if "error" in found]
    dry = not device.startswith("cuda")
    seconds = round(time.monotonic() - started, 1)
    # In a dry run they have their form, and say nothing.
    marks = {name: each for found in sections.values() for name, each in found.get("marks", {}).items()}
    head = {"device": device, "dry_run": dry, "seconds": seconds, "failed": failed, "marks": marks}
    return {**head, "sections": sections}


def _apart(name: str, device: str, limit_s: float) -> dict[str, Any]:
    """The section in a process group of its own, which ends with it."""
    command = [sys.executable, "-m", "bench.gpu_check", "--section", name, "--device", device]
    environment = os.environ | EXACT | {"PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])}
    started = time.monotonic()
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment, start_new_session=True
    )
    try:
        out, err = process.communicate(timeout=limit_s)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        process.communicate()
        return {"error": f"not done after {limit_s:.0f} s"}
    found = [line.removeprefix(MARK) for line in out.splitlines() if line.startswith(MARK)]
    if not found:
        return {"error": err[-2000:] or f"ended with status {process.returncode} and said nothing"}
    return {"seconds": round(time.monotonic() - started, 1), **json.loads(found[-1])}


def _section(name: str, device: str) -> int:
    module = importlib.import_module(f"bench.gpu_check.{name}")
    result = module.run(device, FULL if device.startswith("cuda") else TINY)
    print(MARK + json.dumps(result), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
