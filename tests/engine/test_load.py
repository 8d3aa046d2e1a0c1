"""Loading: what cannot be served exactly is refused with its reason; broken folders too; the fingerprint."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from headway.engine import folder as model_folder
from headway.engine.attention import paged_attention
from headway.engine.folder import FINGERPRINT_FILE, check_folder, fingerprint
from headway.engine.load import ModelError, load_engine, read_model_config
from tests.engine.tiny import FAMILIES, save_model, save_tokenizer

_LLAMA = {"hidden_size": 32, "num_attention_heads": 4, "num_key_value_heads": 2, "num_hidden_layers": 2}


def rope(kind: str, **more: float) -> dict[str, Any]:
    return {"rope_parameters": {"rope_type": kind, "rope_theta": 1e4, "factor": 2.0, **more}}


REFUSED: dict[str, tuple[Callable[[], Any], str]] = {
    "mistral window": (lambda: transformers.MistralConfig(sliding_window=4096), "mistral .*sliding window of 4096"),
    "mistral by default": (lambda: transformers.MistralConfig(), "mistral .*sliding window of 4096"),
    "qwen2 window": (
        lambda: transformers.Qwen2Config(use_sliding_window=True, sliding_window=512, max_window_layers=0),
        "qwen2 .*sliding window of 512",
    ),
    "gemma2": (lambda: transformers.Gemma2Config(), "gemma2 .*soft-capped"),
    "gemma3": (lambda: transformers.Gemma3TextConfig(), "gemma3_text .*sliding window"),
    "gpt-oss": (lambda: transformers.GptOssConfig(), "gpt_oss .*attention sinks"),
    "deepseek": (lambda: transformers.DeepseekV3Config(), "deepseek_v3 .*latent attention"),
    "mamba": (lambda: transformers.MambaConfig(), "mamba .*state-space"),
    "jamba": (lambda: transformers.JambaConfig(), "jamba .*state-space"),
    "qwen3 next": (lambda: transformers.Qwen3NextConfig(), "qwen3_next .*(recurrent|layers other than full)"),
    "t5": (lambda: transformers.T5Config(), "t5 .*encoder"),
    "dynamic rope": (lambda: transformers.LlamaConfig(**_LLAMA, **rope("dynamic")), "llama .*dynamic RoPE"),
    "longrope": (
        lambda: transformers.LlamaConfig(
            **_LLAMA,
            **rope("longrope", short_factor=[1.0] * 4, long_factor=[2.0] * 4, original_max_position_embeddings=64),
        ),
        "llama .*longrope RoPE",
    ),
    "quantised": (
        lambda: transformers.LlamaConfig(**_LLAMA, quantization_config={"quant_method": "gptq", "bits": 4}),
        "llama .*quantised by gptq",
    ),
}


@pytest.mark.parametrize("name", sorted(REFUSED))
def test_refused_by_its_config(name: str, tmp_path: Path) -> None:
    """No weights are there: the config alone must decide, in one line."""
    make, words = REFUSED[name]
    make().save_pretrained(str(tmp_path))
    with pytest.raises(ModelError, match=words) as caught:
        load_engine(str(tmp_path))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "make",
    [
        lambda: transformers.LlamaConfig(**_LLAMA, **rope("linear")),
        lambda: transformers.LlamaConfig(
            **_LLAMA,
            **rope("llama3", low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=64),
        ),
        lambda: transformers.LlamaConfig(**_LLAMA, **rope("yarn", original_max_position_embeddings=64)),
        lambda: transformers.MistralConfig(sliding_window=4096, max_position_embeddings=4096),
        lambda: transformers.Qwen2Config(use_sliding_window=False, sliding_window=4096),
    ],
    ids=["linear rope", "llama3 rope", "yarn", "window as long as the context", "window switched off"],
)
def test_served(make: Callable[[], Any], tmp_path: Path) -> None:
    make().save_pretrained(str(tmp_path))
    assert getattr(read_model_config(tmp_path), "sliding_window", None) is None


_SMALL = {"vocab_size": 64, "bos_token_id": 1, "eos_token_id": 2, "initializer_range": 0.25}


def test_attention_of_another_kind_is_caught_by_the_proof(tmp_path: Path) -> None:
    """ALiBi, of which Bloom's config says nothing."""
    save_model(tmp_path, transformers.BloomConfig(hidden_size=32, n_layer=2, n_head=2, **_SMALL))
    change(tmp_path, max_position_embeddings=64)
    with pytest.raises(ModelError, match=r"bloom are not served: .* logits differ"):
        load_engine(str(tmp_path))


def test_attention_that_cannot_be_replaced_is_refused(tmp_path: Path) -> None:
    config = transformers.FalconConfig(hidden_size=32, num_hidden_layers=2, num_attention_heads=2, **_SMALL)
    save_model(tmp_path, config)
    with pytest.raises(ModelError, match="falcon are not served: their attention is fixed"):
        load_engine(str(tmp_path))


@pytest.mark.parametrize("more", [{}, {"scale_attn_by_inverse_layer_idx": True}])
def test_what_the_proof_holds_for_is_served(more: dict[str, Any], tmp_path: Path) -> None:
    """Learned positions are no special case."""
    save_model(tmp_path, transformers.GPT2Config(n_embd=32, n_layer=2, n_head=2, n_positions=64, **_SMALL, **more))
    assert load_engine(str(tmp_path)).card.context_tokens == 64


