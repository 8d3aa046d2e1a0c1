"""What several tests of the kvstore need beside it."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.kvstore.redis_rig import Server


@pytest.fixture
def server(tmp_path: Path) -> Iterator[Server]:
    """A Valkey or Redis server."""
    pytest.importorskip("redis", reason="the extra [redis] is not installed")
    binary = shutil.which("valkey-server") or shutil.which("redis-server")
    if binary is None:
        pytest.skip("neither valkey-server nor redis-server is installed")
    server = Server(binary, tmp_path)
    yield server
    server.stop()
