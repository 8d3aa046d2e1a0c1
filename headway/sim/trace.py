"""Traces of requests: Mooncake-format JSONL, Azure CSV."""

from __future__ import annotations

import csv
import gzip
import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from datetime import datetime
from pathlib import Path
from typing import IO

from headway.core.keys import KEY_BYTES

MOONCAKE_BLOCK = 512


class TraceError(Exception):
    """The file cannot be used; one sentence that says why."""


@dataclass(frozen=True, slots=True)
class TraceRequest:
    """`keys`: the block keys of its prompt, the last block may be partial. Times in seconds from the trace's start."""

    arrival_s: float
    prompt_tokens: int
    output_tokens: int
    keys: Sequence[bytes] = ()
    priority: int = 0
    tenant: str = ""


@dataclass(frozen=True)
class Trace:
    """Requests by arrival. `block_size`: tokens of a key."""

    name: str
    block_size: int
    requests: Sequence[TraceRequest]

    def __len__(self) -> int:
        return len(self.requests)

    @property
    def span_s(self) -> float:
        return self.requests[-1].arrival_s if self.requests else 0.0

    def first(self, count: int) -> Trace:
        return replace(self, requests=self.requests[:count])

    def every(self, count: int) -> Trace:
        """Every so manieth session, whole. A session: requests with the same second block (the first is often that of a
        system prompt); where prompts have no such block, a request.
        """
        sessions: dict[object, int] = {}
        kept = []
        for number, request in enumerate(self.requests):
            name: object = request.keys[1] if len(request.keys) > 1 else number
            if sessions.setdefault(name, len(sessions)) % count == 0:
                kept.append(request)
        return replace(self, requests=kept)

    def faster(self, speed: float) -> Trace:
        """The same arrivals, `speed` times as fast."""
        requests = [replace(request, arrival_s=request.arrival_s / speed) for request in self.requests]
        return replace(self, requests=requests)


def read_trace(path: Path) -> Trace:
    """By its name: *.jsonl is Mooncake's format, *.csv Azure's; both may be gzipped. Raises TraceError."""
    name = path.name.removesuffix(".gz")
    try:
        with _open(path) as lines:
            trace = _azure(name, csv.DictReader(lines)) if name.endswith(".csv") else _mooncake(name, lines)
    except (OSError, EOFError, UnicodeDecodeError) as error:
        raise TraceError(f"{path} cannot be read: {error}") from None
    except (ValueError, KeyError, TypeError) as error:
        raise TraceError(
            f"{path} is no trace in the format that its name says ({type(error).__name__}: {error})"
        ) from None
    if not trace.requests:
        raise TraceError(f"{path} has no requests")
    return trace


def _open(path: Path) -> IO[str]:
    return gzip.open(path, "rt") if path.suffix == ".gz" else path.open()


def _mooncake(name: str, lines: Iterable[str]) -> Trace:
    """{"timestamp": ms, "input_length", "output_length", "hash_ids": one for each 512 tokens, chained}."""

    def requests() -> Iterator[TraceRequest]:
        for line in lines:
            row = json.loads(line)
            yield TraceRequest(
                row["timestamp"] / 1e3,
                max(1, int(row["input_length"])),
                max(1, int(row["output_length"])),
                [int(number).to_bytes(KEY_BYTES, "little") for number in row["hash_ids"]],
            )

    return Trace(name.removesuffix(".jsonl"), MOONCAKE_BLOCK, _sorted(requests()))


def _azure(name: str, rows: Iterable[dict[str, str]]) -> Trace:
    """TIMESTAMP,ContextTokens,GeneratedTokens: nothing is said of prefixes, so nothing is shared."""

    def requests() -> Iterator[TraceRequest]:
        first: datetime | None = None
        for row in rows:
            # Seven digits of a second, one more than Python takes.
            at = datetime.fromisoformat(row["TIMESTAMP"][:26])
            first = first or at
            arrival_s = (at - first).total_seconds()
            yield TraceRequest(arrival_s, max(1, int(row["ContextTokens"])), max(1, int(row["GeneratedTokens"])))

    return Trace(name.removesuffix(".csv"), MOONCAKE_BLOCK, _sorted(requests()))


def _sorted(requests: Iterable[TraceRequest]) -> list[TraceRequest]:
    return sorted(requests, key=lambda request: request.arrival_s)
