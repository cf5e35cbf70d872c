"""What passes a network interface inside a namespace, for tests that look for plaintext."""

import os
import socket
import threading
from typing import Self

from ztunnel.inpod import netns

ETH_P_ALL = 3
SO_RCVBUFFORCE = 33


class Capture:
    """All frames of `interface` in the network namespace of process `pid`, during the block, in `frames`."""

    def __init__(self, pid: int, interface: str) -> None:
        self.frames: list[bytes] = []
        self._socket = netns.in_new_thread(lambda: _socket(pid, interface))
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._end = False

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        """What has arrived before the end of the block is in `frames` after it."""
        self._end = True
        self._thread.join()
        self._socket.close()

    def seen(self, marker: bytes) -> int:
        """In how many frames the marker can be read."""
        return sum(marker in frame for frame in self.frames)

    def _run(self) -> None:
        while True:
            try:
                self.frames.append(self._socket.recv(1 << 18))
            except TimeoutError:
                if self._end:
                    return
            except OSError:
                return  # the interface has gone with its namespace


def _socket(pid: int, interface: str) -> socket.socket:
    namespace = netns.open_path(f"/proc/{pid}/ns/net")
    try:
        with netns.inside(namespace):
            opened = socket.socket(socket.AF_PACKET, socket.SOCK_RAW, socket.htons(ETH_P_ALL))
            opened.setsockopt(socket.SOL_SOCKET, SO_RCVBUFFORCE, 64 << 20)
            opened.bind((interface, ETH_P_ALL))
    finally:
        os.close(namespace)
    opened.settimeout(0.2)
    return opened
