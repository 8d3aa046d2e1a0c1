"""The router process."""

from __future__ import annotations

import asyncio
import logging
from pathlib import Path

from headway.runtime.config import load_or_exit
from headway.runtime.log import setup_logs
from headway.runtime.metrics import Exporter
from headway.runtime.server import GrpcServer, notify, run_service, stop_event
from headway.v1 import router_pb2, router_pb2_grpc
from services.router.config import RouterConfig
from services.router.figures import figures
from services.router.service import RouterService

PROGRAM = "headway-router"
SERVICE = router_pb2.DESCRIPTOR.services_by_name["RouterService"].full_name

log = logging.getLogger(__name__)


async def serve(config: RouterConfig) -> None:
    """Serve until SIGTERM; then refuse new requests and let running ones go on for at most config.drain_s."""
    setup_logs(PROGRAM, config.log_level)
    stopped = stop_event()
    service = RouterService(config)
    server = GrpcServer([SERVICE])
    router_pb2_grpc.add_RouterServiceServicer_to_server(service, server.server)
    port = server.listen(config.host, config.port)
    exporter = _exporter(config, service)
    await server.start()
    await server.set_serving(True)
    if config.port_file:
        Path(config.port_file).write_text(f"{port}\n")
    notify("READY=1")
    log.info("event=ready port=%d router=%s", port, service.router_id)
    await stopped.wait()
    notify("STOPPING=1")
    log.info("event=draining in_flight=%d", len(service.in_flight))
    await server.set_serving(False)
    await service.drain(config.drain_s)
    await server.stop(0.0)
    service.fleet.close()
    if exporter is not None:
        await exporter.close()
    await asyncio.sleep(0)


def _exporter(config: RouterConfig, service: RouterService) -> Exporter | None:
    if not config.metrics_port:
        return None
    return Exporter(config.host, config.metrics_port, lambda: figures(service.fleet, len(service.in_flight)))


def main() -> None:
    config = load_or_exit(RouterConfig, PROGRAM)
    run_service(PROGRAM, lambda: serve(config))


if __name__ == "__main__":
    main()
