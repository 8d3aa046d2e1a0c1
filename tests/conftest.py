"""The fleet that a module's SPEC describes, and a stub of its router."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest

from headway.fleet import Fleet
from headway.runtime.channels import open_channel
from headway.v1 import router_pb2_grpc
from tests.support import Stub

if not Path("/dev/nvidiactl").exists():
    # Where no GPU is, Triton's kernels are interpreted; it must know before it is imported first.
    os.environ.setdefault("TRITON_INTERPRET", "1")


@pytest.fixture(scope="module")
def fleet(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Fleet]:
    with Fleet(request.module.SPEC, tmp_path_factory.mktemp("fleet")) as fleet:
        fleet.wait_ready(120)
        yield fleet


@pytest.fixture
async def stub(fleet: Fleet) -> AsyncIterator[Stub]:
    async with open_channel(fleet.address) as channel:
        yield router_pb2_grpc.RouterServiceStub(channel)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Tests that need what is not installed are skipped, and say so."""
    for mark, name, modules in (
        ("nixl", "NIXL", ("nixl", "nixl_cu12", "nixl_cu13")),
        ("triton", "Triton", ("triton",)),
    ):
        if not any(map(importlib.util.find_spec, modules)):
            for item in items:
                if item.get_closest_marker(mark):
                    item.add_marker(pytest.mark.skip(reason=f"{name} is not installed (pip install .[{mark}])"))
