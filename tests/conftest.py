"""The fleet that a module's SPEC describes, and a stub of its router."""

from __future__ import annotations

import importlib.util
from collections.abc import AsyncIterator, Iterator

import pytest

from headway.fleet import Fleet
from headway.runtime.channels import open_channel
from headway.v1 import router_pb2_grpc
from tests.support import Stub


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
    if not any(map(importlib.util.find_spec, ("nixl", "nixl_cu12", "nixl_cu13"))):
        for item in items:
            if item.get_closest_marker("nixl"):
                item.add_marker(pytest.mark.skip(reason="NIXL is not installed (pip install .[nixl])"))
