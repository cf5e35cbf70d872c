"""What the kernel lets a process have, raised as far as the process itself may."""

import contextlib
import resource


def raise_open_files() -> None:
    """Open as many files as is permitted: the usual soft limit of 1024 is 500 proxied connections."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    with contextlib.suppress(OSError, ValueError):
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
