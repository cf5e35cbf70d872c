"""The programs of a pod: started, watched, started again, ended. What the kubelet does for containers, in small.

A container is ready when its first declared port is open in the pod (nobody connects to find out: the kernel
lists who listens), or at once if it declares none. One that ends is started again after a pause that
doubles from 0.5 to 30 s and begins anew once it has run for 10 s.
"""

import contextlib
import os
import signal
import subprocess
import time
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path

import trio

from ztunnel.embedded.environment import VariableError, command_line, environment
from ztunnel.embedded.listeners import listens
from ztunnel.embedded.sandbox import Sandbox, Started
from ztunnel.store.models import (
    Container,
    ContainerState,
    ContainerStateRunning,
    ContainerStateTerminated,
    ContainerStateWaiting,
    ContainerStatus,
    Pod,
)

FIRST_PAUSE, LAST_PAUSE = 0.5, 30.0
LONG_RUN = 10.0
PATIENCE = 5.0
CANNOT_START = 128  # the exit code that container runtimes report for it
LOOK_OFTEN, LOOK_SELDOM = 0.02, 0.25


def now() -> str:
    """The time as Kubernetes writes it."""
    return datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")


async def ended(process: subprocess.Popen[bytes]) -> int:
    """Wait for the end of a child; its exit code, negative for a signal."""
    with contextlib.suppress(ProcessLookupError):
        fd = os.pidfd_open(process.pid)
        try:
            await trio.lowlevel.wait_readable(fd)
        finally:
            os.close(fd)
    return process.wait()


