"""The router as a process: ready notice, health, a port in use, an unknown key, SIGTERM."""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc

COMMAND = [sys.executable, "-m", "services.router.server"]


def start(port_file: Path) -> tuple[subprocess.Popen[str], int]:
    command = [*COMMAND, "--port", "0", "--port-file", str(port_file)]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    until = time.monotonic() + 30
    while not (port_file.exists() and port_file.read_text().endswith("\n")):
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < until
        time.sleep(0.02)
    return process, int(port_file.read_text())


def test_serves_refuses_a_second_one_and_ends_on_sigterm(tmp_path: Path) -> None:
    process, port = start(tmp_path / "port")
    try:
        with grpc.insecure_channel(f"127.0.0.1:{port}") as channel:
            stub = health_pb2_grpc.HealthStub(channel)
            for service in ("", "headway.v1.RouterService"):
                answer = stub.Check(health_pb2.HealthCheckRequest(service=service))
                assert answer.status == health_pb2.HealthCheckResponse.SERVING
        second = subprocess.run([*COMMAND, "--port", str(port)], capture_output=True, text=True, timeout=30)
        assert second.returncode == 1
        assert f"cannot listen on 127.0.0.1:{port}" in second.stderr
    finally:
        process.terminate()
        _, errors = process.communicate(timeout=10)
    assert process.returncode == 0, errors
    assert "Traceback" not in errors


def test_unknown_key_is_one_clear_line(tmp_path: Path) -> None:
    config = tmp_path / "router.toml"
    config.write_text("prot = 1\n")
    result = subprocess.run([*COMMAND, "--config", str(config)], capture_output=True, text=True, timeout=30)
    assert result.returncode == 2
    assert "unknown key 'prot'" in result.stderr
    assert len(result.stderr.splitlines()) == 1
