"""Keeps the CNI plugin on the node's disk and its entry in the runtime's network configuration, or takes both away.

Other programs own the directories: a network's own plugin may write its file again at any time, and people may make
the directory read-only. So it is looked at whenever something changes there and once a minute, what is missing is put
back, and what cannot be is told, and tried again.
"""

import errno
import hashlib
import logging
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import trio

from cni import conflist
from cni.conflist import ConflistError
from ztunnel.store.notify import Notifier

log = logging.getLogger(__name__)

LOOK_AGAIN = 60.0  # seconds between looks although nothing was notified
TRY_AGAIN = 5.0  # seconds between tries of what could not be done
SETTLE = 0.5  # seconds for which a file may be half written
MOST_TEXT = 4 << 20  # bytes of a network configuration

_REMEDIES = {
    errno.EROFS: "mount it writable (volumes of the DaemonSet istio-cni-node)",
    errno.ENOSPC: "make room on the node's disk",
    errno.EDQUOT: "make room on the node's disk",
    errno.EACCES: "the agent needs to run as root, with CAP_DAC_OVERRIDE",
    errno.EPERM: "the agent needs to run as root, with CAP_DAC_OVERRIDE; is the file immutable (lsattr)?",
}


class InstallError(Exception):
    """Something of the installation cannot be done. `reason` is one of Istio's results of an installation."""

    def __init__(self, reason: str, message: str) -> None:
        super().__init__(message)
        self.reason = reason


@dataclass(frozen=True, slots=True)
class Plan:
    """What goes where: the plugin's program, the directories as they are mounted here, the entry.

    `host_prefix` is what the mounts have in front of the host's own names, and left out in messages.
    """

    program: Path
    bin_dir: Path
    net_dir: Path
    entry: Mapping[str, Any]
    host_prefix: str = "/host"

    def told(self, path: Path) -> str:
        """How people on the host know the path."""
        return str(path).removeprefix(self.host_prefix)