class Program:
    """One container of a pod.

    `log` takes its output. `changed()` is called whenever `status`, `message` or `fault` differs. `message` says
    for people what is wrong now, "" if nothing is; `fault` the same, but it stays until the program has run for
    10 s, so that one which ends again and again is one fault.
    """

    def __init__(self, container: Container, log: Path, changed: Callable[[], None]) -> None:
        self.container = container
        self.log = log
        self.message = ""
        self.fault = ""
        self.failed = True  # unless `terminate` sees it end in order
        self.status = ContainerStatus(
            name=container.name,
            image=container.image,
            state=ContainerState(waiting=ContainerStateWaiting(reason="ContainerCreating")),
        )
        self._changed = changed
        self._running: Started | None = None
        self._starts = 0

    async def run(self, pod: Pod, sandbox: Sandbox, restart: str) -> int:
        """Keep it running as `restart` (a restartPolicy) says; its exit code if it is not started again."""
        pause = FIRST_PAUSE
        while True:
            began = time.monotonic()
            code, message = await self._once(pod, sandbox)
            finished = self.status.state
            self.message = self.fault = message
            if restart == "Never" or (restart == "OnFailure" and code == 0):
                if code == 0:
                    self.message = self.fault = ""
                self._changed()
                return code
            if time.monotonic() - began >= LONG_RUN:
                pause = FIRST_PAUSE
            waiting = ContainerStateWaiting(
                reason="CrashLoopBackOff", message=f"{message}; started again in {pause:g} s"
            )
            self._set(ContainerState(waiting=waiting), last=finished)
            await trio.sleep(pause)
            pause = min(pause * 2, LAST_PAUSE)

    async def _once(self, pod: Pod, sandbox: Sandbox) -> tuple[int, str]:
        """Start it and wait for its end: its exit code, and a sentence about it."""
        name = self.container.name
        began = now()
        try:
            self._running = await trio.to_thread.run_sync(self._start, pod, sandbox)
        except (
            OSError,
            ValueError,
            VariableError,
        ) as error:  # ValueError: a zero byte in a word, "=" in a name
            message = self._cannot_start(error)
            terminated = ContainerStateTerminated(
                exit_code=CANNOT_START, reason="StartError", message=message, finished_at=now()
            )
            self._set(ContainerState(terminated=terminated))
            return CANNOT_START, message
        process = self._running.process
        self._set(ContainerState(running=ContainerStateRunning(started_at=began)), started=True)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._watch_readiness, process.pid)
            nursery.start_soon(self._forgive)
            code = await ended(process)
            nursery.cancel_scope.cancel()
        with trio.CancelScope(shield=True):
            await self.clean_up()
        number = -code if code < 0 else 0
        code = 128 + number if number else code
        terminated = ContainerStateTerminated(
            exit_code=code,
            signal=number,
            reason="Completed" if code == 0 else "Error",
            started_at=began,
            finished_at=now(),
        )
        self._set(ContainerState(terminated=terminated))
        how = f"was ended by {signal_name(number)}" if number else f"exited with code {code}"
        return code, f"container {name} {how} (its output: {self.log})"

    def _start(self, pod: Pod, sandbox: Sandbox) -> Started:
        variables = environment(pod, self.container, os.environ)
        argv = command_line(self.container, variables)
        self.log.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        flags = os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC
        # A new pod has a new log; the restarts of its program go on with it.
        output = os.open(self.log, flags | (0 if self._starts else os.O_TRUNC), 0o600)
        self._starts += 1
        try:
            return sandbox.start(
                argv, variables, cwd=self.container.working_dir or None, stdout=output, stderr=output
            )
        finally:
            os.close(output)

    def _cannot_start(self, error: OSError | ValueError | VariableError) -> str:
        name, container = self.container.name, self.container
        if isinstance(error, VariableError):
            return str(error)
        if isinstance(error, ValueError):
            return f"container {name}: command, args or env cannot be given to a program: {error}"
        directory = container.working_dir
        if directory and error.filename == directory:
            return f"container {name}: workingDir {directory}: {error.strerror}"
        program = [*container.command, *container.args][0]
        if isinstance(error, FileNotFoundError):
            return (
                f"container {name}: program not found: {program}; install it, or correct `command` "
                "(containers are local programs here, images are not used)"
            )
        if isinstance(error, PermissionError):
            return f"container {name}: {program} may not be executed; make it executable (chmod +x)"
        return f"container {name}: {program} cannot be started: {error.strerror or error}"

    async def _watch_readiness(self, pid: int) -> None:
        port = next(iter(self.container.ports), None)
        if port is not None and port.protocol != "SCTP":
            began = trio.current_time()
            while not listens(pid, port.container_port, port.protocol):
                waited = trio.current_time() - began
                if waited > LONG_RUN and not self.message:
                    self.message = self.fault = (
                        f"container {self.container.name} does not listen on its port {port.container_port}; "
                        "correct `ports`, or see its log"
                    )
                    self._changed()
                await trio.sleep(LOOK_OFTEN if waited < 2 else LOOK_SELDOM)
        self.message = ""
        self._set(self.status.state, ready=True, started=True)

    async def _forgive(self) -> None:
        await trio.sleep(LONG_RUN)
        self.fault = self.message
        self._changed()

    def _set(
        self,
        state: ContainerState,
        *,
        ready: bool = False,
        started: bool = False,
        last: ContainerState | None = None,
    ) -> None:
        self.status = ContainerStatus(
            name=self.container.name,
            image=self.container.image,
            ready=ready,
            started=started,
            state=state,
            last_state=last or self.status.last_state,
            restart_count=max(0, self._starts - 1),
        )
        self._changed()

    async def terminate(self) -> None:
        """SIGTERM to the program, and return when it has ended."""
        if self._running is not None:
            self._running.process.terminate()
            self.failed = await ended(self._running.process) != 0

    async def clean_up(self) -> None:
        """End the program and what it has started, at once."""
        if self._running is not None:
            with trio.move_on_after(PATIENCE):  # what hangs in the kernel ends when that lets it go
                while await trio.to_thread.run_sync(self._running.kill):
                    await trio.sleep(0.005)
                await ended(self._running.process)
            self._running.close()
            self._running = None


def signal_name(number: int) -> str:
    """SIGKILL for 9, and so on."""
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"
