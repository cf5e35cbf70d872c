"""The mesh's own processes: started in sessions of their own, watched, started again when they end.

The pause before a restart begins at 0.1 s, doubles to 2 s, and begins anew once a process has run for 10 s.
"""

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import trio

from ztunnel.embedded import launcher
from ztunnel.embedded.programs import ended, signal_name
from ztunnel.embedded.statedir import Process, session_members, stat_of
from ztunnel.store.problems import Problem

FIRST_PAUSE, LAST_PAUSE = 0.1, 2.0
LONG_RUN = 10.0
LOOK_OFTEN, LOOK_SELDOM = 0.05, 1.0
STOP_PATIENCE = 5.0  # seconds between SIGTERM and SIGKILL
HURRY = 0.3  # seconds until the second SIGTERM for what drains
DRAIN_PATIENCE = 35.0  # seconds that what a dead process has left may go on, where it may
DRAIN_LOOK = 0.25
SUCCESSOR_PATIENCE = 30.0  # seconds for a successor to be ready
TAIL = 4096

Report = Callable[[str, Problem | None], None]
Check = Callable[[int], Awaitable[bool]]


class ReplaceError(Exception):
    """No successor took a process's place; the message says why. The process itself runs on."""


class Instance(NamedTuple):
    """One process in a child's place, or on its way into it or out of it."""

    process: subprocess.Popen[bytes]
    leader: Process
    generation: int

    @property
    def pid(self) -> int:
        """Of the process that was started."""
        return self.leader.pid


