"""Network namespaces by system call: enter, create, name, remove, and find who lives in one.

Only system calls live here, no netlink: the proxy's workers import this file. A namespace is named by a file
on which it is bind-mounted (as `ip netns` and container runtimes do), or by an open descriptor.
"""

import contextlib
import ctypes
import os
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TypeVar

T = TypeVar("T")

CLONE_NEWNS = 0x00020000
CLONE_NEWUSER = 0x10000000
CLONE_NEWNET = 0x40000000
MS_BIND = 0x1000
MS_REC = 0x4000
MNT_DETACH = 2

_libc = ctypes.CDLL(None, use_errno=True)
_setns = _libc.setns
_setns.argtypes = (ctypes.c_int, ctypes.c_int)


def _checked(result: int, what: str) -> None:
    if result != 0:
        code = ctypes.get_errno()
        raise OSError(code, f"{what}: {os.strerror(code)}")


def setns(fd: int) -> None:
    """Move the calling thread into the network namespace open as `fd` (setns(2)). Raises OSError."""
    if _setns(fd, CLONE_NEWNET) != 0:
        code = ctypes.get_errno()
        raise OSError(code, f"setns: {os.strerror(code)}")


def unshare(flags: int) -> None:
    """Give the calling thread new namespaces (unshare(2)), `flags` being CLONE_NEW*. Raises OSError."""
    _checked(_libc.unshare(flags), "unshare")


def mount(source: str, target: str, flags: int) -> None:
    """mount(2) without a file system type, for bind mounts and propagation changes. Raises OSError."""
    _checked(
        _libc.mount(source.encode(), target.encode(), None, ctypes.c_ulong(flags), None), f"mount on {target}"
    )


def unmount(target: str) -> None:
    """Detach what is mounted on `target` (umount2 with MNT_DETACH). Raises OSError."""
    _checked(_libc.umount2(target.encode(), MNT_DETACH), f"unmount {target}")


def open_path(path: str | Path) -> int:
    """A close-on-exec descriptor of the namespace that the file `path` names. Raises OSError."""
    return os.open(path, os.O_RDONLY | os.O_CLOEXEC)


def inode(namespace: int | str | Path) -> int:
    """The number that identifies a namespace (an open descriptor or a path); equal means the same one."""
    return os.stat(namespace).st_ino


@contextlib.contextmanager
def inside(fd: int) -> Iterator[None]:
    """Run the block in the namespace open as `fd`; the thread is moved back at its end.

    Sockets made inside stay there. Must not be held across an await: other tasks share the thread.
    """
    home = os.open("/proc/thread-self/ns/net", os.O_RDONLY | os.O_CLOEXEC)
    try:
        setns(fd)
        try:
            yield
        finally:
            setns(home)
    finally:
        os.close(home)


def in_new_thread(function: Callable[[], T]) -> T:
    """Run `function` in a thread made for it, which ends after it: it may change that thread's namespaces."""
    result: list[T] = []
    failure: list[BaseException] = []

    def run() -> None:
        try:
            result.append(function())
        except BaseException as error:  # handed to the caller's thread below
            failure.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    if failure:
        raise failure[0]
    return result[0]


def create(path: str | Path, prepare: Callable[[int], None] = lambda namespace: None) -> None:
    """Make a network namespace and bind-mount it on the file `path`, which is made (mode 0600).

    `prepare(descriptor)` runs inside, before the namespace has its name: whoever finds it under `path` finds it whole.
    It lives until `remove(path)` and its last process and socket. Raises OSError (FileExistsError where the file
    is there) and what `prepare` raises; then nothing is left.
    """
    os.close(os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY | os.O_CLOEXEC, 0o600))

    def make() -> None:
        unshare(CLONE_NEWNET)
        namespace = open_path("/proc/thread-self/ns/net")
        try:
            prepare(namespace)
        finally:
            os.close(namespace)
        mount("/proc/thread-self/ns/net", str(path), MS_BIND)

    try:
        in_new_thread(make)
    except BaseException:
        os.unlink(path)
        raise


def remove(path: str | Path) -> None:
    """Undo `create`: unmount and delete the file. A path that is not there, or not mounted, is no error."""
    with contextlib.suppress(OSError):
        unmount(str(path))
    with contextlib.suppress(FileNotFoundError):
        os.unlink(path)


def processes(namespace: int | str | Path) -> list[int]:
    """The pids of the processes whose network namespace is this one (a scan of /proc)."""
    wanted = f"net:[{inode(namespace)}]"
    found = []
    for entry in os.listdir("/proc"):
        if entry.isdigit():
            with contextlib.suppress(OSError):
                if os.readlink(f"/proc/{entry}/ns/net") == wanted:
                    found.append(int(entry))
    return found
