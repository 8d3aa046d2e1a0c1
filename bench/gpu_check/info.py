"""What the check ran on."""

from __future__ import annotations

import importlib
import os
import platform
from pathlib import Path
from typing import Any

from bench.gpu_check.pair import device_of
from bench.gpu_check.sizes import Sizes

MODULES = ("torch", "cupy", "numpy", "transformers", "grpc", "uvloop", "xxhash", "grpc_health")


def run(name: str, sizes: Sizes) -> dict[str, Any]:
    device = device_of(name)
    free, total = device.module.memory(device.index)
    return {
        "name": device.module.name(device.index),
        "devices": device.module.count(),
        "free_bytes": free,
        "total_bytes": total,
        "python": platform.python_version(),
        "cores": os.cpu_count(),
        "versions": {module: _version(module) for module in MODULES},
        "cuda_of_torch": importlib.import_module("torch").version.cuda,
        "mps": _mps(),
    }


def _version(module: str) -> str | None:
    """None where it is not installed."""
    try:
        return str(getattr(importlib.import_module(module), "__version__", "present"))
    except ImportError:
        return None


def _mps() -> bool:
    """An MPS control daemon seems to run: without one, processes on one GPU take turns."""
    pipes = Path(os.environ.get("CUDA_MPS_PIPE_DIRECTORY", "/tmp/nvidia-mps"))
    return (pipes / "control").exists()
