"""Listeners give way to others of their port: who waits at a closed one is not lost, and who listens is known."""

import os
import socket
from collections.abc import Iterator
from pathlib import Path

import pytest

from ztunnel.embedded.testing import until
from ztunnel.inpod import handover, netns, sockets

pytestmark = pytest.mark.e2e
WAITING = 64
MS_REMOUNT_READ_ONLY = netns.MS_BIND | 32 | 1  # MS_REMOUNT, MS_RDONLY
MS_PRIVATE = 1 << 18


@pytest.fixture
def space() -> Iterator[int]:
    """A network namespace with a loopback interface that is up."""
    with_lo = netns.in_new_thread(_make)
    yield with_lo
    sockets.left(with_lo)
    os.close(with_lo)


def _make() -> int:
    from pyroute2 import IPRoute

    netns.unshare(netns.CLONE_NEWNET)
    with IPRoute() as ipr:
        ipr.link("set", index=1, state="up")
    return netns.open_path("/proc/thread-self/ns/net")


@pytest.mark.parametrize("address", ["127.0.0.1", "::1"])
def test_who_waits_at_a_closed_listener_is_served_by_another(space: int, address: str) -> None:
    with netns.inside(space):
        assert not handover.migrates()
        assert handover.migrate_on_close()
        assert handover.migrates()
        old, new = sockets.listen(15008), sockets.listen(15008)
        family = socket.AF_INET6 if ":" in address else socket.AF_INET
        clients = [socket.socket(family) for _ in range(WAITING)]
    with new:
        for number, client in enumerate(clients):
            client.settimeout(5)
            client.connect((address, 15008))
            client.sendall(bytes([number]))
        shared = sockets.queued(old)
        assert shared, "the kernel spreads them over both"
        old.close()
        until(lambda: sockets.queued(new) == WAITING, "all wait at the other one")
        new.settimeout(5)
        numbers = set()
        for _ in clients:
            accepted, _ = new.accept()
            with accepted:
                accepted.settimeout(5)
                numbers.add(accepted.recv(1)[0])
        assert numbers == set(range(WAITING))
    for client in clients:
        client.close()


def test_it_is_known_who_listens_on_a_port(space: int) -> None:
    home = netns.open_path("/proc/thread-self/ns/net")
    with netns.inside(space):
        found = [sockets.listen(15008), sockets.listen(15008)]
        other = sockets.listen(15001)
    try:
        inodes = {os.fstat(one.fileno()).st_ino for one in found}
        assert handover.listening(space, 15008) == inodes
        assert handover.listening(space, 15006) == set()
        found.pop().close()
        assert handover.listening(space, 15008) == {os.fstat(found[0].fileno()).st_ino}
    finally:
        netns.setns(home)
        os.close(home)
        for one in (*found, other):
            one.close()


def test_connections_migrate_where_proc_sys_is_read_only(space: int) -> None:
    """As it is in a container: nothing else is mounted for it, and only this namespace changes."""

    def in_container() -> tuple[bool, bool, set[str], set[str]]:
        netns.unshare(netns.CLONE_NEWNS)
        netns.mount("none", "/", netns.MS_REC | MS_PRIVATE)
        netns.mount("/proc/sys", "/proc/sys", netns.MS_BIND)
        netns.mount("none", "/proc/sys", MS_REMOUNT_READ_ONLY)
        before = _mounts()
        with netns.inside(space):
            with pytest.raises(OSError, match="Read-only"):
                handover.MIGRATE.write_text("1")
            found = handover.migrate_on_close()
        return found, handover.migrates(), before, _mounts()

    here = handover.migrates()
    found, outside, before, after = netns.in_new_thread(in_container)
    assert found
    assert outside == here
    assert before == after


def _mounts() -> set[str]:
    return set(Path("/proc/thread-self/mountinfo").read_text().splitlines())
