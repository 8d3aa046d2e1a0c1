"""A model folder in Hugging Face format: is it whole, and what is its fingerprint. Needs no torch."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
from pathlib import Path
from typing import Any

from headway.engine.errors import ModelError

FINGERPRINT_FILE = ".headway-fingerprint.json"
_NOT_THE_MODEL = ("transformers_version", "_name_or_path", "_model_name_or_path")


def check_folder(folder: Path) -> None:
    """Raises ModelError unless config, tokenizer and complete safetensors files are there."""
    if not folder.is_dir():
        raise ModelError(f"{folder} is not a folder; give a model folder in Hugging Face format")
    read_config(folder)
    if not (folder / "tokenizer.json").is_file():
        raise ModelError(f"{folder} has no tokenizer.json; save the model's fast tokenizer beside its weights")
    for file in weight_files(folder):
        _check_safetensors(file)


def read_config(folder: Path) -> dict[str, Any]:
    """The parsed config.json. Raises ModelError."""
    if not (folder / "config.json").is_file():
        raise ModelError(f"{folder} has no config.json; give a model folder in Hugging Face format")
    return read_json(folder / "config.json")


def read_json(file: Path) -> dict[str, Any]:
    """A JSON object. Raises ModelError."""
    try:
        value = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ModelError(f"{file} cannot be read: {error}") from None
    if not isinstance(value, dict):
        raise ModelError(f"{file} is not a JSON object")
    return value


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files that hold the weights, sorted by name. Raises ModelError where one is missing."""
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        weight_map = read_json(index).get("weight_map")
        if not isinstance(weight_map, dict) or not all(isinstance(name, str) for name in weight_map.values()):
            raise ModelError(f"{index} has no weight_map")
        names = sorted(set(weight_map.values()))
    else:
        names = ["model.safetensors"]
    for name in names:
        if not (folder / name).is_file():
            raise ModelError(f"{folder} has no {name}; only weights in safetensors format are served")
    return [folder / name for name in names]


def tensors(folder: Path) -> dict[str, Any]:
    """The weights by name, each read when it is asked for (`[...]`), into memory of its own: of a file that is mapped,
    all stays as long as one tensor does, beside what is made of it.
    """
    from safetensors import safe_open

    found: dict[str, Any] = {}
    for file in weight_files(folder):
        opened: Any = safe_open(str(file), framework="pt", backend="pread")
        found |= {name: opened.get_slice(name) for name in list(opened.keys())}
    return found


def fingerprint(folder: Path) -> bytes:
    """16 bytes over the config and every byte of the weights; differs when the model differs.

    Hashing costs about a second a gigabyte, so the result is kept beside the weights (where the folder is writable)
    and holds while their names, sizes, inodes and times stay the same.
    """
    files = weight_files(folder)
    config = {key: value for key, value in read_config(folder).items() if key not in _NOT_THE_MODEL}
    state = [json.dumps(config, sort_keys=True), *(_state(file) for file in files)]
    kept = _kept_fingerprint(folder, state)
    if kept is not None:
        return kept
    digest = hashlib.blake2b(state[0].encode(), digest_size=16, person=b"headway-model")
    for file in files:
        with file.open("rb") as stream:
            digest.update(hashlib.file_digest(stream, hashlib.blake2b).digest())
    _keep_fingerprint(folder, state, digest.digest())
    return digest.digest()


def _state(file: Path) -> str:
    stat = file.stat()
    return f"{file.name} {stat.st_size} {stat.st_ino} {stat.st_mtime_ns} {stat.st_ctime_ns}"


def _kept_fingerprint(folder: Path, state: list[str]) -> bytes | None:
    try:
        kept = json.loads((folder / FINGERPRINT_FILE).read_text(encoding="utf-8"))
        value = bytes.fromhex(kept["fingerprint"])
        return value if kept["state"] == state and len(value) == 16 else None
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _keep_fingerprint(folder: Path, state: list[str], value: bytes) -> None:
    temporary = folder / f"{FINGERPRINT_FILE}.{os.getpid()}"
    with contextlib.suppress(OSError):
        temporary.write_text(json.dumps({"fingerprint": value.hex(), "state": state}), encoding="utf-8")
        temporary.replace(folder / FINGERPRINT_FILE)


def _check_safetensors(file: Path) -> None:
    """The header must be readable and the file as long as the header says."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(str(file), framework="numpy") as opened:
            names = list(opened.keys())
    except (SafetensorError, OSError) as error:
        raise ModelError(f"{file} is not a whole safetensors file: {error}") from None
    if not names:
        raise ModelError(f"{file} holds no weights")
