"""`python -I -S launcher.py PARENT PROGRAM [ARG...]`: become the program, and be terminated when PARENT dies.

So no part of the mesh outlives a supervisor that was killed. Run as a file: it imports nothing of the project.
"""

import ctypes
import os
import signal
import sys

PR_SET_PDEATHSIG = 1


def main() -> None:
    """Never returns; exit code 1 if the parent is dead already."""
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)
    if os.getppid() != int(sys.argv[1]):  # it died before this process asked to be told
        sys.exit(1)
    os.execv(sys.argv[2], sys.argv[2:])  # noqa: S606  the supervisor's own argument list


if __name__ == "__main__":
    main()
