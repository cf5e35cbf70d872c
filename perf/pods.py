"""Programs in the pods' network namespaces: started, waited for, and never left behind."""

import contextlib
import os
import signal
import socket
import subprocess
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from perf.load import LoadError
from ztunnel.embedded.statedir import Process, session_members, stat_of
from ztunnel.inpod import netns

PATIENCE = 5.0  # seconds between SIGTERM and SIGKILL
LONGEST = 120.0  # seconds that a load generator may run


class Pod(NamedTuple):
    """A pod as the bench room needs it: its address (IPv4), and the file that names its network namespace."""

    name: str
    ip: str
    netns: Path

    @contextlib.contextmanager
    def inside(self) -> Iterator[None]:
        """The calling thread is in the pod's namespace for the block."""
        namespace = netns.open_path(self.netns)
        try:
            with netns.inside(namespace):
                yield
        finally:
            os.close(namespace)

    def start(self, argv: Sequence[str | Path], **options: Any) -> "subprocess.Popen[str]":
        """Start a program in the pod's network, as the leader of a session; `options` are those of Popen."""

        def run() -> "subprocess.Popen[str]":
            with self.inside():  # a child is made in the namespaces of the thread that makes it
                return start(argv, **options)

        return netns.in_new_thread(run)

    def run(self, program: str, *arguments: str) -> str:
        """Run a program to its end; its standard output. Raises LoadError; ends it whatever is raised."""
        return finish(self.start([program, *arguments], stdout=subprocess.PIPE, stderr=subprocess.PIPE))

    def get(self, target: str) -> bytes:
        """The answer to a request for / over HTTP at `target` (host:port), from within the pod. Raises OSError."""
        host, _, port = target.rpartition(":")
        with self.inside():
            connection = socket.create_connection((host, int(port)), timeout=5)
        with connection, connection.makefile("rb") as answer:
            connection.sendall(b"GET / HTTP/1.1\r\nHost: server\r\nConnection: close\r\n\r\n")
            return answer.read()


def start(argv: Sequence[str | Path], **options: Any) -> "subprocess.Popen[str]":
    """Start a program as the leader of a session, so that Ctrl-C ends the bench and not what it needs to end well."""
    options = {"stdin": subprocess.DEVNULL, "text": True, "start_new_session": True} | options
    return subprocess.Popen([str(word) for word in argv], **options)


def finish(program: "subprocess.Popen[str]", limit: float = LONGEST) -> str:
    """Wait for a program with piped output; its standard output. Raises LoadError; ends it whatever is raised."""
    name = os.path.basename(str(program.args[0] if isinstance(program.args, list) else program.args))
    try:
        out, err = program.communicate(timeout=limit)
    except subprocess.TimeoutExpired:
        raise LoadError(f"{name} still ran after {limit:g} s") from None
    finally:
        end(program)
    if program.returncode != 0:
        raise LoadError(f"{name} ended with code {program.returncode}: {(err or out).strip()[-300:]}")
    return out


def end(program: "subprocess.Popen[str]", patience: float = PATIENCE) -> None:
    """End a program and all of its session: SIGTERM to the program, SIGKILL to what is left. May be called twice."""
    members = session(program)
    if program.poll() is None:
        program.terminate()
        try:
            program.wait(patience)
        except subprocess.TimeoutExpired:
            program.kill()
            program.wait()
    for pid in members:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    for stream in (program.stdin, program.stdout, program.stderr):
        if stream is not None:
            stream.close()


def session(program: "subprocess.Popen[str]") -> list[int]:
    """The pids of a running program and of everything in its session; none if it has ended."""
    stat = stat_of(program.pid) if program.poll() is None else None
    return [] if stat is None else session_members([Process(stat.pid, stat.start_time)])


def until(condition: Callable[[], bool], what: str, limit: float) -> None:
    """Wait until `condition()`. Raises LoadError after `limit` seconds."""
    last = time.monotonic() + limit
    while not condition():
        if time.monotonic() > last:
            raise LoadError(f"{what}: not so after {limit:g} s")
        time.sleep(0.02)
