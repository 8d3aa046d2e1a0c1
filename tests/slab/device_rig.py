"""Another process that opens a slab: reads from and writes to it as it is told, one Python expression a line."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

from headway.slab.device import DeviceSegment

ROOT = Path(__file__).resolve().parents[2]
OPENER = """
import sys
from headway.slab.device import DeviceMapping, open_device
name, handle, size, slots, stride = sys.argv[1:]
mapping = DeviceMapping(open_device(name), bytes.fromhex(handle), int(size))
slab = mapping.view(int(slots), int(stride))
print("open", flush=True)
for line in sys.stdin:
    exec(line)
    print("done", flush=True)
"""


class Opener:
    """The other process. `run` raises AssertionError where it did not get through the line."""

    def __init__(self, process: subprocess.Popen[str]) -> None:
        self._process = process

    @property
    def pid(self) -> int:
        return self._process.pid

    def run(self, line: str) -> None:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(line + "\n")
        self._process.stdin.flush()
        assert self._process.stdout.readline() == "done\n", line


@contextlib.contextmanager
def opener(segment: DeviceSegment, slots: int, stride: int) -> Iterator[Opener]:
    """A process that has the segment open as `slab`, uint8 [slots, stride]."""
    arguments = [str(segment.device), segment.handle.hex(), str(segment.size), str(slots), str(stride)]
    process = subprocess.Popen(
        [sys.executable, "-c", OPENER, *arguments],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=os.environ | {"PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    with process:
        try:
            assert process.stdout is not None
            assert process.stdout.readline() == "open\n"
            yield Opener(process)
        finally:
            process.kill()
