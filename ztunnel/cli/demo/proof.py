"""The proof: a capture on the link between the nodes that looks for the marker which the applications exchange.

The capture program runs inside a node's network namespace; here it is started, listened to and stopped.
"""

import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from typing import Any

from ztunnel.cli.errors import UserError

UPLINK = "eth0"  # a node's interface on the link between the nodes
START_SECONDS = 15.0
STOP_SECONDS = 10.0


class LineProgram:
    """A child program that prints JSON objects, one a line; the last one is kept, all are counted.

    Raises UserError where it cannot be started or prints `{"error": ...}`.
    """

    def __init__(self, name: str, argv: Sequence[str], **popen: Any) -> None:
        self.name = name
        self.latest: dict[str, Any] = {}
        self.lines = 0
        self._changed = threading.Condition()
        self._ended = False
        output, write_end = os.pipe()
        self._output = open(output, "rb")  # noqa: SIM115 - closed in _close, once the reader has ended
        try:
            self._process = subprocess.Popen(
                argv, stdin=subprocess.PIPE, stdout=write_end, start_new_session=True, **popen
            )
        finally:
            os.close(write_end)
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self) -> None:
        for line in self._output:
            try:
                latest = json.loads(line)
            except ValueError:
                continue
            with self._changed:
                self.latest = latest
                self.lines += 1
                self._changed.notify_all()
        with self._changed:
            self._ended = True
            self._changed.notify_all()

    @property
    def running(self) -> bool:
        """Whether the program may still print something."""
        return not self._ended

    def wait_line(self, seconds: float) -> bool:
        """Wait for the next line or the end, at most `seconds`; whether the program is still running."""
        with self._changed:
            before = self.lines
            self._changed.wait_for(lambda: self._ended or self.lines > before, seconds)
        return self.running

    def wait_first(self, seconds: float) -> None:
        """Wait until it has printed something. Raises UserError where it ended or took too long instead."""
        with self._changed:
            self._changed.wait_for(lambda: self._ended or self.lines > 0, seconds)
        self.check()
        if not self.lines:
            raise UserError(f"the {self.name} did not start within {seconds:.0f} s")

    def check(self) -> None:
        """Raise UserError where the program reported an error, or ended without a final report."""
        if "error" in self.latest:
            raise UserError(f"the {self.name} failed: {self.latest['error']}")
        if self._ended and not self.latest.get("done"):
            raise UserError(f"the {self.name} ended early with exit code {self._process.wait()}")

    def finish(self, seconds: float) -> dict[str, Any]:
        """Tell it to end (SIGTERM) and return its final report. Raises UserError where there is none."""
        self._process.terminate()
        return self.result(seconds)

    def result(self, seconds: float) -> dict[str, Any]:
        """Wait until it has ended by itself and return its final report. Raises UserError where there is none."""
        self._reader.join(seconds)
        if self._reader.is_alive():
            self.kill()
            raise UserError(f"the {self.name} did not end within {seconds:.0f} s")
        self.check()
        self._process.wait()
        self._close()
        return self.latest

    def kill(self) -> None:
        """End it at once, if it still runs."""
        if self._process.poll() is None:
            self._process.terminate()
            try:
                self._process.wait(2.0)
            except subprocess.TimeoutExpired:
                self._process.kill()
                self._process.wait()
        self._reader.join(2.0)
        self._close()

    def _close(self) -> None:
        if self._process.stdin is not None:
            self._process.stdin.close()
        if not self._reader.is_alive():
            self._output.close()


class LinkCapture:
    """The capture on one node's uplink, from the call until `stop`."""

    def __init__(self, on_node: Sequence[str], marker: str, **popen: Any) -> None:
        """`on_node` is the command line that runs what follows it inside the node's network namespace."""
        argv = [*on_node, sys.executable, "-P", "-m", "ztunnel.cli.demo.capture", UPLINK, "--marker", marker]
        self._program = LineProgram("capture", argv, **popen)
        try:
            self._program.wait_first(START_SECONDS)
        except BaseException:
            self._program.kill()
            raise

    @property
    def counts(self) -> dict[str, Any]:
        """The counts as of at most half a second ago: packets, bytes, sightings, dropped, gaps, ports."""
        return self._program.latest

    def wait_sighting(self, seconds: float) -> bool:
        """Wait until the marker was seen, at most `seconds`; whether it was."""
        end = time.monotonic() + seconds
        while not self.counts.get("sightings"):
            remaining = end - time.monotonic()
            if remaining <= 0 or not self._program.wait_line(remaining):
                break
        return bool(self.counts.get("sightings"))

    def stop(self) -> dict[str, Any]:
        """End the capture and return its final counts."""
        return self._program.finish(STOP_SECONDS)

    def kill(self) -> None:
        """End the capture without asking for its counts."""
        self._program.kill()
