"""What a container runtime gives a program: namespaces, its own /etc/hosts and resolv.conf, fewer capabilities.

A thread made for each start enters the namespaces and starts the program, which inherits them from the thread.
So nothing runs between the two, a missing program is told at once, and a start takes a few milliseconds.
"""

import contextlib
import ctypes
import os
import signal
import socket
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import IO

from ztunnel.inpod import netns

Stream = int | IO[bytes] | None

CLONE_FS = 0x00000200
CLONE_NEWUTS = 0x04000000
MS_SLAVE = 1 << 19
PR_CAPBSET_DROP = 24

# What container runtimes leave to a program that runs as root, by number (linux/capability.h): CHOWN,
# DAC_OVERRIDE, FOWNER, FSETID, KILL, SETGID, SETUID, SETPCAP, NET_BIND_SERVICE, SYS_CHROOT, MKNOD, AUDIT_WRITE,
# SETFCAP. Not NET_RAW, which most of them leave too: since Linux 5.17 it is enough to set a packet mark, and with
# the proxy's own mark a program would pass the redirection by. `ping` works without it (net.ipv4.ping_group_range).
CONTAINER_CAPABILITIES = frozenset({0, 1, 3, 4, 5, 6, 7, 8, 10, 18, 27, 29, 31})
LAST_CAPABILITY = Path("/proc/sys/kernel/cap_last_cap")

_libc = ctypes.CDLL(None, use_errno=True)


class SandboxError(Exception):
    """A pod's namespaces could not be made; the message says why."""


def _setns(fd: int, kind: int) -> None:
    if _libc.setns(fd, kind) != 0:
        code = ctypes.get_errno()
        raise OSError(code, f"setns: {os.strerror(code)}")


def drop_capabilities() -> None:
    """What the calling thread starts from now on has no more capabilities than a container has."""
    for capability in range(int(LAST_CAPABILITY.read_text()) + 1):
        if (
            capability not in CONTAINER_CAPABILITIES
            and _libc.prctl(PR_CAPBSET_DROP, capability, 0, 0, 0) != 0
        ):
            code = ctypes.get_errno()
            raise OSError(code, f"dropping capability {capability}: {os.strerror(code)}")


def etc_files(directory: Path, name: str, namespace: str, addresses: Sequence[str], dns: str) -> list[Path]:
    """Write the files of /etc that differ in a pod into `directory`; return them."""
    search = f"{namespace}.svc.cluster.local svc.cluster.local cluster.local"
    files = {
        "resolv.conf": f"nameserver {dns}\nsearch {search}\noptions ndots:5\n",
        "hosts": "127.0.0.1\tlocalhost\n::1\tlocalhost ip6-localhost ip6-loopback\n"
        + "".join(f"{address}\t{name}\n" for address in addresses),
    }
    with contextlib.suppress(OSError):
        # A machine's name service may ask its own daemon (resolve, mdns) before, or instead of, resolv.conf.
        lines = Path("/etc/nsswitch.conf").read_text().splitlines()
        kept = [line for line in lines if not line.lstrip().startswith("hosts:")]
        files["nsswitch.conf"] = "\n".join([*kept, "hosts: files dns", ""])
    directory.mkdir(mode=0o755, parents=True, exist_ok=True)
    written = []
    for file, text in files.items():
        path = directory / file
        path.write_text(text)
        path.chmod(0o644)
        written.append(path)
    return written


class Started:
    """A program that runs in a sandbox, with everything it starts: they share a mount namespace of their own.

    `close()` when the program has ended and what it left behind was killed.
    """

    def __init__(self, process: subprocess.Popen[bytes], mounts: int) -> None:
        self.process = process
        # As long as the descriptor is open the number cannot come to mean another namespace.
        self._mounts = mounts
        self._identity = _identity(mounts)

    def kill(self) -> int:
        """SIGKILL to the program and all that it has started; how many there were."""
        return _kill(self._identity)

    def close(self) -> None:
        """Close the descriptor. May be called twice."""
        if self._mounts >= 0:
            os.close(self._mounts)
            self._mounts = -1


