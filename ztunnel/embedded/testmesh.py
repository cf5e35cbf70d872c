"""A whole mesh for tests: `ambient up` as a process of its own, asked and changed as a user would, always ended.

with RunningMesh(RESOURCES) as mesh:
    mesh.wait_pods()
    assert mesh.exec("client", "curl", "-s", "http://web/").stdout == "hello"
"""

import contextlib
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple, Self

from ztunnel.embedded.client import MeshClient, MeshNotRunning
from ztunnel.embedded.statedir import State, clean
from ztunnel.embedded.testing import until
from ztunnel.store.directory import DirectoryStore

LIMIT = 20.0
START = (
    "import sys; from pathlib import Path; from ztunnel.embedded.supervisor import UpConfig, run;"
    "sys.exit(run(UpConfig(dir=Path(sys.argv[1]), state=Path(sys.argv[2]), nodes=int(sys.argv[3]),"
    " xds_port=int(sys.argv[4]), workers=int(sys.argv[5]))))"
)


class Done(NamedTuple):
    """How a program in a pod ended."""

    code: int
    stdout: str
    stderr: str


class RunningMesh:
    """One mesh on a directory and a state directory made for it (short names: Unix sockets are in it).

    `workers` are those of each node's proxy. `prefix` goes before the command line (setpriv and the like), `python`
    and `env` replace this process's own, and `owner` is the user (number) the directories are given to.
    """

    def __init__(
        self,
        resources: str = "",
        *,
        nodes: int = 2,
        xds_port: int = 0,
        workers: int = 2,
        prefix: Sequence[str] = (),
        python: str = sys.executable,
        env: dict[str, str] | None = None,
        owner: int | None = None,
    ) -> None:
        self.home = Path(tempfile.mkdtemp(prefix="mesh-", dir="/tmp"))
        self.directory = self.home / "dir"
        self.state = State(self.home / "s")
        self.directory.mkdir()
        self.write("resources.yaml", resources)
        if owner is not None:
            for path in (self.home, self.directory, *self.directory.iterdir()):
                os.chown(path, owner, owner)
        self.argv = [
            *prefix,
            python,
            "-P",
            "-c",
            START,
            self.directory,
            self.state.path,
            str(nodes),
            str(xds_port),
            str(workers),
        ]
        self.env = env
        self.process: subprocess.Popen[bytes] | None = None

    def __enter__(self) -> Self:
        try:
            self.start()
        except BaseException:
            self.close()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is not None:
            sys.stderr.write(self.explain())
        self.close()

    @property
    def out(self) -> Path:
        """What `ambient up` has said."""
        return self.home / "out"

    @property
    def client(self) -> MeshClient:
        """The mesh's control socket."""
        return MeshClient(self.state.path)

    def launch(self) -> subprocess.Popen[bytes]:
        """`ambient up`, not waited for."""
        with self.out.open("ab") as out:
            return subprocess.Popen(
                list(map(str, self.argv)),
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=subprocess.STDOUT,
                env=self.env,
                cwd=self.home,
                start_new_session=True,
            )

    def start(self) -> None:
        """Start it and wait until every process of the mesh is ready."""
        self.process = self.launch()
        self.until(self.ready, "the mesh is ready")

    def until(self, condition: Callable[[], Any], what: str, limit: float = LIMIT) -> Any:
        """Wait for `condition()`; fails at once if `ambient up` has ended."""

        def check() -> Any:
            if self.process is not None and self.process.poll() is not None:
                raise AssertionError(
                    f"{what}: ambient up ended with {self.process.returncode}: {self.out.read_text()}"
                )
            return condition()

        return until(check, what, limit)

    def status(self) -> dict[str, Any]:
        """The mesh's report."""
        return self.client.status()

    def ready(self) -> bool:
        """Whether every process of the mesh is."""
        try:
            status = self.status()
        except (MeshNotRunning, OSError):
            return False
        parts = [
            status["controlplane"],
            *(node[part] for node in status["nodes"] for part in ("agent", "ztunnel")),
        ]
        return all(part["ready"] for part in parts)

    def pods(self, prefix: str = "") -> list[dict[str, Any]]:
        """The pods whose names begin so."""
        return [pod for pod in self.status()["pods"] if pod["name"].startswith(prefix)]

    def wait_pods(self, *, mesh: bool | None = None, limit: float = LIMIT) -> None:
        """Until there are pods, all are ready and, where asked for, in the mesh or out of it; and Services lead there.

        As in Kubernetes, a pod is ready a moment before the nodes' rules lead its Services to it.
        """

        def settled() -> bool:
            status = self.status()
            pods = status["pods"]
            as_asked = all(pod["ready"] and (mesh is None or pod["mesh"] == mesh) for pod in pods)
            return bool(pods) and as_asked and bool(status["services"]["settled"])

        what = f"every pod is ready{'' if mesh is None else f', mesh: {mesh}'}, Services lead to them"
        self.until(settled, what, limit)

    def write(self, name: str, text: str) -> None:
        """Put a file into the mesh's directory, replacing it at once."""
        new = self.home / "new"
        new.write_text(text)
        new.replace(self.directory / name)

    def objects(self) -> DirectoryStore:
        """The cluster's objects."""
        return DirectoryStore(self.state.objects)

    def exec(self, pod: str, *argv: str, stdin: bytes = b"", namespace: str = "default") -> Done:
        """Run a program in the pod whose name begins so; it gets `stdin` through a pipe."""
        name = min(one["name"] for one in self.pods(pod))
        return self.piped(lambda streams: self.client.exec(namespace, name, argv, streams=streams), stdin)

    def piped(self, run: Callable[[Sequence[int]], int], stdin: bytes = b"") -> Done:
        """Call `run` with three pipes, fed and emptied by threads."""
        pipes = [os.pipe() for _ in range(3)]
        out: dict[int, bytes] = {}

        def read(number: int) -> None:
            with os.fdopen(pipes[number][0], "rb") as stream:
                out[number] = stream.read()

        def feed() -> None:
            with contextlib.suppress(BrokenPipeError), os.fdopen(pipes[0][1], "wb") as stream:
                stream.write(stdin)

        threads = [threading.Thread(target=feed), *(threading.Thread(target=read, args=(n,)) for n in (1, 2))]
        for thread in threads:
            thread.start()
        try:
            code = run([pipes[0][0], pipes[1][1], pipes[2][1]])
        finally:
            for fd in (pipes[0][0], pipes[1][1], pipes[2][1]):
                os.close(fd)
            for thread in threads:
                thread.join()
        return Done(code, out[1].decode(), out[2].decode())

    def explain(self) -> str:
        """What the mesh said and the ends of its logs, for a test that failed."""
        parts = [f"\n--- {self.out}\n{self.out.read_text() if self.out.exists() else ''}"]
        for log in sorted(self.state.logs.glob("*.log")):
            parts.append(f"--- {log.name}\n{log.read_text()[-2000:]}")
        return "\n".join(parts)

    def stop(self, number: int = signal.SIGTERM, limit: float = LIMIT) -> int:
        """End `ambient up` with a signal; its exit code."""
        assert self.process is not None  # noqa: S101
        process, self.process = self.process, None
        process.send_signal(number)
        return process.wait(limit)

    def close(self) -> None:
        """End the mesh, whatever state it is in, and remove its directories."""
        if self.process is not None:
            self.process.terminate()
            try:
                self.process.wait(LIMIT)
            except subprocess.TimeoutExpired:
                self.process.kill()
                self.process.wait()
        end = time.monotonic() + LIMIT
        while time.monotonic() < end:
            try:
                clean(self.state.path)
                break
            except BlockingIOError:
                time.sleep(0.05)
        shutil.rmtree(self.home, ignore_errors=True)
