"""A worker process: engine, attachment, announcements and one Run service, wired together."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import logging
import os
from collections.abc import Callable, Coroutine, Sequence
from pathlib import Path
from typing import Any

import grpc

from headway.core.model import ModelCard
from headway.core.step import StepLimits
from headway.core.timings import Timings
from headway.engine.contract import Engine
from headway.engine.simulated import Latency, SimulatedEngine, simulated_card
from headway.runtime.convert import card_to_proto
from headway.runtime.errors import HeadwayError
from headway.runtime.log import setup_logs
from headway.runtime.server import GrpcServer, notify, stop_event
from headway.slab.device import Device, DeviceError, open_device
from headway.v1 import common_pb2, router_pb2
from headway.worker.announce import Announcer
from headway.worker.attach import Attachment
from headway.worker.config import WorkerConfig
from headway.worker.cores import Cores, Share
from headway.worker.drafting import drafting_of
from headway.worker.loop import EngineLoop
from headway.worker.matchers import Matchers
from headway.worker.measure import TimingFile, alone, measure

log = logging.getLogger(__name__)

# Of a worker that ends by itself.
FLUSH_S = 0.5
# Within which a router hears that a worker drains.
HEARD_S = 0.2
AddServicer = Callable[[grpc.aio.Server, EngineLoop, ModelCard], None]


def share_of(config: WorkerConfig, role: common_pb2.WorkerRole.ValueType) -> Share | None:
    """Of the node's cores; None where the worker does not compute on them."""
    if config.on_gpu or config.engine == "sim":
        return None
    threads, keep = cores_of(config, role)
    return Share(Cores(), threads, keep)