class Sandbox:
    """The namespaces of one pod: the network's, which exists, and mounts and host name of its own.

    `close()` gives the descriptors back; the namespaces live as long as programs in them do.
    """

    def __init__(self, network: Path, hostname: str, etc: Sequence[Path]) -> None:
        self._network = netns.open_path(network)
        self._mounts = self._names = -1
        try:
            self._mounts, self._names = netns.in_new_thread(lambda: _private(hostname[:63], etc))
        except OSError as error:
            self.close()
            raise SandboxError(f"no private mounts: {error}") from error
        self._identity = _identity(self._mounts)

    def start(
        self,
        argv: Sequence[str],
        env: Mapping[str, str],
        *,
        cwd: str | None = None,
        stdin: Stream = subprocess.DEVNULL,
        stdout: Stream = None,
        stderr: Stream = None,
    ) -> Started:
        """Start a program that can be ended with all that it will have started.

        Raises FileNotFoundError and PermissionError, their `filename` being what is missing or forbidden, and
        OSError.
        """

        def run() -> Started:
            self._enter()
            netns.unshare(netns.CLONE_NEWNS)
            mounts = os.open("/proc/thread-self/ns/mnt", os.O_RDONLY | os.O_CLOEXEC)
            try:
                return Started(_popen(argv, env, cwd, stdin, stdout, stderr), mounts)
            except BaseException:
                os.close(mounts)
                raise

        return netns.in_new_thread(run)

    def run_beside(
        self,
        argv: Sequence[str],
        env: Mapping[str, str],
        *,
        stdin: Stream = None,
        stdout: Stream = None,
        stderr: Stream = None,
    ) -> subprocess.Popen[bytes]:
        """Start a program beside the pod's own, which `kill` ends with the pod. Raises as `start` does."""

        def run() -> subprocess.Popen[bytes]:
            self._enter()
            return _popen(argv, env, None, stdin, stdout, stderr)

        return netns.in_new_thread(run)

    def _enter(self) -> None:
        netns.unshare(CLONE_FS)  # a thread that shares its root and cwd may not change its mounts
        _setns(self._mounts, netns.CLONE_NEWNS)
        _setns(self._names, CLONE_NEWUTS)
        netns.setns(self._network)
        drop_capabilities()

    def kill(self) -> int:
        """SIGKILL to everything that was started beside the pod's programs; how many there were."""
        return _kill(self._identity)

    def close(self) -> None:
        """Close the descriptors. May be called twice."""
        for fd in (self._network, self._mounts, self._names):
            if fd >= 0:
                os.close(fd)
        self._network = self._mounts = self._names = -1


def _popen(
    argv: Sequence[str],
    env: Mapping[str, str],
    cwd: str | None,
    stdin: Stream,
    stdout: Stream,
    stderr: Stream,
) -> subprocess.Popen[bytes]:
    return subprocess.Popen(
        list(argv),
        env=dict(env),
        cwd=cwd or "/",
        stdin=stdin,
        stdout=stdout,
        stderr=stderr,
        start_new_session=True,
    )


def _identity(mounts: int) -> str:
    return os.readlink(f"/proc/self/fd/{mounts}")


def _kill(identity: str) -> int:
    """SIGKILL to every process that has these mounts (a scan of /proc); how many there were."""
    found = 0
    for entry in os.listdir("/proc"):
        if entry.isdigit():
            with contextlib.suppress(OSError):
                if os.readlink(f"/proc/{entry}/ns/mnt") == identity:
                    os.kill(int(entry), signal.SIGKILL)
                    found += 1
    return found


def _private(hostname: str, etc: Sequence[Path]) -> tuple[int, int]:
    """In a new thread: new mounts and host name; return a descriptor of each namespace."""
    netns.unshare(netns.CLONE_NEWNS | CLONE_NEWUTS)
    # A slave sees what is unmounted outside: else every namespace mounted now would live as long as this pod.
    netns.mount("none", "/", netns.MS_REC | MS_SLAVE)
    for file in etc:
        target = f"/etc/{file.name}"
        if not Path(target).exists():
            raise FileNotFoundError(
                2, f"{target} is missing on this machine, so that the pod's cannot cover it"
            )
        netns.mount(str(file), target, netns.MS_BIND)
    socket.sethostname(hostname)
    mounts = os.open("/proc/thread-self/ns/mnt", os.O_RDONLY | os.O_CLOEXEC)
    try:
        return mounts, os.open("/proc/thread-self/ns/uts", os.O_RDONLY | os.O_CLOEXEC)
    except BaseException:
        os.close(mounts)
        raise
