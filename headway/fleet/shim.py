"""Run as `python shim.py PARENT COMMAND…`: becomes COMMAND, which the kernel kills as soon as PARENT is gone.

PR_SET_PDEATHSIG must be set between fork and exec; setting it here, in a process of its own, keeps the (threaded)
parent from running Python between the two. Standard library only, and quick to start.
"""

import ctypes
import os
import signal
import sys

PR_SET_PDEATHSIG = 1


def main() -> None:
    parent, command = int(sys.argv[1]), sys.argv[2:]
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0):
        sys.exit(f"prctl: {os.strerror(ctypes.get_errno())}")
    if os.getppid() != parent:
        sys.exit("the parent is gone")
    os.execv(command[0], command)


if __name__ == "__main__":
    main()
