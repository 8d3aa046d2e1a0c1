"""`headway simulate`, `calibrate` and `replay`."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import pytest

from headway.cli import main
from headway.sim.presets import read_hardware

Capture = pytest.CaptureFixture[str]
SHORT = [
    "--workload",
    "chat",
    "--rate",
    "2",
    "--seconds",
    "20",
    "--prefill",
    "2",
    "--decode",
    "2",
    "--hardware",
    "study",
]


def test_simulate_prints_a_table_and_writes_a_report(tmp_path: Path, capsys: Capture) -> None:
    out = tmp_path / "report"
    command = ["simulate", *SHORT, "--policy", "headway,mooncake", "--speed", "1,2", "--out", str(out)]
    assert main(command) == 0
    text = capsys.readouterr().out
    assert text.count("policy ") == 2
    assert "chat at 2 times its speed" in text
    assert text.count("\nheadway ") == text.count("\nmooncake ") == 2
    report = json.loads((out / "report.json").read_text())
    assert [(run["speed"], run["policy"]) for run in report["runs"]] == [
        (speed, policy) for speed in (1.0, 2.0) for policy in ("headway", "mooncake")
    ]
    assert report["settings"]["predictor"]["prefill"] == [0.02, 0.00011, 2.1e-09]
    with (out / "requests.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 2 * report["runs"][0]["requests"]
    assert all(float(row["first_token_s"]) > float(row["arrival_s"]) for row in rows)
    matplotlib = pytest.importorskip("matplotlib")
    assert matplotlib
    assert (out / "report.png").read_bytes().startswith(b"\x89PNG")


def test_what_cannot_be_in_time_is_refused_where_that_is_asked_for(tmp_path: Path, capsys: Capture) -> None:
    out = tmp_path / "report"
    rush = ["simulate", *SHORT, "--policy", "headway", "--speed", "8", "--out", str(out)]
    assert main([*rush, "--refuse-late"]) == 0
    late = json.loads((out / "report.json").read_text())["runs"][0]
    assert main([*rush, "--max-wait-s", "0.5"]) == 0
    bounded = json.loads((out / "report.json").read_text())["runs"][0]
    assert 0 < late["refused"] < late["requests"]
    assert 0 < bounded["refused"] < bounded["requests"]
    capsys.readouterr()


def test_all_policies_of_a_trace_file(tmp_path: Path, capsys: Capture) -> None:
    row = {"timestamp": 0, "input_length": 600, "output_length": 3, "hash_ids": [0, 3]}
    path = tmp_path / "t.jsonl"
    path.write_text("\n".join(json.dumps({**row, "timestamp": 100 * at}) for at in range(20)))
    assert main(["simulate", "--trace", str(path), "--policy", "all", "--requests", "10", "--chunk-s", "0.2"]) == 0
    text = capsys.readouterr().out
    assert "10 requests" in text
    assert "reference-wspt-0" in text


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--trace", "/nowhere.jsonl"], "/nowhere.jsonl cannot be read"),
        (["--hardware", "nothing"], "hardware 'nothing' is neither a file nor one of"),
        (["--policy", "best"], "there is no policy 'best'; there are round-robin"),
        (["--prefill", "0"], "at least one prefill and one decode worker"),
        (["--rate", "0.0001", "--seconds", "1"], "the workload has no requests"),
    ],
)
@pytest.mark.parametrize("command", ["simulate", "replay"])
def test_what_cannot_be_simulated_is_one_line(
    command: str, arguments: list[str], sentence: str, capsys: Capture
) -> None:
    assert main([command, *arguments]) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"headway {command}: ")
    assert sentence in error
    assert error.count("\n") == 1


def test_bad_speeds_are_refused(capsys: Capture) -> None:
    with pytest.raises(SystemExit):
        main(["simulate", "--speed", "1,-2"])
    assert "is no list of numbers above 0" in capsys.readouterr().err


def test_replay_runs_live_beside_the_simulation(capsys: Capture) -> None:
    command = "replay --workload chat --rate 10 --seconds 2 --prefill 1 --decode 1 --hardware h100-8b --policy headway"
    assert main(command.split()) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[:2] for line in lines[-2:]] == [["headway", "live"], ["headway", "simulated"]]
    assert lines[-2].endswith(" 0")


@pytest.mark.model
def test_calibrate_makes_hardware_to_simulate(tmp_path: Path, capsys: Capture) -> None:
    path = tmp_path / "mine.json"
    assert main(["calibrate", "--seconds", "2", "--output", str(path)]) == 0
    assert "ms a new token" in capsys.readouterr().out
    made = read_hardware(path)
    assert 1e-5 < made.predictor.prefill_s(512, 0) / 512 < 0.1
    assert made.token_bytes == 46080
    assert main(["simulate", *SHORT[:-1], str(path), "--requests", "5"]) == 0
    assert main(["calibrate", "--model", "nothing", "--output", str(path)]) == 1
