"""Requests from inside a pod that need no API server: a thread of the test whose sockets are in the pod's namespace."""

import os
import socket
import threading
import time
from typing import Self

from tests.kube.lab import Lab
from ztunnel.embedded.testing import until
from ztunnel.inpod import netns

TIMEOUT = 10.0
PAUSE = 0.05


class Asking:
    """One request after the other, each on a connection of its own, during the block; the block's end asserts nothing.

    `times`: when each was answered as it should; `failures`: when one was not, and how (both seconds of the block).
    """

    def __init__(self, lab: Lab, namespace: str, pod: str, address: tuple[str, int], words: bytes) -> None:
        self.times: list[float] = []
        self.failures: list[tuple[float, str]] = []
        self._namespace = netns.open_path(f"/proc/{lab.pod_pid(namespace, pod)}/ns/net")
        self._address = address
        self._words = words
        self._end = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._began = time.monotonic()

    def __enter__(self) -> Self:
        self._began = time.monotonic()
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._end.set()
        self._thread.join()
        os.close(self._namespace)

    @property
    def now(self) -> float:
        return time.monotonic() - self._began

    def wait(self, count: int, limit: float) -> None:
        """Until so many more were answered."""
        target = len(self.times) + count
        until(
            lambda: len(self.times) >= target,
            f"{count} requests more are answered: {self.failures[-1:]}",
            limit,
        )

    def go_on(self, seconds: float) -> None:
        """For so long, which is what the test is about."""
        end = self.now + seconds
        until(lambda: self.now >= end, "time passes", seconds + 10, step=0.2)

    def _run(self) -> None:
        netns.setns(self._namespace)
        while not self._end.wait(PAUSE):
            try:
                self._one()
                self.times.append(self.now)
            except OSError as error:
                self.failures.append((self.now, repr(error)))

    def _one(self) -> None:
        with socket.create_connection(self._address, TIMEOUT) as connection:
            connection.sendall(b"GET / HTTP/1.1\r\nHost: reviews\r\nConnection: close\r\n\r\n")
            answer = b""
            while data := connection.recv(65536):
                answer += data
        if not answer.startswith(b"HTTP/1.1 200") or self._words not in answer:
            raise ConnectionError(f"another answer: {answer[:200]!r}")
