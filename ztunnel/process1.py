"""Process 1 of a container: the parent of the control process, and of what is left without a parent.

The kernel ends a container with its process 1, all that runs in it at once. Were the control process that one, its
crash would cut every connection of the node. So it is a child: when it dies its workers serve on (orphan.py) until the
next one listens, which is started here, at once. A container whose control process dies again and again ends, so that
Kubernetes shows it, and waits longer before each attempt.

Rule: nothing is imported here but what Python itself has in memory: this process stays, beside the one that works.
It is an interpreter without site-packages, 2.2 MB; a fork of the control process before its imports is 5.
"""

import _signal as signal  # type: ignore[import-not-found]  # what `signal` itself adds is enumerations: 0.7 MB
import os
import sys
import time

MOST = 3  # deaths of the control process within WINDOW that are made good here
WINDOW = 60.0  # seconds
RESTARTS = "ZTUNNEL_RESTARTS"
LAST_END = "ZTUNNEL_LAST_END"
"""Variables that tell the control process how often it was started again, and how its predecessor ended."""

_PASSED_ON = {signal.SIGTERM, signal.SIGINT}
_AWAITED = {*_PASSED_ON, signal.SIGCHLD}
_DELIBERATE = (0, 2)  # exit codes: an orderly end, settings that cannot be used


def supervise(command: list[str]) -> None:
    """Run the control process by its command line; ends this process with its exit code, and never returns.

    That of a process which a signal killed is 128 and the signal's number, as a shell has it. Raises OSError where no
    process can be made.
    """
    signal.pthread_sigmask(signal.SIG_BLOCK, _AWAITED)
    deaths: list[float] = []
    while True:
        child = os.fork()
        if child == 0:
            signal.pthread_sigmask(signal.SIG_UNBLOCK, _AWAITED)
            os.execvp(command[0], command)  # noqa: S606 - the command that this process was started with
        status, told_to_end = _wait(child)
        code = os.waitstatus_to_exitcode(status)
        now = time.monotonic()
        deaths = [at for at in deaths if now - at < WINDOW]
        if told_to_end or code in _DELIBERATE or len(deaths) >= MOST:
            os._exit(code if code >= 0 else 128 - code)
        deaths.append(now)
        os.environ[RESTARTS] = str(restarts() + 1)
        os.environ[LAST_END] = f"exit code {code}" if code >= 0 else f"signal {-code}"


def _wait(child: int) -> tuple[int, bool]:
    """Until the control process ends: its status, and whether it was told to. Reaps everybody, passes signals on."""
    told_to_end = False
    while True:
        number = signal.sigwait(_AWAITED)
        if number in _PASSED_ON:
            told_to_end = True
            os.kill(child, number)  # at the worst a zombie, which is reaped below
            continue
        found = None
        while True:
            try:
                pid, status = os.waitpid(-1, os.WNOHANG)
            except ChildProcessError:
                break
            if pid == 0:
                break
            if pid == child:
                found = status
        if found is not None:
            return found, told_to_end


def restarts() -> int:
    """How often the control process, this one, was started again in its container."""
    return int(os.environ.get(RESTARTS, "0"))


def enter() -> None:
    """Be supervised: as process 1 become the parent, and have it start this same command again. Else nothing."""
    if os.getpid() == 1:
        os.execv(sys.executable, [sys.executable, "-I", "-S", __file__, *sys.orig_argv])  # noqa: S606 - itself


if __name__ == "__main__":
    try:
        supervise(sys.argv[1:])
    except OSError as failure:
        print(f"error: cannot start the control process: {failure.strerror}", file=sys.stderr, flush=True)
        sys.exit(1)
