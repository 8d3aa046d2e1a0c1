"""What greedy output must equal: transformers' generate in float32, one prompt at a time, of the default model.

Results are kept in pytest's cache, by the model's fingerprint, so that only a first run pays for them.
"""

from __future__ import annotations

import functools
import hashlib
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from headway.core.model import ModelCard
from headway.engine.folder import fingerprint
from headway.models import DEFAULT, resolve
from headway.text.tokenizer import load_tokenizer

NEW_TOKENS = 64
# Two tokens whose logits lie this close may change places by rounding alone.
EXCUSED_MARGIN = 1e-3
LENGTHS = (1, 2, 3, 5, 8, 13, 15, 16, 17, 24, 31, 32, 33, 48, 63, 65, 100, 128, 129, 257, 400, 513, 1000, 2000)

_ROOT = Path(__file__).parent.parent
_CACHE = _ROOT / ".pytest_cache" / "headway-reference"
_QUESTIONS = (
    "What is the capital of France?",
    "Write a short poem about the sea.",
    "How many legs do three spiders have? Explain step by step.",
    "Name five fruits and their colours.",
)


def model_folder() -> Path:
    """Raises LookupError where the default model has not been added."""
    return resolve(DEFAULT)


@functools.cache
def prompts() -> tuple[tuple[int, ...], ...]:
    """24 prompts of 1 to 2,000 token ids, lengths as in LENGTHS; four are chats, the others run through the LICENSE."""
    tokenizer = load_tokenizer(str(model_folder()))
    text = tokenizer.encode((_ROOT / "LICENSE").read_text(encoding="utf-8"))
    chats = {len(LENGTHS) // 2 + at: question for at, question in enumerate(_QUESTIONS)}
    result = []
    for at, length in enumerate(LENGTHS):
        start = 37 * at % (len(text) - length)
        ids = text[start : start + length]
        if at in chats:
            chat = tokenizer.encode_chat([("user", chats[at])])
            ids = [*text[:length], *chat][-max(length, len(chat)) :]
        result.append(tuple(ids))
    return tuple(result)


def reference(prompt: Sequence[int], new_tokens: int = NEW_TOKENS) -> tuple[list[int], list[float]]:
    """(tokens, top-2 logit margin of each); generation runs on past the end-of-sequence token."""
    import torch
    import transformers

    versions = f"{transformers.__version__} {torch.__version__}".encode()
    name = hashlib.blake2b(repr((tuple(prompt), new_tokens)).encode() + versions + _fingerprint(), digest_size=16)
    file = _CACHE / f"{name.hexdigest()}.json"
    if file.is_file():
        kept = json.loads(file.read_text())
        return kept["tokens"], kept["margins"]
    tokens, margins = generate(_model(), prompt, new_tokens)
    _CACHE.mkdir(parents=True, exist_ok=True)
    temporary = file.with_suffix(f".{os.getpid()}")
    temporary.write_text(json.dumps({"tokens": tokens, "margins": margins}))
    temporary.replace(file)
    return tokens, margins


def generate(model: Any, prompt: Sequence[int], new_tokens: int) -> tuple[list[int], list[float]]:
    """Greedy tokens of transformers' generate and the margin between the two likeliest at each."""
    import torch

    from headway.engine.quiet import quiet

    model.generation_config.eos_token_id = None
    ids = torch.tensor([list(prompt)])
    with torch.inference_mode(), quiet():
        done = model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            do_sample=False,
            max_new_tokens=new_tokens,
            pad_token_id=0,
            return_dict_in_generate=True,
            output_logits=True,
        )
    top = torch.stack([row[0] for row in done.logits]).float().topk(2, dim=-1).values
    return done.sequences[0, len(prompt) :].tolist(), (top[:, 0] - top[:, 1]).tolist()


def log_probabilities(prompt: Sequence[int], tokens: Sequence[int]) -> Any:
    """float64 [tokens, vocabulary]: before each token of an answer, by transformers' own model."""
    import torch

    from headway.engine.quiet import quiet

    with torch.inference_mode(), quiet():
        logits = _model()(torch.tensor([[*prompt, *tokens]])).logits[0, len(prompt) - 1 : -1]
    return logits.double().log_softmax(-1)


def first_divergence(expected: Sequence[int], found: Sequence[int]) -> int | None:
    """The first output index at which the two differ."""
    for at, (ours, theirs) in enumerate(zip(found, expected, strict=False)):
        if ours != theirs:
            return at
    return None if len(expected) == len(found) else min(len(expected), len(found))


def check_equal(found: Sequence[Sequence[int]], wanted: Sequence[tuple[list[int], list[float]]]) -> list[str]:
    """Asserts equality with `wanted` (of `reference`), but for one prompt at a near tie; returns what was excused."""
    excused = []
    for at, (ours, (tokens, margins)) in enumerate(zip(found, wanted, strict=True)):
        place = first_divergence(tokens, ours)
        if place is not None:
            assert place < len(margins), f"prompt {at} has {len(ours)} tokens, not {len(tokens)}"
            line = f"prompt {at} diverges at token {place}, where the top-2 margin is {margins[place]:.2g}"
            assert margins[place] < EXCUSED_MARGIN, line
            excused.append(line)
    assert len(excused) <= 1, excused
    return excused


def until_eos(tokens: Sequence[int], card: ModelCard) -> list[int]:
    """What a server sends of a reference: everything up to and including the first end-of-sequence token."""
    for at, token in enumerate(tokens):
        if token in card.eos_token_ids:
            return list(tokens[: at + 1])
    return list(tokens)


@functools.cache
def _fingerprint() -> bytes:
    return fingerprint(model_folder())


@functools.cache
def _model() -> Any:
    import torch
    from transformers import AutoModelForCausalLM

    from headway.engine.quiet import quiet

    with quiet():
        return AutoModelForCausalLM.from_pretrained(
            str(model_folder()), dtype=torch.float32, local_files_only=True
        ).eval()
