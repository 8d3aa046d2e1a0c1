"""From a model folder to an engine: refuse what cannot be served exactly, load, and prove it on a few tokens."""

from __future__ import annotations

import hashlib
import logging
from pathlib import Path
from typing import Any

import torch
from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, AttentionInterface, AutoConfig

from headway.core.model import DTYPE_BYTES, KvFormat, LayerGroup, ModelCard
from headway.engine.attention import NAME, paged_attention
from headway.engine.contract import Engine
from headway.engine.errors import ModelError
from headway.engine.folder import check_folder, fingerprint, read_json, tensors
from headway.engine.lean import read_decoder
from headway.engine.linear import change_linears, form_of
from headway.engine.memory import without_holes
from headway.engine.model import TorchEngine
from headway.engine.paged import Reader
from headway.engine.paged_proof import choose_reader
from headway.engine.pages import ORDER, SCALE, SCALED
from headway.engine.plan_device import GATHER
from headway.engine.proof import expected_logits, prove, tolerance
from headway.engine.quantised import quantised, round_linears
from headway.engine.quiet import quiet
from headway.engine.stock import StockModel
from headway.engine.support import active_window, check_supported

log = logging.getLogger(__name__)

__all__ = ["ModelError", "load_engine", "read_model_config"]

DTYPES = ("float32", "bfloat16", "float16")
WEIGHTS = ("float", "bfloat16", "int8", "int4")
KV_DTYPES = (*DTYPES, "int8")


@without_holes()
def load_engine(
    path: str,
    *,
    dtype: str = "float32",
    weights: str = "float",
    kv_dtype: str | None = None,
    block_size: int = 16,
    threads: int | None = None,
    device: str = "cpu",
    copy_bytes: int = 0,
) -> Engine:
    """The engine of the model folder `path`, with its weights on `device` ("cpu", "cuda:0"), ready for bind().

    weights: "float" (as `dtype` says), or how many bits linear layers are rounded to; on a CPU, of a float32 model.
    kv_dtype: of K and V; None: `dtype`. threads: of torch, in this whole process; None leaves them. copy_bytes: see
    TorchEngine. Raises ModelError where the folder is broken, the model cannot be served as asked, or the device has no
    room for it, ValueError on a bad dtype, weights or block size.
    """
    kv_dtype = kv_dtype or dtype
    _check(dtype, weights, kv_dtype, block_size, device)
    if threads is not None:
        torch.set_num_threads(threads)
    folder = Path(path).absolute()
    config = read_model_config(folder)
    check_folder(folder)
    AttentionInterface.register(NAME, paged_attention)
    card = _card(folder, config, kv_format_of(config, kv_dtype, block_size), _variant(dtype, weights, kv_dtype))
    form = form_of(getattr(torch, dtype)) if weights == "float" else quantised(weights)
    reader = _reader(config, card, device)
    model = _load_model(folder, config, dtype, weights, device)
    expected, within = expected_logits(model, card), tolerance(dtype, weights, kv_dtype)
    if (decoder := read_decoder(model, form)) is not None:
        engine = TorchEngine(decoder, card, torch.device(device), copy_bytes, reader)
        if _proven(engine, expected, within, config.model_type):
            return engine
        # Something beside the common shape, so its own modules. The weights went into the decoder, which goes first.
        del model, decoder, engine
        model = _load_model(folder, config, dtype, weights, device)
    change_linears(model, form)
    engine = TorchEngine(StockModel(model), card, torch.device(device), copy_bytes, reader)
    prove(engine, expected, within, config.model_type)
    return engine


def _check(dtype: str, weights: str, kv_dtype: str, block_size: int, device: str) -> None:
    for name, value, allowed in (
        ("dtype", dtype, DTYPES),
        ("weights", weights, WEIGHTS),
        ("kv_dtype", kv_dtype, KV_DTYPES),
    ):
        if value not in allowed:
            raise ValueError(f"{name} is {value}; it must be one of {', '.join(allowed)}")
    if weights != "float" and (device != "cpu" or dtype != "float32"):
        raise ValueError(f"weights is {weights}; that is for float32 models on a CPU: set weights to float")
    if not 1 <= block_size <= 1024:
        raise ValueError(f"block_size is {block_size}; it must be 1 to 1024 tokens")


def _variant(dtype: str, weights: str, kv_dtype: str) -> str:
    """What makes K and V other numbers than those of the same model and format elsewhere."""
    return "" if weights == "float" and kv_dtype == dtype else f"{dtype} {weights}"


def _proven(engine: TorchEngine, expected: torch.Tensor, within: float, kind: str) -> bool:
    try:
        prove(engine, expected, within, kind)
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
            model, info = MODEL_FOR_CAUSAL_LM_MAPPING[type(config)].from_pretrained(
                None,
                config=config,
                state_dict=tensors(folder),
                dtype=getattr(torch, dtype),
                attn_implementation=NAME,
                local_files_only=True,
                trust_remote_code=False,
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


def _load_model(folder: Path, config: Any, dtype: str, weights: str, device: str) -> Any:
    """The model with its weights on the device, rounded."""
    model = _load_weights(folder, config, dtype)
    if weights != "float":
        round_linears(model, weights)
    try:
        return model.to(device)
    except (RuntimeError, AssertionError) as error:  # the latter where torch was built without CUDA
        raise ModelError(f"the weights cannot be put on {device}: {_first(error)}") from None


def _reader(config: Any, card: ModelCard, device: str) -> Reader:
    """How attention reads the slab; a CPU has plans of its own."""
    if device == "cpu":
        return GATHER
    return choose_reader(card.kv_format, config.num_attention_heads, torch.device(device)).reader


def _card(folder: Path, config: Any, kv_format: KvFormat, variant: str) -> ModelCard:
    context = getattr(config, "max_position_embeddings", None)
    if not context:
        raise ModelError(f"the config of type {config.model_type} in {folder} does not say how long the context is")
    return ModelCard(
        name=folder.name,
        fingerprint=_fingerprint(folder, variant),
        context_tokens=context,
        vocab_size=config.vocab_size,
        eos_token_ids=_eos(folder, config),
        kv_format=kv_format,
        tokenizer_path=str(folder),
    )


def _fingerprint(folder: Path, variant: str) -> bytes:
    whole = fingerprint(folder)
    return hashlib.blake2b(whole + variant.encode(), digest_size=16).digest() if variant else whole


def kv_format_of(config: Any, dtype: str, block_size: int) -> KvFormat:
    """How K and V of a model with this (transformers) config lie in a slot."""
    layers, heads = config.num_hidden_layers, config.num_attention_heads
    kv_heads = getattr(config, "num_key_value_heads", None) or heads
    dim = getattr(config, "head_dim", None) or config.hidden_size // heads
    head_bytes, order = dim * DTYPE_BYTES[dtype], ORDER
    if dtype == "int8":
        head_bytes, order = head_bytes + SCALE.itemsize, SCALED
    return KvFormat(block_size, dtype, order, (LayerGroup(layers, kv_heads, dim, layers * 2 * kv_heads * head_bytes),))


def _eos(folder: Path, config: Any) -> tuple[int, ...]:
    """From generation_config.json, as generate() takes them, else from the config."""
    file = folder / "generation_config.json"
    ids = read_json(file).get("eos_token_id") if file.is_file() else None
    if ids is None:
        ids = getattr(config, "eos_token_id", None)
    return () if ids is None else (ids,) if isinstance(ids, int) else tuple(ids)


def _first(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
