"""The `headway` command."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from headway.cli.parser import build_parser
from headway.client import HeadwayClientError
from headway.fleet import FleetError

INTERRUPTED = 130


def main(argv: Sequence[str] | None = None) -> int:
    """The exit status; what a user can put right is one line on stderr, never a traceback."""
    arguments = build_parser().parse_args(argv)
    try:
        status: int = arguments.run(arguments)
    except (HeadwayClientError, FleetError, LookupError, OSError, ValueError) as error:
        print(f"headway: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return INTERRUPTED
    return status
