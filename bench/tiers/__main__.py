"""Time to the first token of a 2,000-token prompt whose prefix lies on another node, on disk, in Valkey or Redis, or in
a store that was killed and restarted, against computing it in the same run.

python -m bench.tiers [--quick] [--folder FOLDER]    (--quick: two repeats; FOLDER: on the disk to be measured)

The default model in float32, two threads a worker. All but the prompt's last block (16 tokens) comes from elsewhere;
the answers must be the same. `visible_transfer` is the time from the end of prefill until the other node's decode
worker may step, as a share of all the time during which the handoff's bytes were moving.
"""

from __future__ import annotations

import argparse
import shutil
import tempfile
from pathlib import Path
from typing import Any

import uvloop

from bench.report import finish, mark, median, progress
from bench.tiers.places import another_node, below_the_slab, warm_restart
from bench.tiers.speeds import server

DISK_BYTES = 2 << 30


def measure(folder: Path, repeats: int) -> dict[str, Any]:
    rows: dict[str, Any] = {}
    rows["another node"] = uvloop.run(another_node(folder, repeats))
    disk = ("--disk-dir", str(folder), "--disk-bytes", str(DISK_BYTES))
    rows["disk"] = uvloop.run(below_the_slab(folder, repeats, disk))
    binary = shutil.which("valkey-server") or shutil.which("redis-server")
    if binary is None:
        progress("neither valkey-server nor redis-server is installed: the remote tier is left out")
    else:
        with server(binary) as url:
            rows[Path(binary).name] = uvloop.run(below_the_slab(folder, repeats, ("--remote-url", url)))
    rows["warm restart"] = uvloop.run(warm_restart(folder, repeats))
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="two repeats")
    parser.add_argument("--folder", type=Path, default=None, help="folder on the disk to be measured")
    arguments = parser.parse_args()
    repeats = 2 if arguments.quick else 5
    with tempfile.TemporaryDirectory(dir=arguments.folder) as folder:
        rows = measure(Path(folder), repeats)
    medians = {place: {key: median(values) for key, values in row.items() if values} for place, row in rows.items()}
    node, disk, warm = medians["another node"], medians["disk"], medians["warm restart"]
    marks = {
        "remote_vs_recompute": mark(node["remote"] / node["recompute"], 0.1, "ratio", at_most=True),
        "disk_vs_recompute": mark(disk["below"] / disk["recompute"], 0.3, "ratio", at_most=True),
        "warm_restart_s": mark(warm["restart"], 2.0, "s", at_most=True),
        "warm_blocks_kept": mark(min(rows["warm restart"]["kept"]), 0.99, "share", at_most=False),
        "visible_transfer": mark(node["visible"], 0.15, "share", at_most=True),
    }
    finish("tiers", {"repeats": repeats, "medians": medians, "samples": rows, "marks": marks})


if __name__ == "__main__":
    main()
