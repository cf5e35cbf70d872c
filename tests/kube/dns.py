"""The cluster's DNS: answers for Services and pods as kube-dns would, from watches of the API; nothing outside exists.

Started as a program inside the control plane's cell: dns.py ADDRESS PKI_FOLDER API_PORT. The rules are those of
Kubernetes' DNS specification (github.com/kubernetes/dns, docs/specification.md), without reverse zones.
"""

import socketserver
import sys
import threading
import time
from collections.abc import Iterator
from ipaddress import ip_address
from pathlib import Path
from typing import Any, NamedTuple

from dnslib import AAAA, CNAME, QTYPE, RCODE, RR, SOA, SRV, A, DNSRecord

from tests.kube.rest import Rest, RestError

DOMAIN = "cluster.local"
TTL = 5
SLICES = "/apis/discovery.k8s.io/v1/endpointslices"
SERVICES = "/api/v1/services"

Key = tuple[str, str]  # namespace, name


class Record(NamedTuple):
    kind: str  # A, AAAA, CNAME, SRV
    value: str
    port: int = 0


class Zone:
    """What the names mean now. Written by the watches' threads, read by the servers'."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._services: dict[Key, dict[str, Any]] = {}
        self._slices: dict[Key, dict[str, Any]] = {}

    def replace(self, path: str, objects: list[dict[str, Any]]) -> None:
        with self._lock:
            kept = self._of(path)
            kept.clear()
            kept.update({_key(obj): obj for obj in objects})

    def change(self, path: str, change: str, obj: dict[str, Any]) -> None:
        with self._lock:
            if change == "DELETED":
                self._of(path).pop(_key(obj), None)
            else:
                self._of(path)[_key(obj)] = obj

    def records(self, name: str) -> list[Record] | None:
        """All records of a name, lower case and without its last dot; None: there is no such name."""
        labels = name.removesuffix("." + DOMAIN).split(".")
        if not name.endswith("." + DOMAIN) or len(labels) < 3:
            return None
        *rest, service, namespace, zone = labels
        if zone == "pod" and not rest:
            return _pod(service)
        with self._lock:
            spec = self._services.get((namespace, service))
            if zone != "svc" or spec is None:
                return None
            return self._service(name, rest, spec)

    def _service(self, name: str, rest: list[str], service: dict[str, Any]) -> list[Record] | None:
        spec = service["spec"]
        if spec.get("type") == "ExternalName":
            return [Record("CNAME", spec["externalName"])] if not rest else None
        headless = spec.get("clusterIP") in ("None", "", None)
        endpoints = list(self._endpoints(service)) if headless else []
        if not rest:
            addresses = [address for _, address, _ in endpoints] if headless else spec["clusterIPs"]
            return [_address(one) for one in dict.fromkeys(addresses)]
        if len(rest) == 2 and rest[0].startswith("_"):
            port, protocol = rest[0][1:], rest[1][1:].upper()
            base = name.split(".", 2)[2]
            if not headless:
                ports = [
                    p["port"] for p in spec["ports"] if p.get("name") == port and p["protocol"] == protocol
                ]
                return [Record("SRV", base, number) for number in ports] or None
            return [
                Record("SRV", f"{host}.{base}", p["port"])
                for host, _, slice_ports in endpoints
                for p in slice_ports
                if p.get("name") == port and p["protocol"] == protocol
            ] or None
        if len(rest) == 1:
            return [_address(one) for host, one, _ in endpoints if host == rest[0]] or None
        return None

    def _endpoints(self, service: dict[str, Any]) -> Iterator[tuple[str, str, list[dict[str, Any]]]]:
        """Host name, address and ports of each endpoint that is ready, or of each where the Service wants that."""
        namespace, name = _key(service)
        for (other, _), obj in self._slices.items():
            if (
                other != namespace
                or obj["metadata"].get("labels", {}).get("kubernetes.io/service-name") != name
            ):
                continue
            for endpoint in obj.get("endpoints") or []:
                ready = (endpoint.get("conditions") or {}).get("ready", True)
                if ready or service["spec"].get("publishNotReadyAddresses"):
                    for address in endpoint["addresses"]:
                        host = endpoint.get("hostname") or address.replace(".", "-").replace(":", "-")
                        yield host, address, obj.get("ports") or []

    def _of(self, path: str) -> dict[Key, dict[str, Any]]:
        return self._services if path == SERVICES else self._slices


def answer(zone: Zone, query: bytes, limit: int) -> bytes:
    """The reply to a query, cut to `limit` bytes with the TC flag where it is longer (RFC 1035, 4.2.1)."""
    request = DNSRecord.parse(query)
    reply = request.reply(ra=1, aa=1)
    wanted = QTYPE[request.q.qtype]
    name = str(request.q.qname).rstrip(".").lower()
    records = zone.records(name)
    if records is None:
        # The bare zones exist, without records of their own.
        exists = name in (DOMAIN, f"svc.{DOMAIN}", f"pod.{DOMAIN}")
        reply.header.rcode = RCODE.NOERROR if exists else RCODE.NXDOMAIN
    for record in records or []:
        if record.kind == wanted or record.kind == "CNAME":
            reply.add_answer(RR(request.q.qname, getattr(QTYPE, record.kind), ttl=TTL, rdata=_data(record)))
    if not reply.rr:
        reply.add_auth(
            RR(
                DOMAIN,
                QTYPE.SOA,
                ttl=TTL,
                rdata=SOA(f"ns.dns.{DOMAIN}", f"hostmaster.{DOMAIN}", (1, 60, 60, 60, TTL)),
            )
        )
    data: bytes = reply.pack()
    if len(data) > limit:
        data = reply.truncate().pack()
    return data


def _data(record: Record) -> Any:
    if record.kind == "SRV":
        return SRV(0, 100, record.port, record.value)
    return {"A": A, "AAAA": AAAA, "CNAME": CNAME}[record.kind](record.value)


def _address(address: str) -> Record:
    return Record("A" if ip_address(address).version == 4 else "AAAA", address)


def _pod(label: str) -> list[Record] | None:
    """10-244-1-5.NAMESPACE.pod: the address written in the name."""
    try:
        return [_address(label.replace("-", "." if label.count("-") == 3 else ":"))]
    except ValueError:
        return None


def _key(obj: dict[str, Any]) -> Key:
    return obj["metadata"]["namespace"], obj["metadata"]["name"]


def follow(zone: Zone, rest: Rest, path: str) -> None:
    """Keep one collection in the zone for ever. While the API is away, the last that was known is served."""
    while True:
        listed: list[dict[str, Any]] | None = []
        try:
            for change, obj in rest.watch(path):
                if change == "SYNC":
                    zone.replace(path, listed or [])
                    listed = None
                elif listed is not None:
                    listed.append(obj)
                else:
                    zone.change(path, change, obj)
        except (OSError, RestError) as error:
            print(f"{path}: {error}", flush=True)
        time.sleep(0.5)


class Udp(socketserver.BaseRequestHandler):
    zone: Zone

    def handle(self) -> None:
        data, socket = self.request
        socket.sendto(answer(self.zone, data, 512), self.client_address)


class Tcp(socketserver.StreamRequestHandler):
    zone: Zone

    def handle(self) -> None:
        while len(size := self.rfile.read(2)) == 2:
            data = answer(self.zone, self.rfile.read(int.from_bytes(size, "big")), 65535)
            self.wfile.write(len(data).to_bytes(2, "big") + data)


class TcpServer(socketserver.ThreadingTCPServer):
    allow_reuse_address = True
    request_queue_size = 128
    daemon_threads = True


def main() -> None:
    address, pki, port = sys.argv[1], Path(sys.argv[2]), int(sys.argv[3])
    zone = Udp.zone = Tcp.zone = Zone()
    rest = Rest(address, port, pki, "admin")
    for path in (SERVICES, SLICES):
        threading.Thread(target=follow, args=(zone, rest, path), daemon=True).start()
    tcp = TcpServer((address, 53), Tcp)
    threading.Thread(target=tcp.serve_forever, daemon=True).start()
    socketserver.UDPServer((address, 53), Udp).serve_forever()


if __name__ == "__main__":
    main()
