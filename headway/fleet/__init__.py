"""A local fleet: kvstores, workers and a router as processes on loopback, started, supervised and stopped."""

from __future__ import annotations

from headway.fleet.local import Fleet
from headway.fleet.process import FleetError, Place
from headway.fleet.spec import FleetSpec

__all__ = ["Fleet", "FleetError", "FleetSpec", "Place"]
