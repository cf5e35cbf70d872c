"""python prober.py HOST PORT: asks an HTTP server again and again, each time on a new connection, and tells of changes.

A line `up TIME` or `down TIME` whenever the outcome is another than before, TIME being that of the machine's monotonic
clock when it was known. Ends when its standard input does. Nothing but the standard library: it runs in a pod.
"""

import select
import socket
import sys
import time

REQUEST = b"GET / HTTP/1.1\r\nHost: server\r\nConnection: close\r\n\r\n"
PAUSE = 0.002  # seconds between two connections, of which each takes 1 ms
LIMIT = 5.0


def answers(address: tuple[str, int]) -> bool:
    """Whether a request is answered."""
    try:
        with socket.create_connection(address, LIMIT) as connection:
            connection.sendall(REQUEST)
            return connection.recv(4096).startswith(b"HTTP/1.1 200 ")
    except OSError:
        return False


def main(host: str, port: int) -> None:
    """Ask until nobody listens any more."""
    before: bool | None = None
    while not select.select([sys.stdin], [], [], PAUSE)[0]:
        now = answers((host, port))
        if now != before:
            print(f"{'up' if now else 'down'} {time.monotonic()}", flush=True)
            before = now


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]))
