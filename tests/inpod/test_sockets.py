"""Sockets of the proxy: how they are accepted and connected, and what is set on them."""

import errno
import os
import socket
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from ztunnel.inpod import sockets


@pytest.fixture
def listener() -> Iterator[socket.socket]:
    """On loopback, non-blocking."""
    with socket.create_server(("127.0.0.1", 0)) as made:
        made.setblocking(False)
        yield made


@pytest.fixture
def here() -> Iterator[int]:
    """A descriptor of this process's own namespace."""
    fd = os.open("/proc/self/ns/net", os.O_RDONLY | os.O_CLOEXEC)
    yield fd
    sockets.left(fd)
    os.close(fd)


class WithoutAccept:
    """A listener on another interpreter, which has none of the private parts of this one's."""

    def __init__(self, listener: socket.socket) -> None:
        self.family = listener.family
        self.accept = listener.accept


@pytest.mark.parametrize("wrap", [lambda listener: listener, WithoutAccept])
def test_accepted_sockets_do_not_block_and_say_who_it_is(
    listener: socket.socket, wrap: Callable[[socket.socket], Any]
) -> None:
    accept = sockets.acceptor(wrap(listener))
    with pytest.raises(BlockingIOError):
        accept()
    with socket.create_connection(listener.getsockname()) as client:
        accepted, peer = accept()
        try:
            assert peer == client.getsockname()
            assert not os.get_blocking(accepted.fileno())
            assert not os.get_inheritable(accepted.fileno())
            with pytest.raises(BlockingIOError):
                accepted.recv(1)
            client.sendall(b"hello")
            client.shutdown(socket.SHUT_WR)
            os.set_blocking(accepted.fileno(), True)
            assert accepted.recv(100) == b"hello"
        finally:
            accepted.close()


def test_the_kernel_says_how_many_wait(listener: socket.socket) -> None:
    assert sockets.queued(listener) == 0
    clients = [socket.create_connection(listener.getsockname()) for _ in range(3)]
    try:
        assert sockets.queued(listener) == 3
        listener.accept()[0].close()
        assert sockets.queued(listener) == 2
    finally:
        for client in clients:
            client.close()


@pytest.mark.e2e  # marks need CAP_NET_ADMIN
@pytest.mark.parametrize("source", ["", "127.9.8.7"])
def test_a_connection_within_the_machine_is_made_at_once(
    listener: socket.socket, here: int, source: str
) -> None:
    address, port = listener.getsockname()
    sock = sockets.connect(here, address, port, source)
    try:
        assert sockets.connected(sock, address, port)
        accepted, peer = listener.accept()
        accepted.close()
        assert peer == sock.getsockname()
        assert not source or (peer[0] == source and peer[1] in range(10240, 32768))
        assert not os.get_blocking(sock.fileno())
        assert sock.getsockopt(socket.SOL_SOCKET, socket.SO_MARK) == sockets.MARK
        assert sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)
        assert sock.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE)
        assert sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE) == sockets.KEEPALIVE_IDLE
        assert sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPINTVL) == sockets.KEEPALIVE_INTERVAL
        assert sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPCNT) == sockets.KEEPALIVE_PROBES
    finally:
        sock.close()


@pytest.mark.e2e
def test_a_refusal_within_the_machine_is_known_at_once(listener: socket.socket, here: int) -> None:
    address, port = listener.getsockname()
    listener.close()
    sock = sockets.connect(here, address, port)
    try:
        with pytest.raises(ConnectionRefusedError):
            sockets.connected(sock, address, port)
    finally:
        sock.close()


@pytest.mark.e2e
def test_a_connection_that_nobody_answers_yet_is_under_way(here: int) -> None:
    with socket.socket() as full:
        full.bind(("127.0.0.1", 0))
        full.listen(0)  # one may wait
        address, port = full.getsockname()
        made = [sockets.connect(here, address, port) for _ in range(3)]
        try:
            states = [sockets.connected(sock, address, port) for sock in made]
            assert states[0]
            assert not states[-1]
            assert made[-1].getsockopt(socket.SOL_SOCKET, socket.SO_ERROR) == 0
        finally:
            for sock in made:
                sock.close()


@pytest.mark.e2e
def test_an_address_that_cannot_be_is_an_error(here: int) -> None:
    with pytest.raises(OSError) as caught:
        sockets.connect(here, "255.255.255.255", 1)
    assert caught.value.errno in (errno.EACCES, errno.ENETUNREACH)


@pytest.mark.parametrize(
    ("destination", "parsed"),
    [
        (b"\x1f\x90\x0a\xf4\x02\x02", (bytes([10, 244, 2, 2]), 8080)),
        (b"\x00\x50" + bytes(15) + b"\x01", (bytes(15) + b"\x01", 80)),
    ],
)
def test_a_destination_is_a_port_and_an_address(destination: bytes, parsed: tuple[bytes, int]) -> None:
    assert sockets.parse_destination(destination) == parsed


def test_addresses_as_text() -> None:
    assert sockets.plain_address("::ffff:10.0.0.1") == "10.0.0.1"
    assert sockets.plain_address("::ffff:a00:1") == "::ffff:a00:1"
    assert sockets.plain_address("fd00::1") == "fd00::1"
    assert sockets.host_port("10.0.0.1", 80) == "10.0.0.1:80"
    assert sockets.host_port("fd00::1", 80) == "[fd00::1]:80"
