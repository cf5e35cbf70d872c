"""The capture on a real link between two simulated nodes: it finds what crosses, and only that."""

import os
import socket
import subprocess
import sys
import threading
from functools import partial
from pathlib import Path

import pytest

from tests.cli.test_bookshop import MARKER
from ztunnel.cli.demo.proof import LineProgram
from ztunnel.cli.errors import UserError
from ztunnel.embedded.testing import Lab, until

pytestmark = pytest.mark.e2e

CAPTURE = [sys.executable, "-P", "-m", "ztunnel.cli.demo.capture", "eth0", "--marker", MARKER]


def python(*arguments: str) -> list[str]:
    return [sys.executable, "-P", "-m", *arguments]


def test_a_marker_that_crosses_the_link_is_seen_and_one_that_stays_is_not(tmp_path: Path) -> None:
    with Lab(tmp_path, nodes=2) as lab:
        shop, near, far = lab.pod("ratings", node=1), lab.pod("near", node=1), lab.pod("far", node=2)
        shop.start(python("ztunnel.cli.demo.bookshop", "ratings"), stdout=subprocess.DEVNULL)
        shop.wait_port(9080)
        load = ["--requests", "50", "--marker", MARKER]
        with lab.node(1).inside():
            capture = LineProgram("capture", CAPTURE)
        try:
            capture.wait_first(20)
            assert capture.latest["ready"] is True
            inside = near.check(python("ztunnel.cli.demo.loadgen", f"http://{shop.ip4}:9080/", *load))
            assert '"failures": 0' in inside.stdout
            assert capture.latest["sightings"] == 0
            for address in (shop.ip4, f"[{shop.ip6}]"):
                outside = far.check(python("ztunnel.cli.demo.loadgen", f"http://{address}:9080/", *load))
                assert '"failures": 0' in outside.stdout
            counts = capture.finish(10)
        finally:
            capture.kill()
    assert counts["done"] is True
    assert counts["sightings"] >= 200  # a request and an answer each
    assert counts["packets"] >= 200
    assert (counts["dropped"], counts["gaps"]) == (0, 0)
    assert counts["ports"]["9080"] >= 200


def test_a_marker_at_the_end_of_a_flood_is_seen_and_no_frame_is_missed(tmp_path: Path) -> None:
    """At full speed, but never more than the ring holds while the capture waits for a processor."""
    piece, pieces = 16 << 20, 4
    with Lab(tmp_path, nodes=2) as lab:
        receiver, sender = lab.pod("receiver", node=1), lab.pod("sender", node=2)
        with lab.node(1).inside():
            capture = LineProgram("capture", CAPTURE)
        try:
            capture.wait_first(20)
            with receiver.listen() as listener:
                listener.settimeout(20)
                with sender.connect(receiver.ip4, listener.getsockname()[1]) as connection:
                    accepted, _ = listener.accept()
                    with accepted:
                        for number in range(1, pieces + 1):
                            flood(connection, accepted, bytes(piece))
                            until(partial(seen, capture, number * piece), f"piece {number} is captured", 30)
                        flood(connection, accepted, MARKER.encode())
            counts = capture.finish(20)
        finally:
            capture.kill()
    assert counts["sightings"] >= 1
    assert (counts["dropped"], counts["gaps"]) == (0, 0)
    assert counts["bytes"] > piece * pieces


def flood(source: socket.socket, sink: socket.socket, data: bytes) -> None:
    """All the data from one end of a connection to the other."""
    thread = threading.Thread(target=source.sendall, args=(data,))
    thread.start()
    received = 0
    while received < len(data):
        received += len(sink.recv(1 << 20))
    thread.join(20)


def seen(capture: LineProgram, size: int) -> bool:
    """Whether the capture has reported that many bytes. Raises AssertionError when it has reported a loss."""
    assert capture.latest["dropped"] == 0
    return bool(capture.latest["bytes"] >= size)


def test_a_capture_ends_with_those_who_asked_for_it_and_says_why_it_cannot(tmp_path: Path) -> None:
    with Lab(tmp_path, nodes=1) as lab:
        node = lab.node(1)
        ended = node.check(CAPTURE, stdin=subprocess.DEVNULL)
        assert ended.returncode == 0
        assert '"done": true' in ended.stdout
        with node.inside():
            wrong = LineProgram("capture", [*CAPTURE[:4], "nowhere0", "--marker", MARKER])
        with pytest.raises(UserError, match="the capture failed: cannot capture on nowhere0"):
            wrong.wait_first(20)
        wrong.kill()


def test_a_program_that_ends_without_a_report_is_an_error() -> None:
    program = LineProgram("capture", [sys.executable, "-c", "import sys; print('no json'); sys.exit(3)"])
    with pytest.raises(UserError, match="the capture ended early with exit code 3"):
        program.wait_first(20)
    program.kill()
    silent = LineProgram("load generator", [sys.executable, "-c", "import sys; sys.stdin.read()"])
    with pytest.raises(UserError, match="did not start within 0 s"):
        silent.wait_first(0.2)
    silent.kill()
    assert not silent.running
    assert not os.path.exists(f"/proc/{silent._process.pid}")
