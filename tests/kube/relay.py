"""Brings connections from the host's loopback to a lab's API server: the listener is made in the host's network
namespace, the connections in the lab's. Started as a program: relay.py LISTENER_FD NETNS ADDRESS PORT.

Uses the standard library only: it starts at once and stays small. Two threads a connection; an end of one direction
is passed on as such, so that upgraded connections (exec, port-forward) may half-close.
"""

import contextlib
import ctypes
import os
import socket
import sys
import threading

CLONE_NEWNET = 0x40000000
SIZE = 1 << 18
CONNECT_LIMIT = 5.0


def main() -> None:
    fd, namespace, address, port = int(sys.argv[1]), sys.argv[2], sys.argv[3], int(sys.argv[4])
    listener = socket.socket(fileno=fd)
    if not sys.stdin.readline():
        return  # the starter was killed before it wrote this process down
    libc = ctypes.CDLL(None, use_errno=True)
    entry = os.open(namespace, os.O_RDONLY)
    if libc.setns(entry, CLONE_NEWNET) != 0:
        sys.exit(f"setns {namespace}: {os.strerror(ctypes.get_errno())}")
    os.close(entry)
    threading.stack_size(1 << 17)
    while True:
        client, _ = listener.accept()
        threading.Thread(target=_serve, args=(client, (address, port)), daemon=True).start()


def _serve(client: socket.socket, target: tuple[str, int]) -> None:
    with client:
        try:
            server = socket.create_connection(target, CONNECT_LIMIT)
        except OSError:
            return  # the API server is down: its clients see a connection that ends
        with server:
            server.settimeout(None)
            for side in (client, server):
                side.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            back = threading.Thread(target=_copy, args=(server, client), daemon=True)
            back.start()
            _copy(client, server)
            back.join()


def _copy(source: socket.socket, target: socket.socket) -> None:
    buffer = bytearray(SIZE)
    view = memoryview(buffer)
    try:
        while size := source.recv_into(buffer):
            target.sendall(view[:size])
        target.shutdown(socket.SHUT_WR)
    except OSError:
        # One side is broken: neither is of use any more.
        for side in (source, target):
            with contextlib.suppress(OSError):
                side.shutdown(socket.SHUT_RDWR)


if __name__ == "__main__":
    main()
