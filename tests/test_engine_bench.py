"""The engine's benchmark: absent peers are skipped by name, and no mark is made of what was not measured."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from bench.engine.__main__ import MARKS, ROUNDED_FORMAT, ChildError, compare_speeds, marks
from bench.engine.peers import MODULES, Maker, find_peers
from bench.engine.quality import FEW, MANY, Quality

FOLDER = Path("folder")
QUALITY = {ROUNDED_FORMAT: {f"{rows} rows": {"mean": Quality(0.97, 1.001)} for rows in (FEW, MANY)}}


def test_peers_that_are_not_installed_are_skipped_by_name_with_the_reason(tmp_path: Path) -> None:
    nowhere = str(tmp_path / "python")
    peers = find_peers(MODULES, FOLDER, nowhere, tmp_path / "model.gguf")
    assert list(peers.makers) == ["transformers"]
    assert peers.makers["transformers"] == (sys.executable, str(FOLDER))
    assert peers.said["transformers"].startswith("transformers==")
    for name in ("openvino", "llamacpp"):
        assert peers.said[name].startswith(f"skipped: {nowhere}: ")


def test_a_peer_whose_module_the_python_lacks_is_skipped(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setitem(MODULES, "llamacpp", "no_such_module")
    peers = find_peers(["llamacpp"], FOLDER, sys.executable, tmp_path / "model.gguf")
    assert not peers.makers
    assert "No module named 'no_such_module'" in peers.said["llamacpp"]


def test_a_peer_that_is_there_is_made_with_the_python_and_the_file_given(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setitem(MODULES, "llamacpp", "numpy")
    peers = find_peers(["llamacpp"], FOLDER, sys.executable, tmp_path / "model.gguf")
    assert peers.makers == {"llamacpp": (sys.executable, str(tmp_path / "model.gguf"))}
    assert peers.said["llamacpp"].startswith("numpy==")


def test_without_a_gguf_file_no_peer_that_reads_one_runs() -> None:
    peers = find_peers(MODULES, FOLDER, sys.executable, None)
    assert list(peers.makers) == ["transformers"]
    assert "--gguf" in peers.said["openvino"]
    assert "--gguf" in peers.said["llamacpp"]


def test_a_name_that_is_no_peers_is_refused() -> None:
    with pytest.raises(ValueError, match=r"no peer vllm; there are transformers, openvino, llamacpp"):
        find_peers(["vllm"], FOLDER, sys.executable, None)


def test_a_peer_that_ends_at_its_start_is_skipped_but_not_one_of_ours() -> None:
    ends = Maker("/bin/false", "model")
    table = compare_speeds({"llamacpp": ends}, 1, 1, [("prefill", 16)])
    assert table["prefill"] == {"16": {}}
    assert table["settings"]["llamacpp"].startswith("skipped: /bin/false -m bench.engine.child llamacpp model 1 ended")
    with pytest.raises(ChildError, match="ended with 1"):
        compare_speeds({"headway-int4": ends}, 1, 1, [])


def test_marks_are_only_of_what_was_measured() -> None:
    row = {"headway": 2.0, "headway-int4": 4.0, "transformers": 1.0}
    table = {"prefill": {"512": row}, "decode": {"4": row, "8": row}}
    found = marks(table, QUALITY)
    # Neither a batch of 16 nor OpenVINO.
    assert MARKS.keys() - found.keys() == {"f32_decode_b16_vs_transformers", "quant_decode_b8_vs_openvino"}
    assert found["quant_decode_b4_vs_f32"] == {"value": 2.0, "mark": 1.5, "unit": "ratio", "holds": True}
    table["decode"]["8"] = row | {"openvino": 8.0}
    assert marks(table, QUALITY)["quant_decode_b8_vs_openvino"]["holds"] is False
