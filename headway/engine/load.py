"""From a model folder to an engine: refuse what cannot be served exactly, load, and prove it on a few tokens."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import torch
from transformers import AttentionInterface, AutoConfig, AutoModelForCausalLM

from headway.core.model import DTYPE_BYTES, KvFormat, LayerGroup, ModelCard
from headway.engine.attention import NAME, paged_attention
from headway.engine.contract import Engine
from headway.engine.errors import ModelError
from headway.engine.folder import check_folder, fingerprint, read_json
from headway.engine.lean import read_decoder
from headway.engine.linear import pack_linears
from headway.engine.model import TorchEngine
from headway.engine.pages import ORDER
from headway.engine.proof import expected_logits, prove
from headway.engine.quiet import quiet
from headway.engine.stock import StockModel
from headway.engine.support import active_window, check_supported

log = logging.getLogger(__name__)

__all__ = ["ModelError", "load_engine", "read_model_config"]

DTYPES = ("float32", "bfloat16", "float16")


def load_engine(
    path: str, *, dtype: str = "float32", block_size: int = 16, threads: int | None = None, device: str = "cpu"
) -> Engine:
    """The engine of the model folder `path`, with its weights on `device` ("cpu", "cuda:0"), ready for bind().

    threads: of torch, in this whole process; None leaves them. Raises ModelError where the folder is broken, the model
    cannot be served exactly, or the device has no room for it, ValueError on a bad dtype or block size.
    """
    if dtype not in DTYPES:
        raise ValueError(f"dtype is {dtype}; it must be one of {', '.join(DTYPES)}")
    if not 1 <= block_size <= 1024:
        raise ValueError(f"block_size is {block_size}; it must be 1 to 1024 tokens")
    if threads is not None:
        torch.set_num_threads(threads)
    folder = Path(path).absolute()
    config = read_model_config(folder)
    check_folder(folder)
    AttentionInterface.register(NAME, paged_attention)
    card = _card(folder, config, dtype, block_size)
    model = _moved(_load_weights(folder, config, dtype), device)
    expected, kind = expected_logits(model, card), config.model_type
    if (decoder := read_decoder(model)) is not None:
        engine = TorchEngine(decoder, card, torch.device(device))
        if _proven(engine, expected, kind):
            return engine
        # Something beside the common shape, so its own modules. The weights went into the decoder, which goes first.
        del model, decoder, engine
        model = _moved(_load_weights(folder, config, dtype), device)
    if device == "cpu" and dtype == "float32":
        pack_linears(model)
    engine = TorchEngine(StockModel(model), card, torch.device(device))
    prove(engine, expected, kind)
    return engine


def _proven(engine: TorchEngine, expected: torch.Tensor, kind: str) -> bool:
    try:
        prove(engine, expected, kind)
    except ModelError as error:
        log.info("event=stock_modules type=%s reason=%s", kind, error)
        return False
    return True


def read_model_config(folder: Path) -> Any:
    """transformers' config of the text model, supported. Raises ModelError."""
    if not (folder / "config.json").is_file():
        raise ModelError(f"{folder} has no config.json; give a model folder in Hugging Face format")
    model_type = read_json(folder / "config.json").get("model_type")
    with quiet():
        try:
            config = AutoConfig.from_pretrained(str(folder), local_files_only=True, trust_remote_code=False)
        except Exception as error:  # configs raise whatever their validation meets
            raise ModelError(f"the config of type {model_type} in {folder} is not valid: {_first(error)}") from None
        if config.get_text_config() is not config:
            raise ModelError(f"models of type {model_type} with several modalities are not served")
        check_supported(config)
    if active_window(config) is None and getattr(config, "sliding_window", None) is not None:
        config.sliding_window = None  # never reached within the context
    return config


def _load_weights(folder: Path, config: Any, dtype: str) -> Any:
    with quiet():
        try:
            model, info = AutoModelForCausalLM.from_pretrained(
                str(folder),
                config=config,
                dtype=getattr(torch, dtype),
                attn_implementation=NAME,
                local_files_only=True,
                trust_remote_code=False,
                use_safetensors=True,
                output_loading_info=True,
            )
        except Exception as error:  # a broken folder shows in many ways
            if NAME in str(error):
                raise ModelError(
                    f"models of type {config.model_type} are not served: their attention is fixed"
                ) from None
            raise ModelError(f"the model in {folder} cannot be loaded: {_first(error)}") from error
    # What the files lack would be random numbers.
    for problem in ("missing_keys", "mismatched_keys", "error_msgs"):
        if info.get(problem):
            named = ", ".join(sorted(str(key) for key in info[problem])[:3])
            raise ModelError(f"the weights in {folder} do not fit the config: {problem.replace('_', ' ')}: {named}")
    return model.eval().requires_grad_(False)


def _moved(model: Any, device: str) -> Any:
    """The model with its weights on the device."""
    try:
        return model.to(device)
    except (RuntimeError, AssertionError) as error:  # the latter where torch was built without CUDA
        raise ModelError(f"the weights cannot be put on {device}: {_first(error)}") from None


def _card(folder: Path, config: Any, dtype: str, block_size: int) -> ModelCard:
    context = getattr(config, "max_position_embeddings", None)
    if not context:
        raise ModelError(f"the config of type {config.model_type} in {folder} does not say how long the context is")
    return ModelCard(
        name=folder.name,
        fingerprint=fingerprint(folder),
        context_tokens=context,
        vocab_size=config.vocab_size,
        eos_token_ids=_eos(folder, config),
        kv_format=kv_format_of(config, dtype, block_size),
        tokenizer_path=str(folder),
    )


def kv_format_of(config: Any, dtype: str, block_size: int) -> KvFormat:
    """How K and V of a model with this (transformers) config lie in a slot."""
    layers, heads = config.num_hidden_layers, config.num_attention_heads
    kv_heads = getattr(config, "num_key_value_heads", None) or heads
    dim = getattr(config, "head_dim", None) or config.hidden_size // heads
    group = LayerGroup(layers, kv_heads, dim, layers * 2 * kv_heads * dim * DTYPE_BYTES[dtype])
    return KvFormat(block_size, dtype, ORDER, (group,))


def _eos(folder: Path, config: Any) -> tuple[int, ...]:
    """From generation_config.json, as generate() takes them, else from the config."""
    file = folder / "generation_config.json"
    ids = read_json(file).get("eos_token_id") if file.is_file() else None
    if ids is None:
        ids = getattr(config, "eos_token_id", None)
    return () if ids is None else (ids,) if isinstance(ids, int) else tuple(ids)


def _first(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
