"""`python -m headway.text.trial SECONDS`: compiles constraints, so that whoever asks need not risk its own process.

A line of JSON in, {"kind", "text"}; a line of JSON out: null where the constraint can be compiled, else a sentence. The
first line out, null or a sentence, says whether the library is there. It ends with its input, by SIGPROF after so many
CPU seconds of one constraint, or for want of memory.
"""

from __future__ import annotations

import json
import os
import resource
import signal
import sys
import threading

from headway.core.sampling import Constraint, ConstraintError, ConstraintKind
from headway.text.constrain import LibraryMissing, compile_alone

# A worker's threads have more of both, so that what is compiled here does not end a worker.
STACK_BYTES = 2 << 20
MEMORY_BYTES = 2 << 30


def main() -> None:
    os.nice(5)
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY_BYTES, MEMORY_BYTES))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    threading.stack_size(STACK_BYTES)
    # Native stacks are small in threads only.
    thread = threading.Thread(target=_serve)
    thread.start()
    thread.join()


def _serve() -> None:
    _say(_trial(Constraint(ConstraintKind.REGEX, "a")))
    for line in sys.stdin:
        asked = json.loads(line)
        _say(_trial(Constraint(ConstraintKind(asked["kind"]), asked["text"])))


def _trial(constraint: Constraint) -> str | None:
    signal.setitimer(signal.ITIMER_PROF, float(sys.argv[1]))
    try:
        compile_alone(constraint)
    except (ConstraintError, LibraryMissing) as error:
        return str(error)
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0.0)
    return None


def _say(answer: str | None) -> None:
    print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    main()
