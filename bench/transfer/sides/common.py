"""What a child of a mover needs: its configuration, questions and answers on the pipes, and a mapped slab."""

from __future__ import annotations

import ctypes
import json
import mmap
import os
import signal
import sys
import traceback
from collections.abc import Callable
from typing import Any, ClassVar

PR_SET_PDEATHSIG = 1
Answer = dict[str, Any]
Handler = Callable[[dict[str, Any]], Answer]


class Slab:
    """A slab that the parent made, mapped and populated here: `view` (bytes) and `address` of its first byte."""

    kept: ClassVar[list[mmap.mmap]] = []  # native code has the address only, so the mapping lives as long as we do

    def __init__(self, descriptor: int, size: int) -> None:
        self.bytes = size
        self.memory = mmap.mmap(descriptor, size, flags=mmap.MAP_SHARED | mmap.MAP_POPULATE)
        self.kept.append(self.memory)
        self.view = memoryview(self.memory)
        self.address = ctypes.addressof(ctypes.c_char.from_buffer(self.memory))


def serve(start: Callable[[dict[str, Any]], Handler]) -> None:
    """Build the side from its configuration, say that it is ready, answer until the parent closes our input."""
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)  # even while stopped, we die with the parent
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what a native library prints is log, not an answer

    def say(answer: Answer) -> None:
        answers.write(json.dumps(answer) + "\n")
        answers.flush()

    try:
        handler = start(json.loads(sys.argv[1]))
        say({"ready": True})
        for line in sys.stdin:
            say(handler(json.loads(line)))
    except BaseException as error:
        traceback.print_exc()
        say({"error": f"{type(error).__name__}: {error}"})
    finally:
        os._exit(0)  # threads of native libraries must not keep us
