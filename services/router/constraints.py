"""Constraints of requests, tried in a child process before a worker gets them: one that hangs or dies harms nobody."""

from __future__ import annotations

import asyncio
import contextlib
import json
import signal
import sys
from asyncio.subprocess import DEVNULL, PIPE, Process
from collections import OrderedDict

import grpc

from headway.core.sampling import Constraint
from headway.runtime.errors import HeadwayError, invalid

# CPU seconds of one constraint; usual ones take milliseconds.
TRIAL_S = 3.0
# For a child to load the library, and for a trial, whose own limit counts CPU only, on a busy machine.
PATIENCE_S = 30.0
# Verdicts that are remembered, those asked for last.
REMEMBERED = 256


class ConstraintCheck:
    """Says of a constraint whether workers may be given it. The child is started when it is first needed."""

    def __init__(self) -> None:
        self._verdicts: OrderedDict[Constraint, str | None] = OrderedDict()
        self._turn = asyncio.Lock()
        self._child: Process | None = None

    async def check(self, constraint: Constraint) -> None:
        """Raises HeadwayError: INVALID_ARGUMENT where no worker could use it, FAILED_PRECONDITION without a library."""
        if constraint not in self._verdicts:
            async with self._turn:
                if constraint not in self._verdicts:
                    self._verdicts[constraint] = await self._try(constraint)
        self._verdicts.move_to_end(constraint)
        if len(self._verdicts) > REMEMBERED:
            self._verdicts.popitem(last=False)
        if (sentence := self._verdicts[constraint]) is not None:
            raise invalid(f"constraint: {sentence}")

    def close(self) -> None:
        child, self._child = self._child, None
        if child is not None:
            with contextlib.suppress(ProcessLookupError):
                child.kill()

    async def _try(self, constraint: Constraint) -> str | None:
        """Why it cannot be used, or None. A child that owes an answer is ended: it would pass for the next one's."""
        asked = json.dumps({"kind": constraint.kind.value, "text": constraint.text})
        child = self._child or await self._start()
        try:
            assert child.stdin is not None
            child.stdin.write(asked.encode() + b"\n")
            return await _answer(child)
        except (EOFError, ConnectionError):
            self.close()
            if await child.wait() == -signal.SIGPROF:
                return f"it takes more than {TRIAL_S:g} s of computing before the first token; simplify it"
            return "it needs too much memory, or breaks the library that compiles it; simplify it"
        except TimeoutError:
            self.close()
            message = "the constraint could not be tried in time, the machine is too busy; try again later"
            raise HeadwayError(grpc.StatusCode.RESOURCE_EXHAUSTED, message, retry_after_s=1.0) from None
        except BaseException:
            self.close()
            raise

    async def _start(self) -> Process:
        command = [sys.executable, "-m", "headway.text.trial", str(TRIAL_S)]
        self._child = child = await asyncio.create_subprocess_exec(*command, stdin=PIPE, stdout=PIPE, stderr=DEVNULL)
        try:
            unable = await _answer(child)
        except BaseException as error:
            self.close()
            if not isinstance(error, TimeoutError | EOFError | ConnectionError):
                raise
            unable = "the process that tries constraints does not start"
        if unable is not None:
            self.close()
            await child.wait()
            raise HeadwayError(grpc.StatusCode.FAILED_PRECONDITION, f"the router says: {unable}")
        return child


async def _answer(child: Process) -> str | None:
    assert child.stdout is not None
    async with asyncio.timeout(PATIENCE_S):
        line = await child.stdout.readline()
    if not line.endswith(b"\n"):
        raise EOFError
    answer: str | None = json.loads(line)
    return answer
