#!/usr/bin/env bash
# Headway on one GPU, as one JSON: see bench/gpu_check/__main__.py. Set PYTHON to use another interpreter.
set -euo pipefail
cd "$(dirname "$0")/.."
exec "${PYTHON:-python3}" -m bench.gpu_check "$@"
