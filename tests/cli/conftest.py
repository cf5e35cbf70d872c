"""A machine without its network: the real resolver and control socket on a real state directory, no pods running."""

import contextlib
import json
import os
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import msgspec
import pytest
import trio

from ztunnel.embedded.cluster import Cluster
from ztunnel.embedded.control import ControlSocket, RequestError, start_failure
from ztunnel.embedded.statedir import State
from ztunnel.store.directory import DirectoryStore
from ztunnel.store.models import Pod


class Machine:
    """What the command line talks to: DIR, STATE, and `ambient` on them."""

    def __init__(self, home: Path) -> None:
        self.directory = home / "shop"
        self.state = State(home / "state")
        self.requests: list[Mapping[str, Any]] = []
        self.directory.mkdir()
        self.state.create()
        self.state.logs.joinpath("pods").mkdir(parents=True)
        self._ready = threading.Event()
        self._failure: BaseException | None = None
        self._thread = threading.Thread(target=self._serve)

    @property
    def source(self) -> DirectoryStore:
        return DirectoryStore(self.directory)

    @property
    def objects(self) -> DirectoryStore:
        return DirectoryStore(self.state.objects)

    def ambient(
        self, *arguments: str, given: str | None = None, **environment: str
    ) -> subprocess.CompletedProcess[str]:
        """Run the command on this machine (state by AMBIENT_STATE)."""
        return subprocess.run(
            self.argv(*arguments),
            input=given,
            env={**os.environ, "AMBIENT_STATE": str(self.state.path), **environment},
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )

    def argv(self, *arguments: str) -> list[str]:
        return [sys.executable, "-P", "-m", "ztunnel.cli.main", *arguments]

    def ok(self, *arguments: str, given: str | None = None) -> str:
        """The same, which must succeed, at most with warnings; its output."""
        done = self.ambient(*arguments, given=given)
        assert done.returncode == 0, done
        assert all(line.startswith("warning: ") for line in done.stderr.splitlines()), done
        return done.stdout

    def fails(self, *arguments: str, given: str | None = None, code: int = 1) -> str:
        """The same, which must fail; what it says on standard error, which is never a traceback."""
        done = self.ambient(*arguments, given=given)
        assert done.returncode == code, done
        assert "Traceback" not in done.stderr
        return done.stderr

    def start(self) -> None:
        self._thread.start()
        assert self._ready.wait(20)
        if self._failure is not None:
            raise self._failure

    def stop(self) -> None:
        with contextlib.suppress(trio.RunFinishedError):  # somebody has asked it to end already
            self._token.run_sync_soon(self._end)
        self._thread.join(20)

    def _end(self) -> None:
        self._scope.cancel()

    def _serve(self) -> None:
        try:
            trio.run(self._main)
        except BaseException as error:
            self._failure = error
            self._ready.set()
            raise

    async def _main(self) -> None:
        self._token = trio.lowlevel.current_trio_token()
        self.state.write_record(self.directory, 2)
        self.cluster = Cluster(self.source, self.objects, 2, problems_file=self.state.problems)
        control = ControlSocket(self.state.socket, self._status, self._exec, self._end, self._upgrade)
        with trio.CancelScope() as self._scope:
            async with trio.open_nursery() as nursery:
                await nursery.start(self.cluster.run)
                await nursery.start(control.run)
                self._ready.set()
        self.state.remove_files()
        for held in control.hold:
            os.close(held)

    def _status(self) -> object:
        child = {"pid": os.getpid(), "ready": True, "restarts": 0}
        pods = self.objects.list(Pod)
        return {
            "state": str(self.state.path),
            **{name: json.loads(self.state.record.read_text())[name] for name in ("pid", "since", "dir")},
            "controlplane": child,
            "nodes": [
                {"name": f"node-{number}", "ztunnel": child, "agent": child | {"ready": False}, "pods": 1}
                for number in (1, 2)
            ],
            "pods": [
                {
                    "namespace": pod.namespace,
                    "name": pod.name,
                    "node": pod.spec.node_name,
                    "ip": pod.status.pod_ip,
                    "phase": pod.status.phase,
                    "restarts": 0,
                    "mesh": False,
                    "message": pod.status.message,
                }
                for pod in pods
            ],
            "problems": msgspec.to_builtins(self.cluster.problems),
        }

    async def _exec(self, request: Mapping[str, Any], fds: list[int]) -> subprocess.Popen[bytes]:
        """Run the program here, on the machine: what is tried is the way there and back."""
        self.requests.append(request)
        if request.get("node") == "node-9":
            raise RequestError("there is no node node-9; the nodes are node-1, node-2")
        try:
            return subprocess.Popen(
                request["argv"], stdin=fds[0], stdout=fds[1], stderr=fds[2], start_new_session=True
            )
        except OSError as error:
            raise start_failure(request["argv"], error) from error

    async def _upgrade(self, node: str) -> dict[str, Any]:
        """Two of the nodes can be asked; the second one's new proxy does not come up."""
        if node != "node-1":
            raise RequestError(f"the new ztunnel-{node} was not ready within 30 s; the old one serves on")
        return {"node": node, "old": 41, "new": 42, "seconds": 1.25}


@pytest.fixture
def machine() -> Iterator[Machine]:
    # not tmp_path: its name grows with the test's name and the runs before this one, a socket's name may not
    with tempfile.TemporaryDirectory(prefix="machine-", dir="/tmp") as home:
        machine = Machine(Path(home))
        machine.start()
        try:
            yield machine
        finally:
            machine.stop()
