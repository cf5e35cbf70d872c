"""The demo's mesh: `ambient up` as a child process on a copy of the bookshop, until it is ready, and its end.

Everything goes through what a user has: the `ambient` command and the control socket.
"""

import contextlib
import ctypes
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from importlib.resources import files
from pathlib import Path
from typing import Any, Self

from ztunnel.cli.demo.home import Home
from ztunnel.cli.errors import UserError
from ztunnel.embedded.client import MeshClient, MeshNotRunning
from ztunnel.embedded.statedir import State, clean

AMBIENT = (sys.executable, "-P", "-m", "ztunnel.cli.main")
READY_SECONDS = 60.0
SWITCH_SECONDS = 30.0
STOP_SECONDS = 20.0
POLL_SECONDS = 0.1
TAIL_LINES = 8
PR_SET_PDEATHSIG = 1
STRANGER = "stranger-"  # how the names of the pods begin that stay outside the mesh
CERTIFICATE_LIFE = "30s"  # so that there is a renewal to be seen

Progress = Callable[[str], None]


def tail(path: Path, lines: int = TAIL_LINES) -> str:
    """The last lines of a log, indented, under its name; "" where there is nothing in it.

    Access log lines are left out: connections that ended well would crowd out what went wrong.
    """
    try:
        text = path.read_bytes()[-65536:].decode(errors="replace").splitlines()
    except OSError:
        return ""
    text = [line for line in text if "connection complete" not in line or "error" in line][-lines:]
    return "\n".join([f"  {path}:", *(f"    {line}" for line in text)]) if text else ""


def _end_with_parent() -> None:
    """In a child: be terminated when the demo dies, so that even `kill -9` of it leaves no mesh behind."""
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)


