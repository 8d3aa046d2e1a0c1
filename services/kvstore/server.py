"""The kvstore process."""

from __future__ import annotations

import asyncio
import logging
from pathlib import Path

import grpc

from headway.runtime.config import load_or_exit
from headway.runtime.errors import HeadwayError
from headway.runtime.log import setup_logs
from headway.runtime.server import GrpcServer, notify, run_service, stop_event
from headway.slab.device import DeviceError, open_device
from headway.slab.host import SlabError
from headway.v1 import kvstore_pb2, kvstore_pb2_grpc, transfer_pb2
from services.kvstore.config import KvStoreConfig
from services.kvstore.descriptor import DescriptorSocket
from services.kvstore.device_keeper import DeviceKeeper
from services.kvstore.device_memory import DeviceMemory
from services.kvstore.memory import Memory, SlabMemory
from services.kvstore.node import Node
from services.kvstore.planes.nixl_agent import NixlError, check_nixl
from services.kvstore.planes.sources import open_sources
from services.kvstore.pulls import Pulls
from services.kvstore.restart import Keeper
from services.kvstore.service import KvStoreServicer
from services.kvstore.tiering import Tiering
from services.kvstore.transfer_service import TransferServicer, add_transfers

log = logging.getLogger(__name__)

PROGRAM = "headway-kvstore"
# Workers stop and close a device's slab before it is freed; one that takes longer is left to the runtime's mercy.
LET_GO_S = 5.0


async def serve(config: KvStoreConfig) -> None:
    """Serve until SIGTERM. The segment's name goes with a clean stop; workers keep their mapping until they let go."""
    setup_logs(PROGRAM, config.log_level)
    stopped = stop_event()
    await asyncio.to_thread(_check_nixl, config)
    server = GrpcServer(
        [
            kvstore_pb2.DESCRIPTOR.services_by_name["KvStoreService"].full_name,
            transfer_pb2.DESCRIPTOR.services_by_name["TransferService"].full_name,
        ]
    )
    port = server.listen(config.host, config.port)
    keeper, memory = await asyncio.to_thread(open_slab, config)
    try:
        node = Node(config, keeper, memory)
        pulls, tiering = Pulls(node), Tiering(node)
        sources = open_sources(config, memory)
        add_transfers(server.server, TransferServicer(node, sources, serve_bytes="grpc" in config.planes))
        descriptors = DescriptorSocket(node, Path(config.run_dir).resolve())
        servicer = KvStoreServicer(node, str(descriptors.path))
        kvstore_pb2_grpc.add_KvStoreServiceServicer_to_server(servicer, server.server)
        async with asyncio.TaskGroup() as tasks:
            running = [tasks.create_task(job) for job in (descriptors.serve(), node.tick(), tiering.run())]
            await server.start()
            await server.set_serving(True)
            if config.port_file:
                Path(config.port_file).write_text(f"{port}\n")
            notify("READY=1")
            log.info("event=ready node=%s port=%d slab_bytes=%d", config.node_id, port, config.slab_bytes)
            await stopped.wait()
            notify("STOPPING=1")
            await pulls.close()
            await server.stop(0.5)
            for task in running:
                task.cancel()
            await tiering.close()
            await asyncio.to_thread(sources.close)
            if isinstance(keeper, DeviceKeeper):
                await node.abandoned(LET_GO_S)
    finally:
        keeper.remove()


def _check_nixl(config: KvStoreConfig) -> None:
    """Raises HeadwayError where the plane is named but NIXL is not there or does not work."""
    if "nixl" in config.planes:
        try:
            check_nixl(config.transfer_host)
        except NixlError as error:
            raise HeadwayError(grpc.StatusCode.FAILED_PRECONDITION, str(error)) from None


def open_slab(config: KvStoreConfig) -> tuple[Keeper | DeviceKeeper, Memory]:
    """Raises HeadwayError: FAILED_PRECONDITION without such a device, RESOURCE_EXHAUSTED where memory is short."""
    try:
        device = open_device(config.device)
        if device is not None:
            on_device = DeviceKeeper(config.slab_name, device, config.slab_bytes)
            return on_device, DeviceMemory(on_device.segment)
        keeper = Keeper(config.slab_name, config.slab_bytes)
    except DeviceError as error:
        raise HeadwayError(grpc.StatusCode.FAILED_PRECONDITION, str(error)) from None
    except SlabError as error:
        raise HeadwayError(grpc.StatusCode.RESOURCE_EXHAUSTED, str(error)) from None
    try:
        return keeper, SlabMemory(keeper.segment.descriptor, config.slab_bytes)
    except BaseException:
        keeper.remove()
        raise


def main() -> None:
    config = load_or_exit(KvStoreConfig, PROGRAM)
    run_service(PROGRAM, lambda: serve(config))


if __name__ == "__main__":
    main()
