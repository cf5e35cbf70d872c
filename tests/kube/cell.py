"""A cell: mount, pid, uts and network namespaces of its own, whose end ends everything inside. The control plane is
one, each node is one."""

import contextlib
import os
import subprocess
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from tests.kube.processes import Process

SCRIPT = Path(__file__).with_name("cell.sh")
PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
START_LIMIT = 20.0
END_LIMIT = 30.0


class CellError(Exception):
    """A cell or a program in it did not start or did not end; the message names it, and its last words."""


class Cell:
    """`folder` holds what it writes: `log/`, `pid/`, and for a node `node/` with the upper layers of its overlays."""

    def __init__(self, name: str, folder: Path, init: Path) -> None:
        self.name = name
        self.folder = folder
        self._init = init
        self._first: Process | None = None  # the process of the cell's own init, as the machine sees it
        self._started: list[subprocess.Popen[bytes]] = []
        self._spawning = threading.Lock()

    @property
    def pid(self) -> int:
        """Process id of the cell's init, as the machine counts. Raises CellError while the cell is down."""
        if self._first is None or not self._first.alive:
            raise CellError(f"cell {self.name}: not running")
        return self._first.pid

    @property
    def running(self) -> bool:
        return self._first is not None and self._first.alive

    def adopt(self, keeper: Process) -> None:
        """Become the handle of a cell which another process started and wrote down."""
        children = keeper.children() if keeper.alive else []
        self._first = children[0] if children else None

    def start(self, record: Callable[[Process], None]) -> None:
        """Make the namespaces. `record` writes the keeper down, whose end ends the cell, before anything happens."""
        for place in ("log", "pid"):
            (self.folder / place).mkdir(parents=True, exist_ok=True)
        ready = self.folder / "ready"
        ready.unlink(missing_ok=True)
        log = self.folder / "log" / "cell"
        namespaces = ("--mount", "--pid", "--uts", "--net", "--fork", "--kill-child")
        with log.open("wb") as output:
            keeper = subprocess.Popen(
                ["unshare", *namespaces, "bash", str(SCRIPT), str(self.folder), self.name, str(self._init)],
                stdin=subprocess.PIPE,
                stdout=output,
                stderr=output,
                start_new_session=True,
                env=self._environment(),
            )
        self._started.append(keeper)
        assert keeper.stdin is not None
        record(Process.of(keeper.pid))
        with contextlib.suppress(BrokenPipeError):
            keeper.stdin.write(b"go\n")
            keeper.stdin.close()
        end = time.monotonic() + START_LIMIT
        while not ready.exists():
            if keeper.poll() is not None or time.monotonic() > end:
                raise CellError(f"cell {self.name}: not up: {self.last_words('cell')}")
            time.sleep(0.01)
        self.adopt(Process.of(keeper.pid))

    def kill(self) -> None:
        """End the cell as a power cut would: every process, namespace and mount of it is gone on return."""
        first, self._first = self._first, None
        if first is not None:
            first.kill()
            if not first.wait(END_LIMIT):
                raise CellError(f"cell {self.name}: process {first.pid} does not end")
        for started in self._started:
            started.wait(END_LIMIT)
        self._started.clear()

    def enter(self, argv: Sequence[str | Path]) -> list[str]:
        """The arguments that run a program inside. The working directory becomes /."""
        return ["nsenter", "-t", str(self.pid), "-m", "-p", "-u", "-n", *map(str, argv)]

    def run(self, argv: Sequence[str | Path], *, timeout: float = 60, stdin: str = "") -> str:
        """Run a program inside to its end; what it wrote to stdout. Raises CellError with stderr if it fails."""
        try:
            done = subprocess.run(
                self.enter(argv),
                input=stdin,
                capture_output=True,
                text=True,
                timeout=timeout,
                env=self._environment(),
            )
        except subprocess.TimeoutExpired as error:
            raise CellError(f"cell {self.name}: {_line(argv)}: no end after {timeout} s") from error
        if done.returncode != 0:
            said = (done.stderr or done.stdout).strip()
            raise CellError(f"cell {self.name}: {_line(argv)}: exit code {done.returncode}: {said}")
        return done.stdout

    def spawn(self, name: str, argv: Sequence[str | Path], *, stdin: bytes = b"", **environment: str) -> None:
        """Start a program inside that runs on; its output goes to `log/NAME`, its id inside to `pid/NAME`."""
        mark = self.folder / "pid" / name
        mark.unlink(missing_ok=True)
        wrapped = [
            "sh",
            "-c",
            'echo $$ >"$0.new" && mv "$0.new" "$0" && exec "$@"',
            str(mark),
            *map(str, argv),
        ]
        with (self.folder / "log" / name).open("ab") as output:
            process = subprocess.Popen(
                self.enter(wrapped),
                stdin=subprocess.PIPE if stdin else subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                start_new_session=True,
                env=self._environment() | environment,
            )
        if process.stdin is not None:
            process.stdin.write(stdin)
            process.stdin.close()
        with self._spawning:
            self._started = [other for other in self._started if other.poll() is None]
            self._started.append(process)

    def stop(self, name: str, number: int = 9) -> None:
        """Send a program started by `spawn` a signal and wait for its end."""
        mark = self.folder / "pid" / name
        try:
            pid = int(mark.read_text())
        except FileNotFoundError:
            return
        if self.alive(pid):
            self.run(["kill", f"-{number}", str(pid)])
        end = time.monotonic() + END_LIMIT
        while self.alive(pid):
            if time.monotonic() > end:
                raise CellError(f"cell {self.name}: {name} does not end")
            time.sleep(0.02)
        mark.unlink(missing_ok=True)

    def alive(self, pid: int) -> bool:
        """Whether the cell has such a process, by its id inside; a zombie is none."""
        status = Path(f"/proc/{self.pid}/root/proc/{pid}/stat")
        try:
            return status.read_text().rpartition(")")[2].split()[0] not in "ZX"
        except (FileNotFoundError, ProcessLookupError):
            return False

    def last_words(self, name: str, lines: int = 8) -> str:
        """The end of a program's log, for errors."""
        try:
            return "\n".join((self.folder / "log" / name).read_text(errors="replace").splitlines()[-lines:])
        except FileNotFoundError:
            return "no log"

    def _environment(self) -> dict[str, str]:
        """Nothing of the caller's, and no folder of the host's for stray files."""
        return {
            "PATH": PATH,
            "HOME": "/run",
            "TMPDIR": "/run",
            "XDG_RUNTIME_DIR": "/run",
            "LANG": os.environ.get("LANG", "C"),
        }


def _line(argv: Sequence[str | Path]) -> str:
    text = " ".join(map(str, argv))
    return text if len(text) < 200 else text[:200] + " ..."
