"""What a block costs below the slab: the disk tier with and without O_DIRECT, and the remote tier, side by side.

python -m bench.tiers.speeds [--folder FOLDER] [--quick]    (--quick: under a minute; FOLDER: on the disk to measure)

Blocks are those of the default model in float32 (16 tokens, 737,280 bytes). Reads are of blocks that the page cache
does not hold, in random order, into page-aligned memory, one at a time; every block is verified. The remote tier needs
`valkey-server` or `redis-server`, which is started on loopback, and is left out by name where there is none.
"""

from __future__ import annotations

import argparse
import os
import random
import shutil
import socket
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from bench.report import finish, percentile, progress
from headway.slab.host import PAGE, slot_stride
from services.kvstore.tiers.disk import DiskTier
from services.kvstore.tiers.file import BlockFile
from services.kvstore.tiers.layout import Layout
from services.kvstore.tiers.remote import RemoteTier

SLOT_BYTES = 737_280
DIGEST = b"bench.tiers".ljust(16)
VIEWS = 16
AHEAD = 32


class Slots:
    """A small slab: uint8 [VIEWS, stride], page-aligned, filled."""

    def __init__(self) -> None:
        stride = slot_stride(SLOT_BYTES)
        memory = np.empty(VIEWS * stride + PAGE, np.uint8)
        start = -memory.ctypes.data % PAGE
        self.slots = memory[start : start + VIEWS * stride].reshape(VIEWS, stride)
        self.slots[:] = np.random.default_rng(1).integers(0, 256, self.slots.shape, np.uint8)

    def __getitem__(self, at: int) -> memoryview:
        return memoryview(self.slots[at % VIEWS])


class Buffered(BlockFile):
    """Through the page cache, as where the file system refuses O_DIRECT."""

    def _open_direct(self) -> None:
        return None


def measure(tier: DiskTier | RemoteTier, blocks: int, forget: Callable[[], None]) -> dict[str, Any]:
    """GB/s and CPU seconds a GB of writing and reading `blocks` blocks.

    `forget` waits until all is on the disk and empties the page cache of it: "settled" counts that wait.
    """
    slots, keys = Slots(), [at.to_bytes(16, "big") for at in range(blocks)]
    size = blocks * SLOT_BYTES / 1e9
    started, cpu, put_s = time.perf_counter(), time.process_time(), []
    for at, key in enumerate(keys):
        before = time.perf_counter()
        accepted = tier.put(key, b"", slots[at][:SLOT_BYTES])
        put_s.append(time.perf_counter() - before)
        if not accepted or at % AHEAD == AHEAD - 1:
            tier.flush()
    tier.flush()
    write_s = time.perf_counter() - started
    forget()
    settled_s, write_cpu = time.perf_counter() - started, time.process_time() - cpu
    random.Random(2).shuffle(keys)
    started, cpu, get_s, good = time.perf_counter(), time.process_time(), [], 0
    for at, key in enumerate(keys):
        before = time.perf_counter()
        good += tier.get([key], [slots[at]])
        get_s.append(time.perf_counter() - before)
    read_s, read_cpu = time.perf_counter() - started, time.process_time() - cpu
    return {
        "blocks": blocks,
        "found": good,
        "write_gb_s": round(size / write_s, 2),
        "settled_gb_s": round(size / settled_s, 2),
        "write_cpu_s_per_gb": round(write_cpu / size, 2),
        "put_p99_us": round(percentile(put_s, 0.99) * 1e6),
        "read_gb_s": round(good * SLOT_BYTES / 1e9 / read_s, 2),
        "read_cpu_s_per_gb": round(read_cpu / size, 2),
        "read_p50_ms": round(percentile(get_s, 0.5) * 1e3, 2),
        "read_p99_ms": round(percentile(get_s, 0.99) * 1e3, 2),
    }


def disk(folder: Path, blocks: int, *, direct: bool) -> dict[str, Any]:
    path = folder / "bench.tiers"
    tier = DiskTier((BlockFile if direct else Buffered)(path, Layout(DIGEST, SLOT_BYTES, blocks)))

    def forget() -> None:
        descriptor = os.open(path, os.O_RDWR)
        os.fsync(descriptor)
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(descriptor)

    try:
        return {"direct": tier.direct, **measure(tier, blocks, forget)}
    finally:
        tier.close()
        path.unlink()


@contextmanager
def server(binary: str) -> Iterator[str]:
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = probe.getsockname()[1]
    with tempfile.TemporaryDirectory() as folder:
        command = [binary, "--port", str(port), "--bind", "127.0.0.1", "--save", "", "--dir", folder]
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
        try:
            yield f"redis://127.0.0.1:{port}"
        finally:
            process.terminate()
            process.wait()


def remote(binary: str, blocks: int) -> dict[str, Any]:
    with server(binary) as url:
        tier = RemoteTier.open(url, SLOT_BYTES, DIGEST)
        deadline = time.monotonic() + 10
        while not tier.up and time.monotonic() < deadline:
            time.sleep(0.01)
        try:
            return measure(tier, blocks, lambda: None)
        finally:
            tier.close()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, default=Path(), help="folder on the disk to be measured")
    parser.add_argument("--quick", action="store_true", help="a quarter of the blocks, once")
    arguments = parser.parse_args()
    blocks, rounds = (350, 1) if arguments.quick else (1400, 3)
    rows: list[dict[str, Any]] = []
    for turn in range(rounds):
        for direct in (True, False):
            progress(f"round {turn + 1} of {rounds}: disk, {'O_DIRECT' if direct else 'page cache'}")
            rows.append({"tier": "disk", **disk(arguments.folder, blocks, direct=direct)})
    binary = shutil.which("valkey-server") or shutil.which("redis-server")
    if binary is None:
        progress("remote: neither valkey-server nor redis-server is installed, skipped")
    for turn in range(rounds if binary else 0):
        progress(f"round {turn + 1} of {rounds}: remote, {Path(binary or '').name}")
        rows.append({"tier": "remote", "server": Path(binary or "").name, **remote(binary or "", blocks // 2)})
    for row in rows:
        print(row)
    finish("tier-speeds", {"slot_bytes": SLOT_BYTES, "rows": rows, "marks": {}})


if __name__ == "__main__":
    main()
