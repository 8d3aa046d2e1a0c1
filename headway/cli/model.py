"""`headway model`. What converts models is imported only here, so that the other commands start fast."""

from __future__ import annotations

import argparse


def add(arguments: argparse.Namespace) -> int:
    from headway import models

    print(models.add(arguments.name_or_path))
    return 0


def list_models(_arguments: argparse.Namespace) -> int:
    from headway import models

    for entry in models.list():
        print(entry)
    return 0
