"""bench/gpu_check.sh: a dry run of every section with only what a GPU image has, and one JSON whatever fails."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from bench.gpu_check.__main__ import LIMITS_S, TOTAL_S
from headway.slab.device import DeviceError, open_device

ROOT = Path(__file__).resolve().parents[1]
# What the project needs and a GPU image may lack.
ABSENT = ("xxhash", "grpc_health", "grpc_reflection", "grpc_status", "pytest", "hypothesis", "matplotlib", "gguf")
BLOCKER = f"""
import sys
for name in {ABSENT!r}:
    sys.modules[name] = None
"""


def check(tmp_path: Path, *flags: str) -> tuple[int, dict[str, Any]]:
    """Exit status and the JSON of the script, run as on an image without the ABSENT modules."""
    (tmp_path / "sitecustomize.py").write_text(BLOCKER)
    environment = os.environ | {"PYTHON": sys.executable, "PYTHONPATH": str(tmp_path)}
    command = [str(ROOT / "bench" / "gpu_check.sh"), "--out", str(tmp_path / "out.json"), *flags]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False, cwd=tmp_path)
    printed = json.loads(done.stdout.splitlines()[-1])
    written = json.loads((tmp_path / "out.json").read_text())
    assert {key: printed[key] for key in written} == written
    return done.returncode, printed


@pytest.mark.timeout(600)
def test_a_dry_run_gets_through_every_section(tmp_path: Path) -> None:
    status, found = check(tmp_path, "--device", "cpu")
    assert (status, found["failed"], found["dry_run"]) == (0, [], True), found
    sections = found["sections"]
    assert list(sections) == list(LIMITS_S)
    assert sections["info"]["versions"]["xxhash"] is None
    assert sections["handoff"]["zero_copy"]
    assert sections["equality"]["equal"], sections["equality"]["differences"]
    assert sections["equality"]["distinct_tokens"] > 5
    assert [row["batch"] for row in sections["steps"]["decode"]] == [1, 4]
    check_marks(found)
    assert set(sections["staging"]["staged_over_plain"]) == {"down", "up"}
    assert sections["together"]["mixed"]["seconds"] > 0
    assert sections["peer"]["available"]


def check_marks(found: dict[str, Any]) -> None:
    """Of steps, in the form of every benchmark, from what the section found: reckoned here another way."""
    steps, marks = found["sections"]["steps"], found["marks"]
    assert {name: (each["mark"], each["unit"]) for name, each in marks.items()} == {
        "step_time_vs_bytes": (1.5, "ratio"),
        "prefill_vs_matrix_rate": (0.5, "ratio"),
    }
    for row in steps["decode"]:
        # Two layers of 64 × (64 + 32 + 32 + 64) and 3 × 64 × 96, the output projection, embeddings; float32.
        weights = 2 * (64 * 192 + 3 * 64 * 96) + 64 * 512 + row["batch"] * 64
        kept = row["batch"] * row["context"] * 2 * 2 * 2 * 16
        assert row["bytes"] == 4 * (weights + kept)
        wanted = row["step_ms"] / 1e3 / (row["bytes"] / steps["copy_bytes_per_s"])
        assert row["time_vs_bytes"] == pytest.approx(wanted, rel=1e-2)
    assert marks["step_time_vs_bytes"]["value"] == max(row["time_vs_bytes"] for row in steps["decode"])
    for row in steps["prefill"]:
        tokens = row["tokens"]
        linear = 2 * tokens * 2 * (64 * 192 + 3 * 64 * 96) + 2 * 64 * 512
        assert row["flops"] == linear + 2 * 4 * 4 * 16 * sum(range(1, tokens + 1))
    assert marks["prefill_vs_matrix_rate"]["value"] == min(row["vs_matrix_rate"] for row in steps["prefill"])
    assert steps["attention"] == "cpu"


def test_a_section_that_fails_is_recorded_and_the_next_one_runs(tmp_path: Path) -> None:
    try:
        open_device("cuda:0")
    except DeviceError as error:
        reason = str(error)
    else:
        pytest.skip("there is a GPU")
    status, found = check(tmp_path, "--device", "cuda:0", "--sections", "handoff,peer")
    assert (status, found["failed"]) == (1, ["handoff", "peer"])
    assert all(reason in section["error"] for section in found["sections"].values())


def test_it_ends_within_ten_minutes() -> None:
    assert TOTAL_S < 600
    assert max(LIMITS_S.values()) < TOTAL_S
