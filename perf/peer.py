"""Any other proxies, started by a command: `--peer NAME=COMMAND`. What the command has to do is in perf/README.md."""

import contextlib
import os
import queue
import shlex
import threading
from collections.abc import Mapping
from pathlib import Path
from subprocess import PIPE, Popen
from types import TracebackType
from typing import Self

from perf.cases import BULK, HTTP, OUTSIDE
from perf.load import BULK_PORT, HTTP_PORT, LoadError
from perf.pods import end, session, start
from perf.room import Room
from perf.sides import Side
from ztunnel.identity.ca import Authority
from ztunnel.identity.testing import CLIENT, SERVER, workload

READY = 60.0  # seconds


def write_certificates(directory: Path) -> None:
    """roots.pem of a new authority, and for either end, client and server, `-key.pem` and `-chain.pem`."""
    authority = Authority.create()
    for end_name, identity in (("client", CLIENT), ("server", SERVER)):
        certificate = workload(authority, identity, 24 * 3600)
        (directory / f"{end_name}-key.pem").write_bytes(certificate.key_pem)
        (directory / f"{end_name}-chain.pem").write_bytes(certificate.chain_pem)
        (directory / "roots.pem").write_bytes(certificate.roots_pem)


def parse_ready(line: str) -> dict[str, str]:
    """The targets of `ready http=HOST:PORT bulk=HOST:PORT [outside=HOST:PORT]`. Raises LoadError."""
    words = line.split()
    targets = dict(word.split("=", 1) for word in words[1:] if "=" in word)
    wrong = [name for name, target in targets.items() if not target.rpartition(":")[2].isdecimal()]
    if words[:1] != ["ready"] or not {HTTP, BULK} <= targets.keys() <= {HTTP, BULK, OUTSIDE} or wrong:
        raise LoadError(
            f"it said {line.strip()!r}; expected is `ready http=HOST:PORT bulk=HOST:PORT [outside=HOST:PORT]`"
        )
    return targets


class Peer(Side):
    """What one command has started. `directory` takes its files."""

    def __init__(self, room: Room, directory: Path, name: str, command: str) -> None:
        super().__init__(room)
        self.name = name
        self._argv = shlex.split(command)
        self._directory = directory / f"peer-{name}"
        self._program: Popen[str] | None = None
        self._targets: dict[str, str] = {}

    def environment(self) -> dict[str, str]:
        """What the command is told."""
        return {
            "PERF_CLIENT_NETNS": str(self.client.netns),
            "PERF_CLIENT_IP": self.client.ip,
            "PERF_SERVER_NETNS": str(self.server.netns),
            "PERF_SERVER_IP": self.server.ip,
            "PERF_HTTP_PORT": str(HTTP_PORT),
            "PERF_BULK_PORT": str(BULK_PORT),
            "PERF_OUTSIDE_IP": self.outside.ip,
            "PERF_OUTSIDE_PORT": str(BULK_PORT),
            "PERF_CERTIFICATES": str(self._directory),
            "PERF_CLIENT_IDENTITY": CLIENT,
            "PERF_SERVER_IDENTITY": SERVER,
        }

    def __enter__(self) -> Self:
        self._directory.mkdir()
        write_certificates(self._directory)
        try:
            self._program = start(self._argv, stdout=PIPE, env=os.environ | self.environment())
        except OSError as error:
            raise LoadError(f"peer {self.name}: {error}") from error
        try:
            self._targets = parse_ready(self._first_line(self._program))
        except LoadError as error:
            end(self._program)
            raise LoadError(f"peer {self.name}: {error}") from None
        except BaseException:
            end(self._program)
            raise
        return self

    @staticmethod
    def _first_line(program: "Popen[str]") -> str:
        """Its first line; the rest is read and dropped, so that it never waits for a reader."""
        output = program.stdout
        assert output is not None  # noqa: S101  it was started so
        first: queue.Queue[str] = queue.Queue()

        def read() -> None:
            with contextlib.suppress(ValueError):  # closed meanwhile: the end
                first.put(output.readline())
                while output.read(65536):
                    pass

        threading.Thread(target=read, daemon=True).start()
        try:
            return first.get(timeout=READY)
        except queue.Empty:
            raise LoadError(f"it did not say that it is ready within {READY:g} s") from None

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._program is not None:
            end(self._program)

    def targets(self) -> Mapping[str, str]:
        return self._targets

    def proxies(self) -> list[list[int]]:
        """All of its session, by the network namespace that the processes live in."""
        ends: dict[str, list[int]] = {}
        for pid in session(self._program) if self._program is not None else ():
            with contextlib.suppress(OSError):
                ends.setdefault(os.readlink(f"/proc/{pid}/ns/net"), []).append(pid)
        return list(ends.values())
