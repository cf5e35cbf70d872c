"""An answer that does not end: lines as they come, until either side has enough."""

import contextlib
import threading
from collections.abc import Iterator

import urllib3
from urllib3.exceptions import HTTPError

from ztunnel.store.kube.errors import ApiError

_READ_BYTES = 64 * 1024


class Stream:
    """The lines of an answer, without their ends; to be iterated by one thread.

    Ends with the answer, or when `close` is called, by whatever thread; raises ApiError (status 0) where the
    connection breaks or stays silent for too long.
    """

    def __init__(self, response: urllib3.BaseHTTPResponse, what: str) -> None:
        self._response = response
        self._what = what
        self._ended = threading.Event()
        self._lock = threading.Lock()
        self._reading = False

    def __iter__(self) -> Iterator[bytes]:
        with self._lock:
            if self._ended.is_set():
                return
            self._reading = True
        pending: list[bytes] = []  # pieces of a line whose end has not come: joined once, however long it is
        try:
            for data in self._response.stream(_READ_BYTES):
                start = 0
                while (end := data.find(b"\n", start)) >= 0:
                    pending.append(data[start:end])
                    line = pending[0] if len(pending) == 1 else b"".join(pending)
                    pending = []
                    start = end + 1
                    if self._ended.is_set():
                        return
                    if line:
                        yield line
                if start < len(data):
                    pending.append(data[start:])
            if pending and not self._ended.is_set():
                yield b"".join(pending)
        except (HTTPError, OSError, ValueError, AttributeError) as error:
            # The last two: what a response says whose socket another thread has just shut down.
            if self._ended.is_set():
                return
            if isinstance(error, ValueError | AttributeError):
                raise
            raise ApiError(
                0, "Broken", f"{self._what}: the connection ended ({_in_words(error)}); it is made again"
            ) from None
        finally:
            with self._lock:
                self._reading = False
                self._ended.set()
            self._release()

    def close(self) -> None:
        """End it: a thread that waits for the next line goes on at once."""
        with self._lock:
            self._ended.set()
            if self._reading:
                # The reader gets an end of file, and closes it by itself.
                with contextlib.suppress(OSError, ValueError, RuntimeError, AttributeError):
                    self._response.shutdown()
                return
        self._release()

    def _release(self) -> None:
        with contextlib.suppress(HTTPError, OSError, ValueError, AttributeError):
            self._response.close()


def _in_words(error: Exception) -> str:
    return " ".join(str(error).split())[:200] or type(error).__name__
