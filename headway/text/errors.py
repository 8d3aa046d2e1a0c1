"""The one error of this package."""

from __future__ import annotations


class TextError(Exception):
    """A sentence that says what is wrong with a model's tokenizer files, or with the text given to them."""
