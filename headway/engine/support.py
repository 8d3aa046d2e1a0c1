"""Which models are refused: those that need more than full causal attention over K and V of one shape."""

from __future__ import annotations

from typing import Any

from headway.engine.errors import ModelError

# RoPE whose angles depend on nothing but the token's position.
STATIC_ROPE = frozenset({"default", "linear", "llama3", "yarn", "proportional"})
_FULL_LAYERS = frozenset({"full_attention", "attention"})
# Parts of config keys that tell of state besides K and V.
_RECURRENT = (
    "ssm",
    "mamba",
    "rwkv",
    "recurrent",
    "state_size",
    "lru_width",
    "time_step_rank",
    "linear_num_",
    "conv_l_",
)


def check_supported(config: Any) -> None:
    """`config` is transformers' config of the text model. Raises ModelError with the model type and the feature."""
    feature = _unsupported(config)
    if feature is not None:
        raise ModelError(
            f"models of type {config.model_type} with {feature} are not served: their tokens would be wrong"
        )


def active_window(config: Any) -> int | None:
    """The sliding window in tokens, where it is shorter than the context."""
    window = getattr(config, "sliding_window", None)
    if window is None or getattr(config, "use_sliding_window", True) is False:
        return None
    context = getattr(config, "max_position_embeddings", None)
    return window if context is None or window < context else None


def _unsupported(config: Any) -> str | None:
    if getattr(config, "is_encoder_decoder", False):
        return "an encoder beside the decoder"
    settings = {key: value for key, value in config.to_dict().items() if value not in (None, False, 0, 0.0, [], {})}
    for feature in (_attention(config, settings), _other_state(settings), _rope(settings), _layers(config, settings)):
        if feature is not None:
            return feature
    return "weights quantised by " + _method(settings) if "quantization_config" in settings else None


def _attention(config: Any, settings: dict[str, Any]) -> str | None:
    if "kv_lora_rank" in settings:
        return "multi-head latent attention (kv_lora_rank)"
    for key in settings:
        if "softcap" in key and not key.startswith("final_"):
            return f"soft-capped attention ({key})"
        if "sink" in key or config.model_type == "gpt_oss":
            return "attention sinks"
    if settings.get("alibi"):
        return "ALiBi position biases (alibi)"
    if "attention_chunk_size" in settings:
        return "attention within chunks (attention_chunk_size)"
    if "num_kv_shared_layers" in settings:
        return "layers that share K and V (num_kv_shared_layers)"
    if settings.get("use_bidirectional_attention"):
        return "attention in both directions (use_bidirectional_attention)"
    return None


def _other_state(settings: dict[str, Any]) -> str | None:
    for key in settings:
        if any(part in key for part in _RECURRENT):
            return f"recurrent or state-space layers ({key})"
    return None


def _rope(settings: dict[str, Any]) -> str | None:
    rope = settings.get("rope_parameters") or settings.get("rope_scaling") or {}
    nested = [value for value in rope.values() if isinstance(value, dict)]
    for parameters in nested or [rope]:
        kind = parameters.get("rope_type", parameters.get("type", "default"))
        if kind not in STATIC_ROPE:
            return f"{kind} RoPE, whose angles depend on more than a token's position"
    return None


def _layers(config: Any, settings: dict[str, Any]) -> str | None:
    kinds = set(settings.get("layer_types", ())) - _FULL_LAYERS
    window = active_window(config)
    if window is not None and (kinds or "layer_types" not in settings):
        return f"a sliding window of {window} tokens (sliding_window)"
    if kinds:
        return f"layers other than full attention ({', '.join(sorted(kinds))})"
    return None


def _method(settings: dict[str, Any]) -> str:
    return str(dict(settings["quantization_config"]).get("quant_method", "an unknown method"))
