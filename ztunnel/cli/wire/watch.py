"""Captures from one interface and tells of its flows: the program behind `ambient capture`, started inside the mesh.

`python -m ztunnel.cli.wire.watch --interface eth0 [--netns FILE] ...` prints JSON lines: {"ready": true}, an
object for each flow once it is known what it carries, with --packets one for each packet, and at the end
{"done": true} with all flows and counts. It ends after --duration, --count packets, at SIGTERM or SIGINT.
"""

import argparse
import contextlib
import ipaddress
import json
import os
import select
import signal
import socket
import struct
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, BinaryIO

from ztunnel.cli.wire.flows import Flows
from ztunnel.cli.wire.frames import parse
from ztunnel.cli.wire.link import open_link
from ztunnel.cli.wire.ring import RETIRE_MS, Frame, Ring

NAMESPACES = Path("/var/run/netns")
LAST_FRAMES_SECONDS = 3 * RETIRE_MS / 1000
SNAPLEN = 262144
LINKTYPE_ETHERNET = 1
_pcap_file = struct.Struct("=IHHiIII")
_pcap_packet = struct.Struct("=IIII")
PCAP_NANOSECONDS = 0xA1B23C4D  # pcap-savefile(5)


class Pcap:
    """A file of packets in the format of pcap-savefile(5), with nanoseconds."""

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        file.write(_pcap_file.pack(PCAP_NANOSECONDS, 2, 4, 0, 0, SNAPLEN, LINKTYPE_ETHERNET))

    def write(self, frame: Frame) -> None:
        """Add a frame."""
        data = frame.data[:SNAPLEN]
        self._file.write(_pcap_packet.pack(frame.seconds, frame.nanoseconds, len(data), frame.length) + data)

    def close(self) -> None:
        """Write what is left."""
        self._file.close()


class Watch:
    """Takes frames and tells of them."""

    def __init__(self, pcap: Pcap | None, packets: bool, most: int) -> None:
        self.flows = Flows()
        self.packets = 0
        self.bytes = 0
        self._pcap = pcap
        self._each = packets
        self._most = most

    @property
    def full(self) -> bool:
        """Whether there have been as many packets as were asked for."""
        return bool(self._most) and self.packets >= self._most

    def take(self, frame: Frame) -> None:
        """One frame."""
        self.packets += 1
        self.bytes += frame.length
        if self._pcap is not None:
            self._pcap.write(frame)
        if self._each:
            tell(
                {
                    "packet": summary(frame.data),
                    "time": frame.seconds + frame.nanoseconds / 1e9,
                    "bytes": frame.length,
                }
            )
        segment = parse(frame.data)
        if segment is not None:
            flow = self.flows.add(segment, frame.seconds)
            if flow is not None:
                tell({"flow": flow.describe(), "time": frame.time})

    def done(self, dropped: int) -> dict[str, Any]:
        """The last line."""
        return {
            "done": True,
            "packets": self.packets,
            "bytes": self.bytes,
            "dropped": dropped,
            "forgotten": self.flows.forgotten,
            "flows": [flow.describe() for flow in self.flows],
        }


def tell(what: dict[str, Any]) -> None:
    """A line."""
    print(json.dumps(what), flush=True)


def summary(frame: bytes) -> str:
    """The frame in a line, as scapy puts it."""
    from scapy.layers.inet6 import IPv6  # noqa: F401  makes scapy know IPv6
    from scapy.layers.l2 import Ether

    return str(Ether(frame).summary())


def namespace_of(address: str) -> Path:
    """The namespace among those that the node's runtime has named in which an address is. Raises OSError."""
    from cni.places import addresses_in

    for path in sorted(NAMESPACES.iterdir()):
        with contextlib.suppress(OSError):
            if ipaddress.ip_address(address) in addresses_in(path):
                return path
    raise OSError(f"no network namespace below {NAMESPACES} has the address {address}")


def run(
    link: Any,
    ring: Ring,
    watch: Watch,
    stop: socket.socket,
    duration: float | None,
    *,
    until_eof: bool = False,
) -> int:
    """Feed the watch until it is full, the time is over, or `stop` (with `until_eof`: or standard input) has something
    to read; how many were dropped.
    """
    end = None if duration is None else time.monotonic() + duration
    poller = select.poll()
    stops = {stop.fileno()} | ({sys.stdin.fileno()} if until_eof else set())
    for each in (link.ins, *stops):
        poller.register(each, select.POLLIN)
    tell({"ready": True})
    dropped = 0
    last = False
    while True:
        for frame in ring.stamped():
            watch.take(frame)
            if watch.full:
                break
        dropped += ring.dropped()
        if last or watch.full:
            return dropped
        left = 1.0 if end is None else end - time.monotonic()
        ready = {fd for fd, _ in poller.poll(max(0.0, min(left, 1.0)) * 1000)}
        if stops & ready or (end is not None and time.monotonic() >= end):
            # The block that is being filled comes when it is full or some milliseconds old.
            time.sleep(LAST_FRAMES_SECONDS)
            last = True


def main(arguments: Sequence[str] | None = None) -> int:
    """Capture as told by the command line; exit code 0, or 1 with {"error": ...} where it cannot be."""
    parser = argparse.ArgumentParser(
        prog="watch", description="Capture from an interface and tell of its flows."
    )
    parser.add_argument("--interface", required=True)
    parser.add_argument("--netns", type=Path, help="file that names the network namespace to capture in")
    parser.add_argument(
        "--address", help="an address of the pod to capture in, whose namespace is looked for"
    )
    parser.add_argument(
        "--until-eof", action="store_true", help="end when standard input has something, or ends"
    )
    parser.add_argument("--filter", default="")
    parser.add_argument("--duration", type=float)
    parser.add_argument("--count", type=int, default=0)
    parser.add_argument("--packets", action="store_true")
    parser.add_argument("--write", type=Path)
    options = parser.parse_args(arguments)
    wake, woken = socket.socketpair()
    wake.setblocking(False)
    signal.set_wakeup_fd(wake.fileno())
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        signal.signal(number, lambda *_: None)
    pcap = None
    try:
        if options.address:
            options.netns = namespace_of(options.address)
        if options.netns is not None:
            from ztunnel.inpod import netns

            namespace = netns.open_path(options.netns)
            netns.setns(namespace)
            os.close(namespace)
        link = open_link(options.interface, options.filter)
        ring = Ring(link.ins)
        if options.write is not None:
            pcap = Pcap(options.write.open("wb"))
    except (OSError, ValueError) as error:
        tell({"error": f"cannot capture on {options.interface}: {error}"})
        return 1
    watch = Watch(pcap, options.packets, options.count)
    try:
        dropped = run(link, ring, watch, woken, options.duration, until_eof=options.until_eof)
        tell(watch.done(dropped))
    except BrokenPipeError:
        return 1  # nobody reads it any more
    except OSError as error:  # of the file: the disk is full
        tell({"error": f"{options.write}: {error.strerror or error}"})
        return 1
    finally:
        ring.close()
        link.close()
        if pcap is not None:
            pcap.close()
    return 0


if __name__ == "__main__":
    sys.exit(main())
