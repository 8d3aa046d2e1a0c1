"""Which peers can run: one that is not installed is skipped by name with the reason, never guessed."""

from __future__ import annotations

import sys
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

from bench.transfer.contract import SkipError
from bench.transfer.peers import version_of

# Peer → module. The first runs with our python from our model folder, the others with the peers' from the GGUF file.
MODULES = {"transformers": "transformers", "openvino": "openvino_genai", "llamacpp": "llama_cpp"}
OWN = "transformers"


class Maker(NamedTuple):
    """What makes a child: its python, and its model's folder or file."""

    python: str
    model: str


class Peers(NamedTuple):
    """Those that can run, and what became of each that was asked for: its version, or why it is skipped."""

    makers: dict[str, Maker]
    said: dict[str, str]


def find_peers(names: Iterable[str], folder: Path, python: str, gguf: Path | None) -> Peers:
    """`python` and `gguf`: of the peers. Raises ValueError, with the names that there are, for another name."""
    makers, said = {}, {}
    for name in names:
        if name not in MODULES:
            raise ValueError(f"there is no peer {name}; there are {', '.join(MODULES)}")
        maker = Maker(sys.executable, str(folder)) if name == OWN else Maker(python, str(gguf))
        try:
            if name != OWN and not gguf:
                raise SkipError("no GGUF file is given (--gguf)")
            said[name], makers[name] = version_of(maker.python, MODULES[name]), maker
        except SkipError as error:
            said[name] = f"skipped: {error}"
    return Peers(makers, said)