def cores_of(config: WorkerConfig, role: common_pb2.WorkerRole.ValueType) -> tuple[int, int]:
    """(threads, cores to keep), with what is not configured filled in."""
    cores, keep = len(os.sched_getaffinity(0)), config.keep_cores
    threads = config.threads or (max(1, cores // 2) if role == common_pb2.WORKER_ROLE_DECODE else cores)
    if keep < 0:
        keep = 0 if role == common_pb2.WORKER_ROLE_PREFILL else threads
    return threads, keep


def limits_of(config: WorkerConfig, role: common_pb2.WorkerRole.ValueType, engine: Engine) -> StepLimits:
    """Of its forwards. Where it decodes too there are no guests: who decodes would wait for a host's end."""
    hosts = engine.interruptible and role == common_pb2.WORKER_ROLE_PREFILL
    return config.limits(sum(group.layers for group in engine.card.kv_format.groups) if hosts else 1)


def make_engine(config: WorkerConfig, role: common_pb2.WorkerRole.ValueType) -> Engine:
    """The configured engine. Raises HeadwayError with one sentence when the model cannot be served."""
    if config.engine == "sim":
        prefill, step = config.sim_prefill, config.sim_step
        latency = Latency((prefill[0], prefill[1], prefill[2]), (step[0], step[1], step[2]))
        poison = None if config.sim_poison_token < 0 else config.sim_poison_token
        return SimulatedEngine(simulated_card(config.sim_context), latency, poison_token=poison)
    # torch takes a second to import; a simulated worker does without.
    from headway.engine.load import ModelError, load_engine
    from headway.models import resolve

    try:
        path = str(resolve(config.model))
        # The NumPy device is host memory: the model computes on the CPU there.
        device = config.device if config.on_gpu else "cpu"
        return load_engine(
            path,
            dtype=config.model_dtype,
            weights=config.weights,
            kv_dtype=config.kv_format_dtype,
            threads=cores_of(config, role)[0],
            device=device,
            copy_bytes=config.copy_bytes,
        )
    except (ModelError, LookupError, ValueError, OSError) as error:
        raise HeadwayError(grpc.StatusCode.FAILED_PRECONDITION, str(error)) from None


async def run_worker(
    config: WorkerConfig, program: str, role: common_pb2.WorkerRole.ValueType, service: str, add: AddServicer
) -> None:
    """Serve until SIGTERM, then drain: no new work, running sequences go on for at most config.drain_s."""
    setup_logs(program, config.log_level)
    stopped = stop_event()
    server = GrpcServer([service])
    port = server.listen(config.host, config.port)
    device = await asyncio.to_thread(_device, config)
    engine = await asyncio.to_thread(make_engine, config, role)
    matchers = await asyncio.to_thread(Matchers, engine.card)
    threads = cores_of(config, role)[0]
    timings, timing_file = Timings(threads), TimingFile(config.timing_file, _identity(config, engine.card, threads))
    await asyncio.to_thread(_know_speed, config, engine, timings, timing_file)
    # The model's objects live as long as the process: a collection that walked them would stop every stream.
    gc.freeze()
    limits = limits_of(config, role, engine)
    loop = EngineLoop(
        engine,
        limits,
        config.prompt_order,
        timings,
        growth_tokens=config.growth_tokens,
        acquire_timeout_s=config.acquire_timeout_s,
        share=share_of(config, role),
        matchers=matchers,
        drafting=drafting_of(config.speculate, limits.itl_s),
        on_load=lambda: announcer.load_changed(),
        on_prompt=lambda router_id: announcer.prompt_came(router_id),
    )
    add(server.server, loop, engine.card)
    await server.start()
    hello = router_pb2.WorkerHello(
        worker_id=config.name,
        role=role,
        address=f"{config.host}:{port}",
        kvstore_address=config.kvstore,
        model=card_to_proto(engine.card),
        pid=os.getpid(),
        max_batch=config.max_batch,
        chunk_tokens=config.chunk_tokens,
        chunk_s=limits.chunk_s,
        shared_chunk_s=config.shared_chunk_s,
        itl_objective_s=config.itl_objective_s,
        order=config.order,
        ageing=config.ageing,
        layers=limits.layers,
    )

    def current_hello() -> router_pb2.WorkerHello:
        hello.node_id = loop.slab.node_id if loop.slab else ""
        return hello

    announcer = Announcer(config.routers, loop, current_hello)
    attachment = Attachment(
        config.kvstore,
        config.name,
        engine.card,
        device,
        on_attached=loop.attached,
        on_lost=loop.lost,
        on_reclaim=loop.leases.reclaim,
        on_offer=loop.leases.offer,
        on_pulled=loop.leases.pulled,
    )
    loop.leases.use(attachment)
    await server.set_serving(True)
    if config.port_file:
        Path(config.port_file).write_text(f"{port}\n")
    notify("READY=1")
    log.info("event=ready worker=%s port=%d model=%s", config.name, port, engine.card.name)
    try:
        jobs = [attachment.run(), loop.run(), announcer.run(), timing_file.keep(timings)]
        await _work(jobs, server, loop, announcer, stopped, config.drain_s)
    except BaseException:
        # What failed sequences were told must reach their routers, or this counts as a death of their making.
        await server.stop(FLUSH_S)
        raise
    finally:
        timing_file.save(timings)
    loop.close()


def _know_speed(config: WorkerConfig, engine: Engine, timings: Timings, file: TimingFile) -> None:
    """From the last run, or measured now; one who knows neither learns from its work."""
    if file.load(timings) or not config.measure_s:
        return
    try:
        with alone() if config.engine != "sim" else contextlib.nullcontext():
            measure(engine, timings.now, config.measure_s)
    except Exception:
        log.exception("event=measure_failed")
    file.save(timings)


async def _work(
    jobs: Sequence[Coroutine[Any, Any, None]],
    server: GrpcServer,
    loop: EngineLoop,
    announcer: Announcer,
    stopped: asyncio.Event,
    drain_s: float,
) -> None:
    """Do the jobs until `stopped`, and drained."""
    async with asyncio.TaskGroup() as tasks:
        running = [tasks.create_task(job) for job in jobs]
        await stopped.wait()
        notify("STOPPING=1")
        announcer.drain()
        await _drained(loop, drain_s)
        await server.stop(1.0)
        for task in running:
            task.cancel()


def _identity(config: WorkerConfig, card: ModelCard, threads: int) -> str:
    """What the speed depends on."""
    simulated = f" {config.sim_prefill} {config.sim_step}" if config.engine == "sim" else ""
    numbers = f"{config.model_dtype} {config.weights} {config.kv_format_dtype}"
    return f"{card.fingerprint.hex()} {config.device} {numbers} threads={threads}{simulated}"


def _device(config: WorkerConfig) -> Device | None:
    try:
        return open_device(config.device)
    except DeviceError as error:
        raise HeadwayError(grpc.StatusCode.FAILED_PRECONDITION, str(error)) from None


async def _drained(loop: EngineLoop, seconds: float) -> None:
    """Until no sequence is left, nor expected, at most `seconds`; and until the routers have heard of it."""
    waited = 0.0
    while waited < min(seconds, HEARD_S) or ((loop.actives or any(loop.expected.values())) and waited < seconds):
        await asyncio.sleep(0.05)
        waited += 0.05
