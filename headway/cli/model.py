"""`headway model`."""

from __future__ import annotations

import argparse

from headway import models
from headway.engine.errors import ModelError


def add(arguments: argparse.Namespace) -> int:
    """Prints the model's folder; progress goes to stderr."""
    try:
        print(models.add(arguments.name_or_path, arguments.name))
    except ModelError as error:
        raise ValueError(str(error)) from None
    return 0


def list_models(_arguments: argparse.Namespace) -> int:
    for entry in models.list():
        print(entry)
    return 0
