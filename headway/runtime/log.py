"""Logs: one line an event, key=value fields, no prompt text."""

from __future__ import annotations

import logging
import sys


def setup_logs(program: str, level: str = "info") -> None:
    """Log to stderr as `time program level message`."""
    logging.basicConfig(
        stream=sys.stderr,
        level=level.upper(),
        format=f"%(asctime)s {program} %(levelname)s %(message)s",
    )
