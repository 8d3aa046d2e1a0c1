"""An engine in a process of its own, as a worker holds one, and what memory that takes; prints one JSON object.

python -m tests.engine.held engine FOLDER SMALL WEIGHTS KV_DTYPE    loads, prefills prompts and decodes them together
python -m tests.engine.held torch FOLDER DTYPE                      transformers' own forward of the longest pack

All in bytes, of the kernel's account of this process; peaks are since `clear_refs`.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import torch
from transformers import AutoModelForCausalLM

from headway.core.sampling import Sampling
from headway.engine.contract import Chunk, Draw
from headway.engine.load import load_engine
from headway.engine.memory import give_back
from headway.engine.model import TorchEngine

SEQUENCES, PROMPT, CHUNK, NEW = 8, 320, 256, 40


def status(name: str) -> int:
    text = Path("/proc/self/status").read_text()
    return int(text.split(f"{name}:")[1].split()[0]) * 1024


def start_peak() -> int:
    """What is resident now; VmHWM counts from here."""
    give_back()
    Path("/proc/self/clear_refs").write_text("5")
    return status("VmRSS")


def engine(folder: str, small: str, weights: str, kv_dtype: str) -> dict[str, int]:
    """process: what is there once a tiny model (`small`) has been loaded: the interpreter and its libraries, of which
    transformers imports some with the first model.
    """
    load_engine(small, weights=weights, kv_dtype=kv_dtype, threads=1)
    process = start_peak()
    made = load_engine(folder, weights=weights, kv_dtype=kv_dtype, threads=1)
    assert isinstance(made, TorchEngine)
    loading = status("VmHWM")
    loaded = start_peak()
    kv_format = made.card.kv_format
    blocks = -(-(PROMPT + NEW) // kv_format.block_size)
    slab = np.zeros((SEQUENCES * blocks, kv_format.slot_bytes), np.uint8)
    slab[:] = 0
    made.bind(slab)
    tables = np.arange(SEQUENCES * blocks, dtype=np.int32).reshape(SEQUENCES, blocks)
    draw = Draw(Sampling(), 0)
    for name, table in enumerate(tables):
        for at in range(0, PROMPT, CHUNK):
            tokens = [3 + name] * min(CHUNK, PROMPT - at)
            made.forward([Chunk(tokens, at, table, draw if at + len(tokens) == PROMPT else None, name)])
    for at in range(PROMPT, PROMPT + NEW):
        made.forward([Chunk([5 + name], at, table, draw, name) for name, table in enumerate(tables)])
    assert made._copies is not None
    return {
        "process": process,
        "loading_peak": loading,
        "loaded": loaded,
        "slab": slab.nbytes,
        "copies": made._copies.bytes,
        "peak": status("VmHWM"),
    }


@torch.inference_mode()
def plain(folder: str, dtype: str) -> dict[str, int]:
    """What its forward takes above what was there before: activations, as torch computes them."""
    torch.set_num_threads(1)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=getattr(torch, dtype))
    ids = torch.full((1, CHUNK), 3)
    # The first makes what stays: pages of the file, and the library's own.
    for _ in range(2):
        before = start_peak()
        model(input_ids=ids, use_cache=False, logits_to_keep=1)
    return {"activations": status("VmHWM") - before}


def main() -> None:
    kind, *arguments = sys.argv[1:]
    print(json.dumps(engine(*arguments) if kind == "engine" else plain(*arguments)))


if __name__ == "__main__":
    main()
