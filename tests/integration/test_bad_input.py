"""Bad input, each with its status and a sentence that says what to change; nothing is left behind."""

from __future__ import annotations

import asyncio
import socket
import subprocess
import sys
from pathlib import Path

import grpc
import pytest

from headway.core.model import KvFormat, LayerGroup
from headway.fleet import Fleet
from headway.runtime.channels import open_channel
from headway.runtime.convert import kv_format_to_proto
from headway.v1 import common_pb2, kvstore_pb2, kvstore_pb2_grpc, router_pb2, router_pb2_grpc
from tests.support import Stub, generate, request, settled, sim_spec

SPEC = sim_spec(1, 1, 1 << 20, "--sim-context", "2048")
INVALID = grpc.StatusCode.INVALID_ARGUMENT


def sampled(**values: float) -> router_pb2.GenerateRequest:
    return request([1, 2, 3], sampling=common_pb2.Sampling(**values))  # type: ignore[arg-type]


BAD = {
    "empty text": (router_pb2.GenerateRequest(text=b""), INVALID, "empty"),
    "no prompt": (router_pb2.GenerateRequest(), INVALID, "prompt"),
    "empty ids": (request([]), INVALID, "empty"),
    "too long": (request([1] * 2048), INVALID, "2048"),
    "unknown id": (request([1, 256]), INVALID, "256"),
    "negative temperature": (sampled(temperature=-1), INVALID, "temperature"),
    "absurd temperature": (sampled(temperature=1e9), INVALID, "temperature"),
    "nan": (sampled(temperature=float("nan")), INVALID, "temperature"),
    "top_p": (sampled(top_p=1.5), INVALID, "top_p"),
    "min_p": (sampled(min_p=-0.5), INVALID, "min_p"),
    "repetition": (sampled(repetition_penalty=0), INVALID, "repetition_penalty"),
    "no tokens": (request([1], 0), INVALID, "max_tokens"),
    "n": (request([1], n=99), INVALID, "n"),
    "logprobs": (request([1], top_logprobs=1000), INVALID, "top_logprobs"),
    "deadline": (request([1], deadline_s=-1.0), INVALID, "deadline"),
    "utf-8": (router_pb2.GenerateRequest(text=b"caf\xe9 \xff"), INVALID, "UTF-8"),
    "model": (request([1], model="gpt-17"), grpc.StatusCode.NOT_FOUND, "gpt-17"),
    "worker": (
        request([1], placement=router_pb2.PlacementHint(prefill_worker="prefill-77")),
        INVALID,
        "prefill-77",
    ),
}


@pytest.mark.parametrize("name", list(BAD))
async def test_bad_requests(fleet: Fleet, stub: Stub, name: str) -> None:
    message, code, word = BAD[name]
    out = await generate(stub, message)
    assert out.code == code, out.details
    assert word in out.details
    assert len(out.details) > 20
    assert out.tokens == []
    await settled(fleet.address_of("kvstore"))


async def test_an_oversized_message_is_refused(fleet: Fleet, stub: Stub) -> None:
    out = await generate(stub, router_pb2.GenerateRequest(text=b"x" * (20 << 20)))
    assert out.code == grpc.StatusCode.RESOURCE_EXHAUSTED
    await settled(fleet.address_of("kvstore"))


async def test_a_request_id_in_flight_is_not_taken_twice(fleet: Fleet, stub: Stub) -> None:
    started, go = asyncio.Event(), asyncio.Event()

    async def hold(tokens: int) -> None:
        started.set()
        await go.wait()

    first = asyncio.create_task(generate(stub, request([1] * 10, 1500, request_id="mine"), hold))
    await started.wait()
    second = await generate(stub, request([1] * 10, request_id="mine"))
    go.set()
    assert second.code == grpc.StatusCode.ALREADY_EXISTS
    assert "mine" in second.details
    first.cancel()
    await asyncio.gather(first, return_exceptions=True)
    await settled(fleet.address_of("kvstore"))


async def test_a_prompt_that_the_slab_can_never_hold_is_refused(tmp_path: Path) -> None:
    spec = sim_spec(1, 1, 128 << 10)
    with Fleet(spec, tmp_path) as small:
        small.wait_ready(60)
        async with open_channel(small.address) as channel:
            out = await generate(router_pb2_grpc.RouterServiceStub(channel), request([1] * 2000))
        assert out.code == grpc.StatusCode.RESOURCE_EXHAUSTED
        assert "slab" in out.details
        assert out.seconds < 3
        await settled(small.address_of("kvstore"))


async def test_a_worker_with_another_kv_format_is_refused(fleet: Fleet) -> None:
    other = KvFormat(32, "float32", "layer,kv,head,token,dim", (LayerGroup(2, 1, 8, 128),))
    hello = kvstore_pb2.AttachHello(worker_id="x", pid=1, kv_format=kv_format_to_proto(other), incarnation="x")
    async with open_channel(fleet.address_of("kvstore")) as channel:
        call = kvstore_pb2_grpc.KvStoreServiceStub(channel).Attach(iter([kvstore_pb2.AttachRequest(hello=hello)]))
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            async for _ in call:
                pass
    assert caught.value.code() == grpc.StatusCode.FAILED_PRECONDITION
    assert "format" in (caught.value.details() or "")


def run_service(name: str, *flags: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", f"services.{name}.server", *flags]
    return subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)


@pytest.mark.parametrize("service", ["router", "prefill", "decode", "kvstore"])
def test_an_unknown_config_key_stops_the_start(service: str, tmp_path: Path) -> None:
    config = tmp_path / "bad.toml"
    config.write_text("prot = 1\n")
    done = run_service(service, "--config", str(config))
    assert done.returncode == 2
    assert "'prot'" in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1


@pytest.mark.parametrize("service", ["router", "kvstore"])
def test_a_port_in_use_stops_the_start(service: str, tmp_path: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        flags = ["--port", str(taken.getsockname()[1])]
        if service == "kvstore":
            flags += ["--run-dir", str(tmp_path), "--slab-bytes", str(1 << 20), "--slab-name", tmp_path.name]
        done = run_service(service, *flags)
    assert done.returncode == 1
    assert "port is in use" in done.stderr
    assert "Traceback" not in done.stderr


def test_missing_and_corrupt_models_stop_the_start(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "llama"')
    for model in ("no-such-model", str(tmp_path)):
        done = run_service("prefill", "--model", model)
        assert done.returncode == 1
        assert "Traceback" not in done.stderr
        assert len(done.stderr.strip()) > 20
