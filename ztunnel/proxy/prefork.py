"""The first workers, forked from the control process while it is no more than a worker: they share its memory.

An interpreter with a worker's libraries is 23 MiB. The control process imports those first, forks its workers, and only
then imports what it needs beside: pages that nobody has written to since are there once. A worker that ends is followed
by one that is executed (`workers.py`), which shares nothing. A process kept to fork successors from was tried: it costs
6 MiB for good, the former state of all that the others have written to.

Why the fork is safe: the control process has one thread then, has not run trio, made no TLS connection, and opened
nothing that is not closed in the worker. OpenSSL seeds its random numbers anew in a forked process (RAND(7)), and so
does Python. What the processes have in common is the secret in the hashes of strings.
"""

import gc
import os
import signal
import socket
import sys
from typing import NoReturn

import trio

from ztunnel.proxy import worker
from ztunnel.proxy.worker import Worker
from ztunnel.telemetry.log import Logger


class ForkedWorker:
    """A worker process that is a fork of this one: as much of a trio.Process as is needed."""

    def __init__(self, pid: int) -> None:
        self.pid = pid
        self.returncode: int | None = None
        self._pidfd = os.pidfd_open(pid)

    def kill(self) -> None:
        """SIGKILL; no error if it has ended."""
        if self.returncode is None:
            signal.pidfd_send_signal(self._pidfd, signal.SIGKILL)

    async def wait(self) -> int:
        """Wait for its end and reap it; its exit code, negative for a signal."""
        if self.returncode is None:
            await trio.lowlevel.wait_readable(self._pidfd)
        return self.reap()

    def reap(self) -> int:
        """As `wait`, for callers that may block."""
        if self.returncode is None:
            _, status = os.waitpid(self.pid, 0)
            self.returncode = os.waitstatus_to_exitcode(status)
            os.close(self._pidfd)
        return self.returncode


Forked = tuple[ForkedWorker, socket.socket]
"""A worker, and our end of its channel."""


def fork_workers(count: int, logger: Logger, kind: type[Worker] = Worker) -> list[Forked]:
    """Fork `count` workers of this kind that log as `logger` does. Raises OSError, with none left."""
    gc.collect()
    gc.freeze()  # the collector writes to each object that it looks at
    workers: list[Forked] = []
    try:
        for number in range(count):
            workers.append(_fork(number, logger, kind))
    except OSError:
        end_workers(workers)
        raise
    return workers


def end_workers(workers: list[Forked]) -> None:
    """Kill and reap them; no error for those that have ended."""
    for process, channel in workers:
        process.kill()
        process.reap()
        channel.close()


def _fork(number: int, logger: Logger, kind: type[Worker]) -> Forked:
    ours, theirs = socket.socketpair()
    with theirs:
        try:
            pid = os.fork()
        except OSError:
            ours.close()
            raise
        if pid == 0:
            _work(number, theirs, logger, kind)
        return ForkedWorker(pid), ours


def _work(number: int, channel: socket.socket, logger: Logger, kind: type[Worker]) -> NoReturn:
    """Be a worker; never returns, as what lies below on the stack is another process's business."""
    code = 1
    try:
        _close_others(channel.fileno())
        worker.run(channel, Logger(logger.level, logger.json, logger.fd, worker=str(number)), kind)
        code = 0
    except BaseException:
        sys.excepthook(*sys.exc_info())
    finally:
        os._exit(code)


def _close_others(channel: int) -> None:
    """Close all descriptors but the channel, standard output and the log; read nothing from standard input."""
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    os.closerange(3, channel)
    os.closerange(channel + 1, os.sysconf("SC_OPEN_MAX"))
