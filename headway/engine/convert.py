"""GGUF to a model folder in Hugging Face format, once, so that every later load takes a fraction of a second."""

from __future__ import annotations

import contextlib
import io
from collections.abc import Callable
from pathlib import Path

from headway.engine.errors import ModelError
from headway.engine.folder import check_folder
from headway.engine.quiet import quiet


def convert_gguf(source: Path, folder: Path, progress: Callable[[str], None]) -> None:
    """Write float32 safetensors, tokenizer.json and the chat template of a GGUF file into `folder` (it must exist).

    Takes about 20 seconds for 135 M parameters. Raises ModelError.
    """
    try:
        import gguf  # noqa: F401
    except ImportError:
        raise ModelError("reading GGUF files needs the gguf package: pip install 'headway[convert]'") from None
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    where = {"gguf_file": source.name, "local_files_only": True}
    progress(f"converting {source.name} to safetensors, float32")
    # The bar of the GGUF reader cannot be turned off.
    with quiet(), contextlib.redirect_stderr(io.StringIO()):
        try:
            model = AutoModelForCausalLM.from_pretrained(str(source.parent), dtype=torch.float32, **where)
            # A dequantised model is an ordinary one, but still carries marks that keep it from being saved.
            model.hf_quantizer = None
            if hasattr(model.config, "quantization_config"):
                del model.config.quantization_config
            model.save_pretrained(str(folder))
            AutoTokenizer.from_pretrained(str(source.parent), **where).save_pretrained(str(folder))
        except (OSError, ValueError, KeyError, RuntimeError, ImportError) as error:
            raise ModelError(f"{source.name} cannot be converted: {error}") from error
    for file in folder.iterdir():
        file.chmod(0o644)
    check_folder(folder)