class Installer:
    """`ready`: everything is in place. `problem`: why not, "" if it is, or while the first look is under way.

    `on_change(what)` is called with what was put in place ("plugin", "conflist"), `on_failure(error)` once for each
    thing that is wrong, when it is first seen.
    """

    def __init__(
        self,
        plan: Plan,
        *,
        on_change: Callable[[str], None] = lambda what: None,
        on_failure: Callable[[InstallError], None] = lambda error: None,
    ) -> None:
        self.plan = plan
        self.ready = False
        self.problem = ""
        self._on_change = on_change
        self._on_failure = on_failure
        self._stamp: tuple[int, int, int] | None = None  # of the plugin that was found to be right

    async def run(self) -> None:
        """Until cancelled; everything stays as it is then."""
        with _Watching(self.plan.net_dir, self.plan.bin_dir) as watching:
            while True:
                error = await self._try()
                if error is not None:
                    # What other programs write is not there at once.
                    await trio.sleep(SETTLE)
                    error = await self._try()
                self.ready = error is None
                if error is not None and str(error) != self.problem:
                    log.error("%s; trying again", error)
                    self._on_failure(error)
                elif error is None and self.problem:
                    log.info("the network configuration is in order again")
                self.problem = "" if error is None else str(error)
                await watching.wait(LOOK_AGAIN if error is None else TRY_AGAIN)

    async def _try(self) -> InstallError | None:
        try:
            for what in await trio.to_thread.run_sync(self.install):
                self._on_change(what)
        except InstallError as error:
            return error
        return None

    def install(self) -> list[str]:
        """Put in place what is not; what that was. Raises InstallError. Blocks."""
        done = []
        if self._put_program():
            done.append("plugin")
        # After the program: an entry without one keeps every pod from starting.
        if self._put_entry():
            done.append("conflist")
        return done

    def remove(self) -> list[InstallError]:
        """Take everything away: the entry first. What could not be. Blocks."""
        problems = []
        for step in (self._remove_entries, self._remove_program):
            try:
                step()
            except InstallError as error:
                problems.append(error)
        return problems

    def _put_program(self) -> bool:
        source, target = self.plan.program, self.plan.bin_dir / conflist.PLUGIN
        try:
            wanted = source.read_bytes()
        except OSError as error:
            raise InstallError(
                "COPY_BINARIES_FAILURE",
                f"{source}: cannot be read: {error.strerror}; build it (python -m cni.plugin.build)",
            ) from error
        try:
            found = target.stat()
            stamp = (found.st_ino, found.st_mtime_ns, found.st_mode)
            if stamp == self._stamp:
                return False
            if found.st_mode & 0o777 == 0o755 and _digest(target.read_bytes()) == _digest(wanted):
                self._stamp = stamp
                return False
        except FileNotFoundError:
            pass
        except OSError as error:
            raise self._failure("COPY_BINARIES_FAILURE", target, "read", error) from error
        try:
            _replace(target, wanted, 0o755)
        except OSError as error:
            raise self._failure("COPY_BINARIES_FAILURE", target, "written", error) from error
        log.info("the CNI plugin is in place: %s", self.plan.told(target))
        return True

    def _put_entry(self) -> bool:
        net_dir = self.plan.net_dir
        try:
            name = conflist.primary(os.listdir(net_dir))
        except OSError as error:
            raise self._failure("CREATE_CNI_CONFIG_FAILURE", net_dir, "read", error) from error
        if name is None:
            raise InstallError(
                "CREATE_CNI_CONFIG_FAILURE",
                f"{self.plan.told(net_dir)}: there is no network configuration (*.conflist, *.conf) yet; install the "
                "cluster's network plugin",
            )
        path = net_dir / name
        text = self._read(path)
        try:
            if conflist.is_list(name):
                target, fresh = path, conflist.inserted(text, self.plan.entry)
            else:
                target, fresh = (
                    net_dir / conflist.list_name(name),
                    conflist.from_single(text, self.plan.entry),
                )
        except ConflistError as error:
            raise InstallError("CREATE_CNI_CONFIG_FAILURE", f"{self.plan.told(path)}: {error}") from error
        if target == path and fresh == text:
            return False
        try:
            _replace(target, fresh.encode(), path.stat().st_mode & 0o777)
            if target != path:
                path.rename(path.with_name(path.name + conflist.KEPT_ENDING))
        except OSError as error:
            raise self._failure("CREATE_CNI_CONFIG_FAILURE", target, "written", error) from error
        log.info("the network configuration asks the mesh: %s", self.plan.told(target))
        return True

    def _read(self, path: Path) -> str:
        try:
            with path.open("rb") as file:
                data = file.read(MOST_TEXT + 1)
            if len(data) > MOST_TEXT:
                raise InstallError(
                    "CREATE_CNI_CONFIG_FAILURE",
                    f"{self.plan.told(path)}: is larger than {MOST_TEXT} bytes; restore the network's own file",
                )
            return data.decode()
        except OSError as error:
            raise self._failure("CREATE_CNI_CONFIG_FAILURE", path, "read", error) from error
        except UnicodeDecodeError as error:
            raise InstallError(
                "CREATE_CNI_CONFIG_FAILURE",
                f"{self.plan.told(path)}: it is not JSON: it is not UTF-8; restore the network's own file",
            ) from error

    def _remove_entries(self) -> None:
        net_dir = self.plan.net_dir
        try:
            names = sorted(os.listdir(net_dir))
        except FileNotFoundError:
            return
        except OSError as error:
            raise self._failure("CLEANUP_FAILURE", net_dir, "read", error) from error
        problem: InstallError | None = None
        for name in names:
            if not conflist.is_list(name):
                continue
            path = net_dir / name
            try:
                text = self._read(path)
                if not conflist.contains(text):
                    continue
                kept = [
                    net_dir / f"{path.stem}{ending}{conflist.KEPT_ENDING}"
                    for ending in conflist.SINGLE_ENDINGS
                ]
                before = next((each for each in kept if each.name in names), None)
                if before is None:
                    _replace(path, conflist.removed(text).encode(), path.stat().st_mode & 0o777)
                else:
                    before.rename(before.with_name(before.name.removesuffix(conflist.KEPT_ENDING)))
                    path.unlink()
                log.info("the network configuration asks the mesh no longer: %s", self.plan.told(path))
            except ConflistError as error:
                log.debug("%s: %s", self.plan.told(path), error)
            except OSError as error:
                problem = self._failure("CLEANUP_FAILURE", path, "written", error)
            except InstallError as error:
                problem = error
        if problem is not None:
            raise problem

    def _remove_program(self) -> None:
        target = self.plan.bin_dir / conflist.PLUGIN
        try:
            target.unlink(missing_ok=True)
        except OSError as error:
            raise self._failure("CLEANUP_FAILURE", target, "removed", error) from error

    def _failure(self, reason: str, path: Path, what: str, error: OSError) -> InstallError:
        remedy = _REMEDIES.get(error.errno or 0, "check the directory on the node")
        return InstallError(reason, f"{self.plan.told(path)}: cannot be {what}: {error.strerror}; {remedy}")


def _digest(data: bytes) -> bytes:
    return hashlib.sha256(data).digest()


def _replace(path: Path, data: bytes, mode: int) -> None:
    """Write the file at once: whoever reads it finds the old one or the new one. Raises OSError."""
    # Runtimes read files by their endings, and this is none of them.
    fresh = path.with_name(f".{path.name}.ambient-tmp")
    try:
        descriptor = os.open(fresh, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, mode)
        with os.fdopen(descriptor, "wb") as file:
            file.write(data)
            file.flush()
            os.fchmod(descriptor, mode)
            os.fsync(descriptor)
        fresh.replace(path)
    except OSError:
        fresh.unlink(missing_ok=True)
        raise


class _Watching:
    """Waits for changes in directories, which may come later."""

    def __init__(self, *directories: Path) -> None:
        self._directories = directories
        try:
            self._notifier: Notifier | None = Notifier()
        except OSError as error:
            log.warning("changes in %s are seen late: %s", directories[0], error)
            self._notifier = None

    def __enter__(self) -> "_Watching":
        return self

    def __exit__(self, *_: object) -> None:
        if self._notifier is not None:
            self._notifier.close()

    async def wait(self, limit: float) -> None:
        """Until something changes, at most `limit` seconds."""
        if self._notifier is None:
            await trio.sleep(min(limit, TRY_AGAIN))
            return
        fresh = False
        for directory in self._directories:
            try:
                fresh = self._notifier.add(directory) or fresh
            except OSError as error:
                log.warning("changes in %s are seen late: %s", directory, error)
                limit = min(limit, TRY_AGAIN)
        # What changed before it was watched was not notified.
        await self._notifier.wait(min(limit, SETTLE) if fresh else limit)
