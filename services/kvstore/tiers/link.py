"""The way to a Valkey or Redis server: up or down, nothing in between, and nobody waits for one that is gone."""

from __future__ import annotations

import contextlib
import logging
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar

from services.kvstore.tiers.contract import TierError

log = logging.getLogger(__name__)

T = TypeVar("T")


@dataclass(frozen=True)
class LinkOptions:
    """Seconds. `timeout_s`: the longest silence of the server, or wait for one of the `connections`."""

    connect_s: float = 0.25
    timeout_s: float = 1.0
    first_retry_s: float = 0.5
    last_retry_s: float = 30.0
    connections: int = 4


class Link:
    """Starts down. While down, `ask` answers at once; `probe`, called by one background thread, finds the server again.

    Waits between tries double from `first_retry_s` to `last_retry_s`. Raises TierError when the client library is
    missing or the address is none; a server that is not there is no error.
    """

    def __init__(self, url: str, options: LinkOptions) -> None:
        try:
            import redis
            from redis.backoff import NoBackoff
            from redis.retry import Retry
        except ImportError:
            raise TierError("the remote tier needs the Redis client: pip install 'headway[redis]'") from None
        try:
            self._client: Any = redis.Redis.from_url(
                url,
                socket_timeout=options.timeout_s,
                socket_connect_timeout=options.connect_s,
                # Trying again is this class's business.
                retry=Retry(NoBackoff(), 0),
            )
        except ValueError as error:
            message = f"remote_url is no address of a Valkey or Redis server ({error}); try redis://host:6379"
            raise TierError(message) from None
        # The server is there and says no: no reason to think that it is gone.
        self._refusals = (redis.ResponseError,)
        self._options = options
        self._free = threading.BoundedSemaphore(options.connections)
        self._lock = threading.Lock()
        self._retry_s = options.first_retry_s
        self._next_try_s = 0.0
        self._refused = False
        self.up = False
        self.errors = 0

    def ask(self, question: Callable[[Any], T], otherwise: T) -> T:
        """What `question(client)` gives; `otherwise` when the server is down, goes down, or refuses."""
        return self._ask(question, otherwise) if self.up else otherwise

    def probe(self) -> None:
        """Try again, if it is time to."""
        if not self.up and time.monotonic() >= self._next_try_s and self._ask(lambda client: client.ping(), False):
            log.info("event=remote_tier_up")
            with self._lock:
                self.up, self._retry_s = True, self._options.first_retry_s

    def refused(self, error: Exception) -> None:
        """The server answered a command with an error, e.g. that its memory is full. Of many in a row one is logged."""
        with self._lock:
            self.errors += 1
            first, self._refused = not self._refused, True
        if first:
            log.warning("event=remote_tier_refused %s", error)

    def served(self) -> None:
        """The server took or gave a block."""
        self._refused = False

    def close(self) -> None:
        with contextlib.suppress(Exception):
            self._client.close()

    def _ask(self, question: Callable[[Any], T], otherwise: T) -> T:
        if not self._free.acquire(timeout=self._options.timeout_s):
            self.refused(TimeoutError(f"{self._options.connections} questions at once are still waiting"))
            return otherwise
        try:
            return question(self._client)
        except self._refusals as error:
            self.refused(error)
        except Exception as error:
            self._down(error)
        finally:
            self._free.release()
        return otherwise

    def _down(self, error: Exception) -> None:
        with self._lock:
            self.errors += 1
            if not self.up and time.monotonic() < self._next_try_s:
                # Others have seen it, too.
                return
            self.up, retry_s = False, self._retry_s
            self._next_try_s = time.monotonic() + retry_s
            self._retry_s = min(2 * retry_s, self._options.last_retry_s)
        log.warning("event=remote_tier_down retry_s=%.1f %s", retry_s, error)