class DemoMesh:
    """A running bookshop mesh; as a context manager it is taken down at the end of the block, unless kept."""

    def __init__(self, state: Path | None, nodes: int, keep: bool) -> None:
        """`state` None: a temporary directory, removed at the end."""
        if state is not None:
            State(state).check()
            _refuse_running_mesh(state)
        self.nodes = nodes
        self.keep = keep
        self._home = Home(state)
        self.state = self._home.state
        self.resources = self._home.path / "bookshop"
        self._log = self._home.path / "up.log"
        self._up: subprocess.Popen[bytes] | None = None

    def __enter__(self) -> Self:
        try:
            self._start()
        except BaseException:
            self.keep = False
            self.stop()
            raise
        return self

    def __exit__(self, *exception: object) -> None:
        if not self.keep or exception[0] is not None:
            self.stop()

    def _start(self) -> None:
        self.resources.mkdir()
        template = files("ztunnel.cli.demo").joinpath("bookshop.yaml").read_text()
        (self.resources / "bookshop.yaml").write_text(template.replace("${PYTHON}", sys.executable))
        argv = [*AMBIENT, "up", str(self.resources), "--state", str(self.state), "--nodes", str(self.nodes)]
        argv += ["--xds-port", "0"]
        with self._log.open("wb") as log:
            self._up = subprocess.Popen(
                argv,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                env={**os.environ, "SECRET_TTL": CERTIFICATE_LIFE},
                start_new_session=True,  # Ctrl-C is for the demo, which then takes the mesh down in order
                preexec_fn=None if self.keep else _end_with_parent,
            )

    def status(self) -> dict[str, Any] | None:
        """What the mesh says about itself, None where it does not answer (yet)."""
        try:
            return MeshClient(self.state).status()
        except (MeshNotRunning, OSError):
            return None

    def wait_ready(self, progress: Progress) -> dict[str, Any]:
        """Wait until all processes and pods run and all pods are in the mesh; returns the status.

        `progress` is told what is waited for. Raises UserError with the end of the log that explains it.
        """
        return self._wait(self._unready, READY_SECONDS, progress)

    def wait_pods(self, in_mesh: bool, progress: Progress) -> dict[str, Any]:
        """Wait until all pods are in the mesh, or all out of it; returns the status. Raises UserError."""

        def missing(status: Mapping[str, Any]) -> str:
            waiting = [pod["name"] for pod in _members(status) if bool(pod["mesh"]) != in_mesh]
            return _waits_for(waiting, "join" if in_mesh else "leave")

        return self._wait(missing, SWITCH_SECONDS, progress)

    def _unready(self, status: Mapping[str, Any]) -> str:
        """What is not ready yet, in words; "" once all is."""
        if len(status["nodes"]) < self.nodes or not status["pods"]:
            return "the nodes and their pods to be made"
        if not status["controlplane"]["ready"]:
            return "the control plane"
        for node in status["nodes"]:
            for part in ("agent", "ztunnel"):
                if not node[part]["ready"]:
                    return f"the {part} of {node['name']}"
        for pod in status["pods"]:
            if pod["phase"] != "Running":
                return (
                    f"pod {pod['name']} to run ({pod['phase'] or 'Pending'}) {pod.get('message', '')}".strip()
                )
        if not status["services"]["settled"]:
            return "Services to lead to their pods"
        outside = [pod["name"] for pod in _members(status) if not pod["mesh"]]
        return _waits_for(outside, "join")

    def _wait(
        self, missing: Callable[[Mapping[str, Any]], str], seconds: float, progress: Progress
    ) -> dict[str, Any]:
        end = time.monotonic() + seconds
        while True:
            status = self.status()
            waiting = missing(status) if status is not None else "the mesh to start"
            if status is not None and not waiting:
                return status
            if self._up is not None and self._up.poll() is not None:
                raise UserError(
                    f"`ambient up` ended with exit code {self._up.returncode}", detail=tail(self._log)
                )
            if time.monotonic() > end:
                raise UserError(
                    f"waited {seconds:.0f} s in vain for {waiting}", detail=self.explain(waiting, status)
                )
            progress(waiting)
            time.sleep(POLL_SECONDS)

    def explain(self, waiting: str = "", status: Mapping[str, Any] | None = None) -> str:
        """The ends of the logs that may say why `waiting` did not come true, and the known problems."""
        logs = [self._log]
        directory = self.state / "logs"
        for path in sorted(directory.glob("*.log")):
            name = path.stem  # controlplane, agent-node-1, ztunnel-node-1
            if name in waiting or all(part in waiting for part in name.split("-", 1)) or "join" in waiting:
                logs.append(path)
        for path in sorted((directory / "pods").glob("*.log")):
            if any(len(part) > 1 and part in waiting for part in path.stem.split("_")[1:2]):
                logs.append(path)
        problems = [f"  problem: {problem}" for problem in (status or {}).get("problems", [])]
        return "\n".join([*problems, *filter(None, map(tail, logs))])

    def label(self, change: str) -> None:
        """`ambient label namespace default CHANGE`."""
        self.ambient("label", "namespace", "default", change, "--overwrite")

    def ambient(self, *arguments: str) -> None:
        """`ambient ARGUMENTS` on this mesh. Raises UserError where it fails."""
        try:
            done = subprocess.run(
                [*AMBIENT, *arguments, "--state", str(self.state)],
                stdin=subprocess.DEVNULL,
                capture_output=True,
                text=True,
                start_new_session=True,
                timeout=SWITCH_SECONDS,
                check=False,
            )
        except subprocess.TimeoutExpired as error:
            raise UserError(f"`ambient {' '.join(arguments)}` took too long") from error
        if done.returncode != 0:
            raise UserError(f"`ambient {' '.join(arguments)}` failed", detail=done.stderr.strip())

    def inside(self, target: str) -> Sequence[str]:
        """The command line that runs what follows it inside a pod (deploy/NAME) or a node (node/NAME)."""
        return [*AMBIENT, "exec", target, "--state", str(self.state), "--"]

    def stop(self) -> None:
        """Take the mesh down and remove all that it and the demo made; nothing is left, however it went.

        Ctrl-C does not stop this: it has its own limits of time.
        """
        before = {number: signal.signal(number, signal.SIG_IGN) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            up, self._up = self._up, None
            if up is not None:
                _end(up)
            with contextlib.suppress(OSError):
                clean(self.state)
            self._home.remove()
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)


def _members(status: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """The pods that are in the mesh whenever their namespace is."""
    return [pod for pod in status["pods"] if not pod["name"].startswith(STRANGER)]


def _waits_for(pods: Sequence[str], verb: str) -> str:
    if not pods:
        return ""
    return f"{len(pods)} pod{'s' if len(pods) > 1 else ''} to {verb} the mesh ({pods[0]})"


def _refuse_running_mesh(state: Path) -> None:
    with contextlib.suppress(MeshNotRunning):
        MeshClient.connect(state)
        raise UserError(
            f"a mesh is running on {state} already",
            f"give another directory with --state DIR, or stop it with: ambient down --state {state}",
        )


def _end(up: subprocess.Popen[bytes]) -> None:
    """SIGTERM takes a mesh down in order; SIGKILL is for one that does not listen."""
    if up.poll() is None:
        up.terminate()
    try:
        up.wait(STOP_SECONDS)
    except subprocess.TimeoutExpired:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(up.pid, signal.SIGKILL)
        up.wait()
