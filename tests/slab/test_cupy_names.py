"""Every name of CuPy that the project uses is one that the installed CuPy has (it imports without a GPU)."""

from __future__ import annotations

import ast
import importlib
import warnings
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).resolve().parents[2]
ONLY_IN = "headway/slab/cupy_device.py"


def cupy_names(source: str) -> Iterator[str]:
    """Dotted names, from `cupy` on, of all that a file takes from CuPy."""
    tree = ast.parse(source)
    roots: dict[str, str] = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                if alias.name.split(".")[0] == "cupy":
                    roots[alias.asname or "cupy"] = alias.name if alias.asname else "cupy"
                    yield alias.name
        elif isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "cupy":
            for alias in node.names:
                roots[alias.asname or alias.name] = f"{node.module}.{alias.name}"
                yield f"{node.module}.{alias.name}"
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and (name := _dotted(node)) and name[0] in roots:
            yield ".".join([roots[name[0]], *name[1:]])


def _dotted(node: ast.expr) -> list[str]:
    if isinstance(node, ast.Name):
        return [node.id]
    if isinstance(node, ast.Attribute) and (inner := _dotted(node.value)):
        return [*inner, node.attr]
    return []


def project_files() -> list[Path]:
    return [file for folder in ("headway", "services", "bench") for file in sorted((ROOT / folder).rglob("*.py"))]


def used() -> set[str]:
    return {name for file in project_files() for name in cupy_names(file.read_text())}


@pytest.fixture(scope="module")
def cupy() -> ModuleType:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return pytest.importorskip("cupy", reason="CuPy is not installed: pip install 'headway[cuda13]'")


def test_names_are_found_however_they_are_imported() -> None:
    source = """
import cupy
import cupy.cuda
import cupy as cp
from cupy.cuda import runtime, Stream as S
cupy.a.b(runtime.c, cp.d, S.e, other.f)
"""
    assert set(cupy_names(source)) == {
        "cupy", "cupy.cuda", "cupy.cuda.runtime", "cupy.cuda.Stream",
        "cupy.a", "cupy.a.b", "cupy.cuda.runtime.c", "cupy.d", "cupy.cuda.Stream.e",
    }  # fmt: skip


def test_one_file_alone_uses_cupy() -> None:
    assert [str(f.relative_to(ROOT)) for f in project_files() if any(cupy_names(f.read_text()))] == [ONLY_IN]


def test_what_the_project_uses_is_there(cupy: ModuleType) -> None:
    names = used()
    assert "cupy.cuda.runtime.ipcOpenMemHandle" in names
    assert [name for name in sorted(names) if not _resolves(name)] == []


def test_the_module_can_be_imported_without_a_gpu(cupy: ModuleType) -> None:
    module = importlib.import_module("headway.slab.cupy_device")
    assert module.CupyModule().kind == "cuda"


def _resolves(name: str) -> bool:
    """Attribute by attribute; what is none may be a module that was not imported yet."""
    parts = name.split(".")
    found: object = importlib.import_module(parts[0])
    for at, part in enumerate(parts[1:], 2):
        try:
            found = getattr(found, part)
        except AttributeError:
            try:
                found = importlib.import_module(".".join(parts[:at]))
            except ImportError:
                return False
    return True