def test_a_wrong_attention_is_caught_by_the_proof(made: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from headway.engine import load

    def unscaled(*arguments: Any, **keywords: Any) -> Any:
        return paged_attention(*arguments, **keywords | {"scaling": 1.0})

    monkeypatch.setattr(load, "paged_attention", unscaled)
    monkeypatch.setattr(load, "read_decoder", lambda model, form: None)
    with pytest.raises(ModelError, match="logits differ"):
        load_engine(str(made))


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model(tmp_path_factory.mktemp("llama"), FAMILIES["llama"]())


@pytest.fixture
def folder(made: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(made, tmp_path / "model"))


def cut(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-100])


BROKEN: dict[str, tuple[Callable[[Path], object], str]] = {
    "no folder": (lambda f: shutil.rmtree(f), "no config.json"),
    "no config": (lambda f: (f / "config.json").unlink(), "no config.json"),
    "config is not JSON": (lambda f: (f / "config.json").write_text("{"), "cannot be read"),
    "config is not UTF-8": (lambda f: (f / "config.json").write_bytes(b"\xff\xff"), "cannot be read"),
    "config is a list": (lambda f: (f / "config.json").write_text("[]"), "not a JSON object"),
    "config without a type": (lambda f: (f / "config.json").write_text("{}"), "not valid"),
    "unknown type": (lambda f: (f / "config.json").write_text('{"model_type": "nonsense"}'), "type nonsense"),
    "no tokenizer": (lambda f: (f / "tokenizer.json").unlink(), "no tokenizer.json"),
    "no weights": (lambda f: (f / "model.safetensors").unlink(), "no model.safetensors"),
    "weights cut short": (lambda f: cut(f / "model.safetensors"), "not a whole safetensors file"),
    "weights are zeros": (lambda f: (f / "model.safetensors").write_bytes(bytes(4096)), "not a whole safetensors"),
    "weights are empty": (lambda f: (f / "model.safetensors").write_bytes(b""), "not a whole safetensors file"),
    "a shard is missing": (
        lambda f: (f / "model.safetensors.index.json").write_text('{"weight_map": {"a": "model-1.safetensors"}}'),
        "no model-1.safetensors",
    ),
    "a tensor is missing": (lambda f: drop(f, "model.norm.weight"), "missing keys: model.norm.weight"),
    "a tensor has another shape": (lambda f: change(f, vocab_size=177), "do not fit|cannot be loaded"),
    "the eos id is not JSON": (lambda f: (f / "generation_config.json").write_text("nope"), "cannot be"),
}


def drop(folder: Path, name: str) -> None:
    tensors = load_file(folder / "model.safetensors")
    del tensors[name]
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def change(folder: Path, **values: Any) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | values))


@pytest.mark.parametrize("name", sorted(BROKEN))
def test_broken_folders_are_refused(name: str, folder: Path) -> None:
    spoil, words = BROKEN[name]
    spoil(folder)
    with pytest.raises(ModelError, match=words) as caught:
        load_engine(str(folder))
    assert "\n" not in str(caught.value)


def test_bad_arguments(folder: Path) -> None:
    with pytest.raises(ValueError, match="dtype"):
        load_engine(str(folder), dtype="int3")
    with pytest.raises(ValueError, match="block_size"):
        load_engine(str(folder), block_size=0)


def test_eos_ids_come_from_the_generation_config(folder: Path) -> None:
    (folder / "generation_config.json").write_text('{"eos_token_id": [5, 2]}')
    assert load_engine(str(folder)).card.eos_token_ids == (5, 2)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_other_dtypes_load_and_run(folder: Path, dtype: str) -> None:
    engine = load_engine(str(folder), dtype=dtype, block_size=8, threads=1)
    assert engine.card.kv_format.slot_bytes == 8 * 3 * 2 * 2 * 16 * 2
    assert engine.card.kv_format.digest() != load_engine(str(folder)).card.kv_format.digest()


def test_fingerprint_follows_the_weights_and_the_config(folder: Path, tmp_path: Path) -> None:
    first = fingerprint(folder)
    assert len(first) == 16
    assert fingerprint(Path(shutil.copytree(folder, tmp_path / "copy"))) == first  # not of time or place
    weights = bytearray((folder / "model.safetensors").read_bytes())
    weights[-1] ^= 1
    (folder / "model.safetensors").write_bytes(weights)
    second = fingerprint(folder)
    assert second != first
    change(folder, rope_parameters={"rope_theta": 5e5, "rope_type": "default"})
    third = fingerprint(folder)
    assert third not in (first, second)
    change(folder, transformers_version="0")
    assert fingerprint(folder) == third


def test_fingerprint_is_kept_beside_the_weights(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = fingerprint(folder)
    with monkeypatch.context() as patch:
        patch.setattr(model_folder.hashlib, "file_digest", None)
        assert fingerprint(folder) == first
    (folder / FINGERPRINT_FILE).write_text("spoilt")
    assert fingerprint(folder) == first


def test_a_whole_folder_passes(folder: Path) -> None:
    check_folder(folder)
    (folder / "tokenizer.json").unlink()
    save_tokenizer(folder)
    check_folder(folder)


def test_threads_are_set_for_the_process(folder: Path) -> None:
    load_engine(str(folder), threads=1)
    assert torch.get_num_threads() == 1
