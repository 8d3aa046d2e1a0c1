"""Figures for Prometheus over HTTP, read when somebody asks for them: between two scrapes they cost nothing."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import NamedTuple

import grpc
from prometheus_client import CollectorRegistry, start_http_server
from prometheus_client.core import GaugeMetricFamily
from prometheus_client.registry import Collector

from headway.runtime.errors import HeadwayError

# The event loop answers within this, or the scrape fails.
READ_S = 2.0


class Figure(NamedTuple):
    """One value of a gauge. Figures of one name have the same labels and the same help."""

    name: str
    help: str
    value: float
    labels: Mapping[str, str] = {}


Read = Callable[[], Iterable[Figure]]


class Exporter:
    """Serves `read()` at http://host:port/metrics until `close`; made, and read, on the event loop.

    Raises HeadwayError where the port cannot be had.
    """

    def __init__(self, host: str, port: int, read: Read) -> None:
        registry = CollectorRegistry()
        registry.register(_OnLoop(asyncio.get_running_loop(), read))
        try:
            self._server, _ = start_http_server(port, host, registry)
        except OSError as error:
            message = f"cannot serve metrics on {host}:{port}: {error.strerror}; choose another with --metrics-port"
            raise HeadwayError(grpc.StatusCode.UNAVAILABLE, message) from None

    @property
    def port(self) -> int:
        return self._server.server_port

    async def close(self) -> None:
        """Off the loop, which a scrape that is going on waits for."""
        await asyncio.to_thread(self._server.shutdown)
        self._server.server_close()


class _OnLoop(Collector):
    """Scrapes come in threads of their own; what they ask about belongs to the loop."""

    def __init__(self, loop: asyncio.AbstractEventLoop, read: Read) -> None:
        self._loop = loop
        self._read = read

    def describe(self) -> list[GaugeMetricFamily]:
        """Nothing is read before the first scrape."""
        return []

    def collect(self) -> Iterator[GaugeMetricFamily]:
        figures = asyncio.run_coroutine_threadsafe(self._now(), self._loop).result(READ_S)
        families: dict[str, GaugeMetricFamily] = {}
        for figure in figures:
            family = families.get(figure.name)
            if family is None:
                family = families[figure.name] = GaugeMetricFamily(figure.name, figure.help, labels=list(figure.labels))
            family.add_metric(list(figure.labels.values()), figure.value)
        yield from families.values()

    async def _now(self) -> list[Figure]:
        return list(self._read())
