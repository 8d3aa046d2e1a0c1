"""What an engine raises when a model cannot be served."""

from __future__ import annotations


class ModelError(Exception):
    """A model folder is broken, or the model needs what the engine cannot do exactly. The message is one sentence."""
