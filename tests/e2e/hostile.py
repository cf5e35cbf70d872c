"""What hostile peers are made of: a client on our own codec that can say anything, and packets made by hand."""

import socket
import struct

from OpenSSL import SSL

from ztunnel import hbone
from ztunnel.embedded.testing import LabPod

HBONE_PORT = 15008


class Refused(Exception):
    """The proxy ended the connection."""


class HboneClient:
    """A blocking HBONE client on our codec, from the pod outside the mesh."""

    def __init__(self, pod: LabPod, target: str, context: SSL.Context) -> None:
        self.sock = pod.connect(target, HBONE_PORT)
        self.tls = SSL.Connection(context, self.sock)
        self.tls.set_connect_state()
        self.sock.settimeout(None)
        self.sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVTIMEO, struct.pack("ll", 30, 0))
        self.h2 = hbone.Connection(hbone.Role.CLIENT)

    def __enter__(self) -> "HboneClient":
        return self

    def __exit__(self, *_: object) -> None:
        self.sock.close()

    def start(self) -> None:
        """Handshake and the first frames. Raises Refused."""
        try:
            self.tls.do_handshake()
        except SSL.Error as error:
            raise Refused(str(error)) from error
        self.send(self.h2.data_to_send())

    def send(self, data: bytes) -> None:
        """Send bytes through TLS. Raises Refused."""
        try:
            self.tls.sendall(data)
        except SSL.Error as error:
            raise Refused(str(error)) from error

    def receive(self) -> list[hbone.Event]:
        """Some events. Raises Refused at the end of the connection."""
        try:
            events = list(self.h2.receive(self.tls.recv(65536)))
        except SSL.Error as error:
            raise Refused(str(error)) from error
        if self.h2.has_output:
            self.send(self.h2.data_to_send())
        return events

    def connect(self, authority: str) -> int:
        """The status of a CONNECT. Raises Refused."""
        stream = self.h2.open_stream(authority)
        self.send(self.h2.data_to_send())
        while True:
            for event in self.receive():
                if isinstance(event, hbone.ResponseReceived) and event.stream_id == stream:
                    return event.status


def half_open(pod: LabPod, target: str, port: int, count: int) -> None:
    """Send that many SYNs from the pod, of addresses that nobody has: nobody answers what they are answered."""
    with pod.inside():
        raw = socket.socket(socket.AF_INET, socket.SOCK_RAW, socket.IPPROTO_RAW)
    with raw:
        for number in range(count):
            source = socket.inet_aton(f"198.18.{number >> 8 & 255}.{number & 255}")
            raw.sendto(_syn(source, socket.inet_aton(target), 1024 + number % 60000, port), (target, 0))


def _syn(source: bytes, target: bytes, source_port: int, port: int) -> bytes:
    """An IPv4 packet with a SYN in it (RFC 9293, 3.1); the kernel fills in the IP header's checksum."""
    tcp = struct.pack("!HHIIBBHHH", source_port, port, 1, 0, 5 << 4, 2, 65535, 0, 0)
    pseudo = source + target + struct.pack("!BBH", 0, socket.IPPROTO_TCP, len(tcp))
    total = sum(struct.unpack(f"!{len(pseudo + tcp) // 2}H", pseudo + tcp))
    while total >> 16:
        total = (total & 0xFFFF) + (total >> 16)
    tcp = tcp[:16] + struct.pack("!H", ~total & 0xFFFF) + tcp[18:]
    return struct.pack("!BBHHHBBH4s4s", 0x45, 0, 40, 0, 0, 64, socket.IPPROTO_TCP, 0, source, target) + tcp
