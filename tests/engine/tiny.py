"""Tiny random models of every tested family, saved as model folders."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import transformers
from tokenizers import Tokenizer, models

from headway.engine.quiet import quiet

VOCABULARY = 199
CONTEXT = 256

_SHAPE: dict[str, Any] = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "vocab_size": VOCABULARY,
    "max_position_embeddings": CONTEXT,
    # Wide enough that logits differ: with the usual 0.02 every token is about as likely.
    "initializer_range": 0.25,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}

FAMILIES: dict[str, Any] = {
    "llama": lambda: transformers.LlamaConfig(**_SHAPE, num_key_value_heads=2),
    "qwen2": lambda: transformers.Qwen2Config(**_SHAPE, num_key_value_heads=2, sliding_window=None),
    "qwen3": lambda: transformers.Qwen3Config(**_SHAPE, num_key_value_heads=2, head_dim=32),
    "mistral": lambda: transformers.MistralConfig(**_SHAPE, num_key_value_heads=1, sliding_window=None, head_dim=16),
    "seed_oss": lambda: transformers.SeedOssConfig(**_SHAPE, num_key_value_heads=2, head_dim=16),
    # Of Llama's parts, and every other layer without positions.
    "smollm3": lambda: transformers.SmolLM3Config(**_SHAPE, num_key_value_heads=2, no_rope_layer_interval=2),
    "gpt_neox": lambda: transformers.GPTNeoXConfig(**_SHAPE, rotary_pct=0.25),
    # Of Llama's parts, with multipliers between them.
    "granite": lambda: transformers.GraniteConfig(
        **_SHAPE, num_key_value_heads=2, embedding_multiplier=3.0, residual_multiplier=0.6, logits_scaling=0.5
    ),
    "gemma": lambda: transformers.GemmaConfig(**_SHAPE, num_key_value_heads=1, head_dim=32),
}


def save_model(folder: Path, config: Any, seed: int = 0) -> Path:
    """Random float32 weights, a tokenizer and the configs, in `folder`."""
    torch.manual_seed(seed)
    with quiet():
        model = transformers.AutoModelForCausalLM.from_config(config)
        model.save_pretrained(str(folder))
    save_tokenizer(folder)
    return folder


def save_tokenizer(folder: Path) -> None:
    words = {f"w{at}": at for at in range(VOCABULARY)}
    Tokenizer(models.WordLevel(words, unk_token="w0")).save(str(folder / "tokenizer.json"))


def stock_model(folder: Path) -> Any:
    """transformers' own model of the folder, float32, its own attention."""
    with quiet():
        model = transformers.AutoModelForCausalLM.from_pretrained(str(folder), dtype=torch.float32)
    return model.eval()
