"""A user's own stubs, made without headway by the oldest and the newest supported grpcio-tools, reach every RPC."""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from headway.client import Client
from headway.fleet import Fleet, FleetSpec
from tools.protos import ROOT, generator_python

VERSIONS = ["1.76.0", "1.85.1"]


@pytest.fixture(scope="module")
def fleet(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Fleet]:
    spec = FleetSpec(model="sim", engine="sim", slab_bytes=1 << 20)
    with Fleet(spec, tmp_path_factory.mktemp("fleet")) as fleet:
        fleet.wait_ready(60)
        yield fleet


@pytest.mark.parametrize("version", VERSIONS)
def test_every_router_rpc(fleet: Fleet, tmp_path: Path, version: str) -> None:
    packages = [f"grpcio-tools=={version}", f"grpcio=={version}", "setuptools<81"]
    python = generator_python(ROOT / ".venv" / f"stubs-{version}", packages)
    sources = [str(path) for path in sorted((ROOT / "protos").rglob("*.proto"))]
    protoc = [str(python), "-m", "grpc_tools.protoc", f"-I{ROOT / 'protos'}"]
    subprocess.run([*protoc, f"--python_out={tmp_path}", f"--grpc_python_out={tmp_path}", *sources], check=True)
    environ = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"} | {"PYTHONPATH": str(tmp_path)}
    command = [str(python), "-P", str(Path(__file__).with_name("user_stubs.py")), fleet.address]
    done = subprocess.run(command, capture_output=True, text=True, env=environ, timeout=90)
    assert done.returncode == 0, done.stderr
    seen = json.loads(done.stdout)
    with Client(fleet.address) as client:
        expected = client.generate("hello", max_tokens=4, temperature=1.0, seed=7)
    assert seen["grpc"] == version
    assert (seen["events"][0], seen["events"][-1]) == (["started"], ["delta", "finished"])
    assert seen["tokens"] == expected.token_ids
    assert seen["options"] >= 1
    assert {"prefill-0", "decode-0"} <= set(seen["workers"])
    assert seen["router"]
