"""Finding peers in a python of their own: one that is not there is skipped by name with the reason, never guessed."""

from __future__ import annotations

import subprocess

from bench.transfer.contract import SkipError

PROBE = """
import importlib, importlib.metadata, sys
module, names = sys.argv[1], importlib.metadata.packages_distributions()
importlib.import_module(module)
print("found", *(f"{name}=={importlib.metadata.version(name)}" for name in names.get(module.split(".")[0], [])))
"""


def version_of(python: str, module: str) -> str:
    """The distribution and version that has `module` in that python. Raises SkipError with what the import said."""
    if not python:
        raise SkipError("no python of the peers is given (--peers-python or HEADWAY_PEERS_PYTHON)")
    try:
        run = subprocess.run([python, "-c", PROBE, module], capture_output=True, text=True, timeout=60, check=False)
    except OSError as error:
        raise SkipError(f"{python}: {error.strerror}") from None
    found = [line for line in run.stdout.splitlines() if line.startswith("found ")]
    if run.returncode or not found:
        raise SkipError(f"not installed ({(run.stderr.strip().splitlines() or ['no answer'])[-1]})")
    return found[-1].removeprefix("found ")


def first_version(python: str, modules: tuple[str, ...]) -> tuple[str, str]:
    """(module, version) of the first of several modules that is there. Raises SkipError."""
    for module in modules[:-1]:
        try:
            return module, version_of(python, module)
        except SkipError:
            continue
    return modules[-1], version_of(python, modules[-1])
