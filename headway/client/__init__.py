"""The client library: `Client` and `AsyncClient` over RouterService, with typed results and streaming iterators.

with Client("127.0.0.1:50051") as client:
    print(client.generate("Once upon a time", max_tokens=20).text)
    for event in client.stream([("user", "Why is the sky blue?")]):
        if isinstance(event, TextDelta):
            print(event.text, end="", flush=True)
"""

from __future__ import annotations

from headway.client.aio import AsyncClient, AsyncStream
from headway.client.blocking import Client, Stream
from headway.client.errors import HeadwayClientError
from headway.client.request import Message, Options, Prompt
from headway.client.results import (
    Answer,
    Choice,
    Event,
    ExpectedLink,
    Explanation,
    Finished,
    FleetView,
    Link,
    Placement,
    Started,
    Store,
    TextDelta,
    Tier,
    Timings,
    Token,
    Usage,
    Worker,
)

__all__ = [
    "Answer",
    "AsyncClient",
    "AsyncStream",
    "Choice",
    "Client",
    "Event",
    "ExpectedLink",
    "Explanation",
    "Finished",
    "FleetView",
    "HeadwayClientError",
    "Link",
    "Message",
    "Options",
    "Placement",
    "Prompt",
    "Started",
    "Store",
    "Stream",
    "TextDelta",
    "Tier",
    "Timings",
    "Token",
    "Usage",
    "Worker",
]
