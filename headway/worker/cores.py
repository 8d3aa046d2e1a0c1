"""Who computes on which of a node's cores: decode keeps some while it has sequences, prompts take what is left, and
a decode worker that may have more threads than it keeps uses what prompts do not.

A core that is kept, or used, is a byte of a file that the node's workers share, held by a lock on it. The kernel gives
locks back when a process dies, however it dies.
"""

from __future__ import annotations

import fcntl
import logging
import os
import struct
from pathlib import Path

log = logging.getLogger(__name__)

NAME = f"headway-cores-{os.getuid()}"
# Kinds of holding a core; each has bytes of its own.
KEPT, USED = 0, 1
_MOST = 1 << 16
# What a thread that yields adds to its nice value: beside a thread that does not it gets a tenth of a core.
NICE = 10
# struct flock of Linux on 64 bits: type, whence, start, length, pid.
_FLOCK = "hhqqi4x"


class Cores:
    """The cores of a node. Before `open` there is nobody else."""

    def __init__(self) -> None:
        self.ids = sorted(os.sched_getaffinity(0))
        self._file: int | None = None
        self._held: dict[int, list[int]] = {KEPT: [], USED: []}

    def open(self, folder: Path) -> None:
        """Share them with those who open the same folder; where that cannot be, stay alone."""
        self.close()
        try:
            self._file = os.open(folder / NAME, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        except OSError as error:
            log.warning("event=cores_not_shared reason=%s", error)

    def close(self) -> None:
        """Closing the file gives back what was held."""
        if self._file is not None:
            os.close(self._file)
        self._file, self._held = None, {KEPT: [], USED: []}

    def hold(self, kind: int, count: int) -> None:
        """Hold so many from now on, or as many as no other holds in the same way."""
        held = self._held[kind]
        if self._file is None or len(held) == count:
            return
        while len(held) > count:
            fcntl.lockf(self._file, fcntl.LOCK_UN, 1, held.pop())
        for byte in (kind * _MOST + core for core in self.ids):
            if len(held) == count:
                break
            if byte in held:
                continue
            try:
                fcntl.lockf(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB, 1, byte)
            except OSError:
                continue
            held.append(byte)

    def held_by_others(self, kind: int) -> int:
        """By other processes."""
        if self._file is None or not _is_held(self._file, kind * _MOST, _MOST):
            return 0
        return sum(_is_held(self._file, kind * _MOST + core, 1) for core in self.ids)


def _is_held(file: int, start: int, length: int) -> bool:
    """By another process, in part at least."""
    asked = struct.pack(_FLOCK, fcntl.F_WRLCK, os.SEEK_SET, start, length, 0)
    try:
        kind: int = struct.unpack(_FLOCK, fcntl.fcntl(file, fcntl.F_GETLK, asked))[0]
    except OSError:  # a file system without locks
        return False
    return kind != fcntl.F_UNLCK


class Share:
    """The threads that one worker's next forward computes with, at most `threads`.

    keep: cores that are its own as long as it has sequences. With 0 it yields: it takes what others do not keep, at
    least one core, and runs where nobody else wants to.
    """

    def __init__(self, cores: Cores, threads: int, keep: int) -> None:
        self.threads = threads
        self._cores = cores
        self._keep = min(keep, threads)

    @property
    def yields(self) -> bool:
        return self._keep == 0

    def attached(self, folder: Path) -> None:
        """The others are those who share this folder."""
        self._cores.open(folder)

    def begin(self) -> int:
        """Before a forward: its threads."""
        self._cores.hold(KEPT, self._keep)
        free = len(self._cores.ids) - self._cores.held_by_others(KEPT) - self._cores.held_by_others(USED)
        threads = max(1, self._keep, min(self.threads, free))
        if self.yields:
            self._cores.hold(USED, threads)
        return threads

    def idle(self) -> None:
        """There is nothing to compute."""
        self._cores.hold(KEPT, 0)
        self._cores.hold(USED, 0)


def yield_to_others() -> None:
    """The calling thread, and those that it starts, give way to others: their nice value rises by NICE.

    Not the kernel's idle class: where other processes fill the machine a prompt in it hardly moves (docs/engine.md).
    """
    try:
        os.nice(NICE)
    except OSError as error:
        log.warning("event=no_nice_value reason=%s", error)
