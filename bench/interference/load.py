"""The load on a fleet: four chats that go on and on, and a long prompt every few seconds."""

from __future__ import annotations

import asyncio
import itertools
import random
import time
from collections.abc import Sequence

from bench.interference.seen import (
    ALONE_S,
    LONG_OUTPUT_TOKENS,
    LONG_PROMPT_TOKENS,
    LONG_TTFT_S,
    OUTPUT_TOKENS,
    PROMPT_TOKENS,
    STREAM_TTFT_S,
    STREAMS,
    Seen,
)
from headway.client import AsyncClient, HeadwayClientError, TextDelta


class Load:
    """`every_s`: between long prompts; None: there are none. `text`: token ids, of which prompts are pieces, so that
    answers are text too. The router refuses what cannot be in time.
    """

    def __init__(self, address: str, text: Sequence[int], every_s: float | None, seconds: float, seed: int) -> None:
        self._address = address
        self._text = text
        self._every_s = every_s
        self._seconds = seconds
        self._draw = random.Random(seed)
        self._started = 0.0
        self.seen: list[Seen] = []

    async def run(self) -> list[Seen]:
        """For so many seconds; what runs then is cut off."""
        async with AsyncClient(self._address) as client:
            self._started = time.monotonic()
            jobs = [asyncio.create_task(self._chat(client)) for _ in range(STREAMS)]
            jobs.append(asyncio.create_task(self._long_prompts(client)))
            await asyncio.sleep(self._seconds)
            for job in jobs:
                job.cancel()
            for ended in await asyncio.gather(*jobs, return_exceptions=True):
                if isinstance(ended, Exception):
                    raise ended
        return self.seen

    async def _chat(self, client: AsyncClient) -> None:
        while True:
            await self._ask(client, "stream", PROMPT_TOKENS, OUTPUT_TOKENS, STREAM_TTFT_S)

    async def _long_prompts(self, client: AsyncClient) -> None:
        if self._every_s is None:
            return
        async with asyncio.TaskGroup() as asked:
            for at in itertools.count():
                await asyncio.sleep(self._started + ALONE_S + at * self._every_s - time.monotonic())
                asked.create_task(self._ask(client, "long", LONG_PROMPT_TOKENS, LONG_OUTPUT_TOKENS, LONG_TTFT_S))

    async def _ask(self, client: AsyncClient, kind: str, prompt: int, outputs: int, objective_s: float) -> None:
        at = self._draw.randrange(len(self._text) - prompt)
        ids = self._text[at : at + prompt]
        seen = Seen(kind, time.monotonic() - self._started)
        self.seen.append(seen)
        try:
            async with client.stream(
                ids, max_tokens=outputs, ignore_eos=True, ttft_objective_s=objective_s, refuse_late=True
            ) as stream:
                async for event in stream:
                    if isinstance(event, TextDelta):
                        seen.token_s += [time.monotonic() - self._started] * len(event.tokens)
        except HeadwayClientError as error:
            seen.error = error.code.name
            await asyncio.sleep(0.2)
