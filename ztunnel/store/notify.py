"""inotify(7) by system call: which files of a directory tree changed, awaited with trio, without a thread.

Only wake-ups come from here. What a change means is decided by looking at the files, because the kernel may drop
events (its queue is bounded) and a new directory can fill before it is watched.
"""

import ctypes
import errno
import os
import struct
from pathlib import Path

import trio

IN_ATTRIB = 0x4
IN_CLOSE_WRITE = 0x8
IN_MOVED_FROM = 0x40
IN_MOVED_TO = 0x80
IN_CREATE = 0x100
IN_DELETE = 0x200
IN_DELETE_SELF = 0x400
IN_MOVE_SELF = 0x800
IN_UNMOUNT = 0x2000
IN_Q_OVERFLOW = 0x4000
IN_IGNORED = 0x8000
IN_ONLYDIR = 0x01000000
IN_ISDIR = 0x40000000

# Not IN_MODIFY: an editor that truncates and writes would be read between the two; closing the file tells.
_MASK = (
    IN_ATTRIB
    | IN_CLOSE_WRITE
    | IN_MOVED_FROM
    | IN_MOVED_TO
    | IN_CREATE
    | IN_DELETE
    | IN_DELETE_SELF
    | IN_MOVE_SELF
    | IN_ONLYDIR
)
_EVENT = struct.Struct("iIII")

_libc = ctypes.CDLL(None, use_errno=True)

# Bursts (an editor's several steps, `kubectl`-like writers of many files) become one wake-up: quiet for the first,
# at the latest after the second. Seconds.
_QUIET = 0.01
_LATEST = 0.05


class Notifier:
    """Watches a directory tree, for one task.

    Raises OSError when made where the kernel's limits on inotify are reached (fs.inotify.max_user_instances).
    """

    def __init__(self) -> None:
        self._fd: int = _libc.inotify_init1(os.O_NONBLOCK | os.O_CLOEXEC)
        if self._fd < 0:
            code = ctypes.get_errno()
            raise OSError(code, f"inotify: {os.strerror(code)}")
        self._directories: dict[int, Path] = {}
        self.idle = False  # the last `wait` ended because its time was over

    def close(self) -> None:
        """Stop watching; may be called twice."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1

    def add(self, directory: Path) -> bool:
        """Watch one directory (not those in it). True if it was not watched before and is there.

        Raises OSError where the kernel's limit is reached (fs.inotify.max_user_watches).
        """
        wd = _libc.inotify_add_watch(self._fd, os.fsencode(directory), _MASK)
        if wd < 0:
            code = ctypes.get_errno()
            if code in (errno.ENOENT, errno.ENOTDIR, errno.EACCES, errno.ELOOP):
                return False
            raise OSError(code, f"inotify: {os.strerror(code)}")
        fresh = wd not in self._directories
        self._directories[wd] = directory
        return fresh

    async def wait(self, limit: float) -> set[Path] | None:
        """Wait for changes, at most `limit` seconds. The paths that changed; None: look at everything.

        The set is empty if what changed does not count; None is also the answer after `limit` seconds.
        """
        with trio.move_on_after(limit):
            await trio.lowlevel.wait_readable(self._fd)
        events = self._read()
        self.idle = not events
        if self.idle:
            return None
        deadline = trio.current_time() + _LATEST
        while True:
            # On a busy machine the deadline may be over by now.
            with trio.move_on_at(min(trio.current_time() + _QUIET, deadline)):
                await trio.lowlevel.wait_readable(self._fd)
            more = self._read()
            if not more:
                break
            events += more
            if trio.current_time() >= deadline:
                break
        return self._meaning(events)

    def _read(self) -> list[tuple[int, int, bytes]]:
        events: list[tuple[int, int, bytes]] = []
        while True:
            try:
                data = os.read(self._fd, 65536)
            except BlockingIOError:
                return events
            place = 0
            while place < len(data):
                wd, mask, _, length = _EVENT.unpack_from(data, place)
                place += _EVENT.size
                events.append((wd, mask, data[place : place + length].rstrip(b"\0")))
                place += length

    def _meaning(self, events: list[tuple[int, int, bytes]]) -> set[Path] | None:
        paths = set[Path]()
        everything = False
        for wd, mask, name in events:
            directory = self._directories.get(wd)
            if mask & IN_IGNORED:
                self._directories.pop(wd, None)
            if mask & (IN_Q_OVERFLOW | IN_ISDIR | IN_DELETE_SELF | IN_MOVE_SELF | IN_UNMOUNT | IN_IGNORED):
                everything = True
            elif name.startswith(b".."):
                # ConfigMap volumes: `..data` is a link to the directory with the files' present contents.
                everything = True
            elif directory is not None and name and not name.startswith(b"."):
                paths.add(directory / os.fsdecode(name))
        return None if everything else paths
