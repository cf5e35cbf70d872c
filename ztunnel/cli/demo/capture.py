"""Watches one link for a marker with scapy's AF_PACKET socket; started inside the network namespace of a node.

Prints JSON lines: `{"ready": true}` once it listens, then the counts so far twice a second and at its end, which
is SIGTERM, SIGINT or the end of its standard input.
"""

import argparse
import json
import select
import signal
import socket
import sys
import time
from collections.abc import Sequence

from ztunnel.cli.demo.detector import Detector
from ztunnel.cli.wire.link import open_link
from ztunnel.cli.wire.ring import RETIRE_MS, Ring

REPORT_SECONDS = 0.5
LAST_FRAMES_SECONDS = 3 * RETIRE_MS / 1000


def watch(
    source: socket.socket, ring: Ring, detector: Detector, stop: socket.socket, control: int | None
) -> None:
    """Feed the detector from the ring and report, until `stop` has something to read or `control` ends."""
    lost = 0

    def report(**more: object) -> None:
        nonlocal lost
        lost += ring.dropped()
        counts = {
            "packets": detector.packets,
            "bytes": detector.bytes,
            "sightings": detector.sightings,
            "dropped": lost,
            "gaps": detector.gaps,
            "ports": dict(detector.ports),
        }
        print(json.dumps(more | counts), flush=True)

    poller = select.poll()
    for each in (source, stop, control):
        if each is not None:
            poller.register(each, select.POLLIN)
    report(ready=True)
    due = time.monotonic() + REPORT_SECONDS
    while True:
        ready = {fd for fd, _ in poller.poll(max(0.0, due - time.monotonic()) * 1000)}
        for frame in ring.frames():
            detector.frame(frame)
        if time.monotonic() >= due:
            report()
            due = time.monotonic() + REPORT_SECONDS
        if stop.fileno() in ready or control in ready:
            break
    # The block that is being filled comes when it is full or some milliseconds old.
    time.sleep(LAST_FRAMES_SECONDS)
    for frame in ring.frames():
        detector.frame(frame)
    detector.finish()
    report(done=True)


def main(arguments: Sequence[str] | None = None) -> int:
    """Watch as told by the command line; exit code 0, or 1 where the interface cannot be captured from."""
    parser = argparse.ArgumentParser(prog="capture", description="Watch a link for a marker.")
    parser.add_argument("interface")
    parser.add_argument("--marker", required=True)
    options = parser.parse_args(arguments)
    wake, woken = socket.socketpair()
    wake.setblocking(False)
    signal.set_wakeup_fd(wake.fileno())
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: None)
    try:
        link = open_link(options.interface)
        ring = Ring(link.ins)
    except OSError as error:
        print(json.dumps({"error": f"cannot capture on {options.interface}: {error}"}), flush=True)
        return 1
    try:
        control = sys.stdin.fileno() if sys.stdin else None
        watch(link.ins, ring, Detector(options.marker.encode()), woken, control)
    except BrokenPipeError:
        return 1  # nobody reads the counts any more
    finally:
        ring.close()
        link.close()
    return 0


if __name__ == "__main__":
    sys.exit(main())