class Child:
    """One process of the mesh.

    `process` is what runs, `others` what is beside it: a successor that is starting, and those before it of which
    something is left; `record()` is called when they change. `check(generation)` says whether the process of this
    generation is ready now, `settings(generation)` are variables of its own, and `in_place(generation)` is called when
    it is the one that counts. With `drains`, what a dead or replaced process has left may finish its work (35 s at
    most) while the next one runs already.
    """

    def __init__(
        self,
        name: str,
        argv: Sequence[str],
        env: Mapping[str, str],
        log: Path,
        check: Check,
        *,
        record: Callable[[], None],
        report: Report,
        drains: bool = False,
        settings: Callable[[int], Mapping[str, str]] = lambda generation: {},
        in_place: Callable[[int], None] = lambda generation: None,
    ) -> None:
        self.name = name
        self.argv = list(argv)
        self.env = dict(env)
        self.log = log
        self.ready = False
        self.restarts = 0
        self.process: Process | None = None
        self.others: list[Process] = []
        self.first_ready = trio.Event()
        self._check = check
        self._record = record
        self._report = report
        self._drains = drains
        self._settings = settings
        self._in_place = in_place
        self._generation = 0
        self._nursery: trio.Nursery | None = None
        self._successor: Instance | None = None
        self._handover = trio.Event()
        self._replacing = False

    @property
    def pid(self) -> int:
        """0 while it does not run."""
        return self.process.pid if self.process else 0

    def describe(self) -> dict[str, object]:
        """For the status report."""
        return {
            "pid": self.pid,
            "ready": self.ready,
            "restarts": self.restarts,
            "others": [other.pid for other in self.others],
        }

    async def run(self) -> None:
        """Keep it running for ever; when cancelled, end it with all that it has started."""
        pause = FIRST_PAUSE
        async with trio.open_nursery() as nursery:
            self._nursery = nursery
            while True:
                began = time.monotonic()
                try:
                    how = self._how_it_ended(await self._once(nursery))
                except OSError as error:
                    how = f"cannot be started: {error}"
                if time.monotonic() - began >= LONG_RUN:
                    pause = FIRST_PAUSE
                remedy = f"it is started again; its log is {self.log}"
                self._report(self.name, Problem("", "", f"{self.name} {how}", remedy, "warning"))
                await trio.sleep(pause)
                pause = min(pause * 2, LAST_PAUSE)
                self.restarts += 1

    async def replace(self, patience: float = SUCCESSOR_PATIENCE) -> tuple[int, int]:
        """Start a successor beside it; once that is ready it is the one that counts, and the old one is told to drain.

        Returns the pids of both. Raises ReplaceError, with the old one as it was, where the successor ends or is not
        ready within `patience` seconds.
        """
        if self._nursery is None or self._replacing:
            raise ReplaceError(
                f"{self.name} {'is being replaced already' if self._replacing else 'does not run yet'}"
            )
        self._replacing = True
        old = self.pid
        done: list[int | str] = []
        finished = trio.Event()
        self._nursery.start_soon(self._replace, patience, done, finished)
        await finished.wait()
        new = done[0] if done else f"{self.name} is being ended"
        if isinstance(new, str):
            raise ReplaceError(new)
        return old, new

    async def _replace(self, patience: float, done: list[int | str], finished: trio.Event) -> None:
        """In the child's own nursery: whoever asked may go away."""
        try:
            successor = self._start(self._generation + 1)
            self.others.append(successor.leader)
            self._record()
            try:
                reason = await self._until_ready(successor, patience)
            except BaseException:
                reason = "ended"
                raise
            finally:
                if reason:
                    with trio.CancelScope(shield=True):
                        await self._stop(successor)
                self.others.remove(successor.leader)
            if reason:
                done.append(f"the new {self.name} {reason}; the old one serves on; its log is {self.log}")
            else:
                self._successor = successor
                self._handover.set()
                done.append(successor.pid)
        except OSError as error:
            done.append(f"the new {self.name} cannot be started: {error}")
        finally:
            self._replacing = False
            self._record()
            finished.set()

    async def _until_ready(self, instance: Instance, patience: float) -> str:
        """Wait until it is; why it will not be, "" once it is."""
        with trio.move_on_after(patience):
            while instance.process.poll() is None:
                if await self._is_ready(instance.generation):
                    return ""
                await trio.sleep(LOOK_OFTEN)
            return self._how_it_ended(instance.process.returncode)
        return f"was not ready within {patience:.0f} s"

    async def _once(self, nursery: trio.Nursery) -> int:
        """Start it, and keep it and those that take its place until one ends by itself; the exit code."""
        instance = self._taken() or self._start(self._generation)
        while True:
            self._generation = instance.generation
            self.process = instance.leader
            self._in_place(instance.generation)
            self._record()
            code = await self._while_in_place(instance)
            successor = self._taken()
            if successor is None:
                break
            self.others.append(instance.leader)
            nursery.start_soon(self._end_later, instance)
            instance = successor
        if self._drains:
            self.others.append(instance.leader)
            nursery.start_soon(self._end_later, instance)
        else:
            await _end_session(instance.leader)
        self._record()
        return code

    def _taken(self) -> Instance | None:
        """The successor that is ready, if there is one: the caller's from now on."""
        successor, self._successor = self._successor, None
        return successor

    async def _while_in_place(self, instance: Instance) -> int:
        """Until it ends, or has a successor; its exit code."""
        code = 0
        self._handover = trio.Event()
        try:
            async with trio.open_nursery() as watching:
                watching.start_soon(self._watch, instance.generation)
                watching.start_soon(self._succeeded, watching.cancel_scope)
                code = await ended(instance.process)
                watching.cancel_scope.cancel()
        except BaseException:
            with trio.CancelScope(shield=True):
                for one in (instance, self._taken()):
                    if one is not None:
                        await self._stop(one)
            raise
        finally:
            self.ready = False
            self.process = None
        return code

    async def _succeeded(self, place: trio.CancelScope) -> None:
        await self._handover.wait()
        place.cancel()

    async def _end_later(self, instance: Instance) -> None:
        """Let a replaced process, or what a dead one has left, finish its work, for some time."""
        leader = instance.leader
        try:
            with trio.move_on_after(DRAIN_PATIENCE):
                if instance.process.poll() is None:
                    instance.process.terminate()
                    await ended(instance.process)
                while await trio.to_thread.run_sync(session_members, [leader]):
                    await trio.sleep(DRAIN_LOOK)
        finally:
            with trio.CancelScope(shield=True):
                await _end_session(leader)
                instance.process.wait()
            self.others.remove(leader)
        self._record()

    def _start(self, generation: int) -> Instance:
        self.log.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        log = os.open(self.log, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o600)
        try:
            # By this very thread: the kernel takes the end of the thread that made a child for its parent's.
            process = subprocess.Popen(
                [sys.executable, "-I", "-S", launcher.__file__, str(os.getpid()), *self.argv],
                env=self.env | dict(self._settings(generation)),
                cwd="/",
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )
        finally:
            os.close(log)
        stat = stat_of(process.pid)
        return Instance(process, Process(process.pid, stat.start_time if stat else 0), generation)

    async def _is_ready(self, generation: int) -> bool:
        # A process that is killed while it answers resets the connection: it is not ready, and that is no error.
        with contextlib.suppress(OSError, trio.BrokenResourceError):
            return await self._check(generation)
        return False

    async def _watch(self, generation: int) -> None:
        while True:
            self.ready = await self._is_ready(generation)
            if self.ready:
                self.first_ready.set()
                self._report(self.name, None)
            await trio.sleep(LOOK_SELDOM if self.ready else LOOK_OFTEN)

    async def _stop(self, instance: Instance) -> None:
        process = instance.process
        with trio.move_on_after(STOP_PATIENCE):
            process.terminate()
            if self._drains:
                # The pods are gone. What a ztunnel waits for now are peers without a network; told twice, it does not.
                with trio.move_on_after(HURRY):
                    await ended(process)
                if process.poll() is None:
                    process.terminate()
            await ended(process)
        await _end_session(instance.leader)
        process.wait()

    def _how_it_ended(self, code: int) -> str:
        if code < 0:
            return f"was ended by {signal_name(-code)}"
        last = self._last_words()
        return f"ended with exit code {code}" + (f": {last}" if last and code else "")

    def _last_words(self) -> str:
        try:
            with self.log.open("rb") as log:
                log.seek(max(0, self.log.stat().st_size - TAIL))
                lines = log.read().decode(errors="replace").strip().splitlines()
        except OSError:
            return ""
        return lines[-1].strip() if lines else ""


async def _end_session(leader: Process) -> None:
    """SIGKILL to all that is left of a session, until nothing is (5 s at most)."""
    with trio.move_on_after(STOP_PATIENCE):
        while members := await trio.to_thread.run_sync(session_members, [leader]):
            for pid in members:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            await trio.sleep(0.005)
