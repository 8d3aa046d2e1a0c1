"""Headway: disaggregated serving of large language models. `headway.Client` and `headway.AsyncClient` talk to it."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from headway.client import AsyncClient, Client, HeadwayClientError

__all__ = ["AsyncClient", "Client", "HeadwayClientError"]


def __getattr__(name: str) -> object:
    """Imported on first use: the services need no client."""
    if name in __all__:
        return getattr(importlib.import_module("headway.client"), name)
    raise AttributeError(f"module 'headway' has no attribute {name!r}")
