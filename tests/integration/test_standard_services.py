"""Every service speaks standard health and reflection."""

from __future__ import annotations

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha.proto_reflection_descriptor_database import ProtoReflectionDescriptorDatabase

from headway.fleet import Fleet
from tests.support import sim_spec

SPEC = sim_spec(1, 1, 1 << 20)
SERVICES = {
    "router": "headway.v1.RouterService",
    "prefill-0": "headway.v1.PrefillService",
    "decode-0": "headway.v1.DecodeService",
    "kvstore": "headway.v1.KvStoreService",
}


@pytest.mark.parametrize("name", SERVICES)
def test_health_and_reflection(fleet: Fleet, name: str) -> None:
    with grpc.insecure_channel(fleet.address_of(name)) as channel:
        health = health_pb2_grpc.HealthStub(channel)
        for service in ("", SERVICES[name]):
            reply = health.Check(health_pb2.HealthCheckRequest(service=service), timeout=10)
            assert reply.status == health_pb2.HealthCheckResponse.SERVING
        assert SERVICES[name] in ProtoReflectionDescriptorDatabase(channel).get_services()
