"""Slab to engine view: greedy tokens over the mapped slab against transformers' own generate, float32, same weights."""

from __future__ import annotations

import itertools
from typing import Any

from bench.gpu_check.model import Running, Tables, blocks, engine_of, how_of, prompt_of, random_model, slab_bytes, step
from bench.gpu_check.pair import Talk, child, device_of
from bench.gpu_check.sizes import Sizes
from headway.slab.device import DeviceMapping, DeviceSegment

DTYPE = "float32"
# Two tokens whose logits lie this close may change places by rounding alone.
NEAR_TIE = 1e-3


def run(name: str, sizes: Sizes) -> dict[str, Any]:
    slots = sum(blocks(length + sizes.new) for length in sizes.prompts)
    segment = DeviceSegment(device_of(name), slab_bytes(sizes, DTYPE, slots))
    try:
        left = segment.left
        with child(compare, segment, sizes, slots) as engine:
            found: dict[str, Any] = engine.hear()
    finally:
        segment.remove()
    return {"slab_bytes": segment.size, "left_for_weights_bytes": left, **found}


def compare(talk: Talk, mapping: DeviceMapping, sizes: Sizes, slots: int) -> None:
    model = random_model(sizes, DTYPE, mapping.device)
    parameters = sum(parameter.numel() for parameter in model.parameters())
    prompts = [prompt_of(length, sizes.shape["vocab_size"], length) for length in sizes.prompts]
    wanted = [_generate(model, prompt, sizes.new) for prompt in prompts]
    engine = engine_of(model, sizes, DTYPE, mapping)
    ways = {"whole": itertools.repeat(1 << 30), "chunks": itertools.cycle((100, 7, 250))}
    outputs = {}
    for way, limits in ways.items():
        tables = Tables(slots)
        running = [Running(list(prompt), tables.take(len(prompt) + sizes.new)) for prompt in prompts]
        while active := [sequence for sequence in running if len(sequence.outputs) < sizes.new]:
            step(engine, active, next(limits))
        outputs[way] = [sequence.outputs for sequence in running]
    how = how_of(engine)
    engine.unbind()
    differences = [line for way, found in outputs.items() for line in _differences(way, found, wanted)]
    talk.answer(
        {
            "dtype": DTYPE,
            "parameters": parameters,
            **how,
            "prompts": list(sizes.prompts),
            "new_tokens": sizes.new,
            "equal": not any(not difference["near_tie"] for difference in differences),
            "differences": differences,
            "distinct_tokens": len({token for tokens, _ in wanted for token in tokens}),
            "smallest_margin": min(min(margins) for _, margins in wanted),
        }
    )


def _generate(model: Any, prompt: list[int], new: int) -> tuple[list[int], list[float]]:
    """Greedy tokens of transformers, and the margin between the two likeliest at each."""
    import torch

    from headway.engine.attention import NAME
    from headway.engine.quiet import quiet

    ids = torch.tensor([prompt], device=model.device)
    with torch.inference_mode(), quiet():
        model.set_attn_implementation("eager")
        done = model.generate(
            ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=new, pad_token_id=0,
            return_dict_in_generate=True, output_logits=True,
        )  # fmt: skip
        model.set_attn_implementation(NAME)
    top = torch.stack([row[0] for row in done.logits]).float().topk(2, dim=-1).values
    return done.sequences[0, len(prompt) :].tolist(), (top[:, 0] - top[:, 1]).tolist()


def _differences(way: str, found: list[list[int]], wanted: list[tuple[list[int], list[float]]]) -> list[dict[str, Any]]:
    """Where each prompt's tokens part from the reference's, if they do."""
    out = []
    for prompt, (ours, (theirs, margins)) in enumerate(zip(found, wanted, strict=True)):
        at = next((at for at, pair in enumerate(zip(ours, theirs, strict=True)) if pair[0] != pair[1]), None)
        if at is not None:
            near = margins[at] < NEAR_TIE
            out.append({"way": way, "prompt": prompt, "token": at, "margin": margins[at], "near_tie": near})
    return out
