"""One mesh of two nodes for the end-to-end tests of a module: two pods in it and two outside, one of each a node."""

import sys
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import NamedTuple

import pytest

from tests.proxy.meshlab import MeshLab, Node
from tests.telemetry.scraped import Scraped
from ztunnel.embedded.testing import LabPod, until

NGINX = """
user root; worker_processes 1; daemon off; pid {root}/nginx.pid; error_log {root}/error.log;
events {{ worker_connections 4096; }}
http {{
  access_log off; keepalive_requests 1000000; keepalive_timeout {idle};
  client_body_temp_path {root}/body; proxy_temp_path {root}/p; fastcgi_temp_path {root}/f;
  uwsgi_temp_path {root}/u; scgi_temp_path {root}/s;
  server {{
    listen {port} backlog=4096; listen [::]:{port} backlog=4096;
    location / {{ return 200 "hello world\\n"; }}
    location /who {{ return 200 "$remote_addr\\n"; }}
    location /files/ {{ alias {root}/files/; }}
  }}
}}
"""
HTTP = 8080
HTTP_BRIEF = 8081  # a server that closes idle connections after a second


class Mesh(NamedTuple):
    """The laboratory and its pods. `server` and `client` are in the mesh; the other two are not."""

    lab: MeshLab
    server: LabPod  # node 2
    client: LabPod  # node 1
    outside_server: LabPod  # node 2
    outside_client: LabPod  # node 1

    def path(self, name: str) -> tuple[LabPod, LabPod]:
        """Client and server pods of one of PATHS."""
        source, target = name.split("-to-")
        return (
            self.client if source == "mesh" else self.outside_client,
            self.server if target == "mesh" else self.outside_server,
        )

    def check_no_defects(self) -> None:
        """No worker met an error that it did not foresee, and each connection was accounted for once.

        However the tests of the module have ended theirs: as many closed as were opened, and a line for each.
        """
        for number, node in self.lab.nodes.items():
            assert node.errors() == []
            until(partial(_accounted, node), f"node {number}: all connections are accounted for", 30)


def _accounted(node: Node) -> bool:
    page = Scraped(node.scrape())
    opened, closed = (page.sum(f"istio_tcp_connections_{what}_total") for what in ("opened", "closed"))
    died = any(worker["restarts"] for worker in node.call_sync(node.workers.describe))
    return opened == closed and (died or closed == len(node.access_log()))


PATHS = ("mesh-to-mesh", "mesh-to-outside", "outside-to-mesh")


def address(pod: LabPod, family: int) -> str:
    """The pod's address of a family, 4 or 6."""
    return pod.ip4 if family == 4 else pod.ip6


def url_host(pod: LabPod, family: int) -> str:
    """The same as it stands in a URL."""
    return pod.ip4 if family == 4 else f"[{pod.ip6}]"


def start_nginx(pod: LabPod, directory: Path, port: int = HTTP, idle: int = 75) -> Path:
    """Run nginx in the pod; returns its folder, whose files/ it serves."""
    root = directory / f"nginx-{pod.name}-{port}"
    (root / "files").mkdir(parents=True)
    (root / "nginx.conf").write_text(NGINX.format(root=root, port=port, idle=idle))
    pod.start(["nginx", "-c", root / "nginx.conf", "-p", root])
    pod.wait_port(port)
    return root


@pytest.fixture(scope="module")
def mesh(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Mesh]:
    directory = tmp_path_factory.mktemp("mesh")
    with MeshLab(directory, workers=2) as lab:
        server, outside_server = lab.pod("server", 2, service_account="server"), lab.pod("outside-server", 2)
        client, outside_client = lab.pod("client", 1, service_account="client"), lab.pod("outside-client", 1)
        for pod in (server, outside_server):
            start_nginx(pod, directory)
            start_nginx(pod, directory, HTTP_BRIEF, idle=1)
        for pod in (outside_server, outside_client):
            lab.describe(pod, hbone=False)
        lab.join(server)
        lab.join(client)
        made = Mesh(lab, server, client, outside_server, outside_client)
        yield made
        made.check_no_defects()


@pytest.fixture(scope="session")
def python() -> str:
    """The interpreter of this environment."""
    return sys.executable


__all__ = ["HTTP", "HTTP_BRIEF", "PATHS", "Mesh", "address", "start_nginx", "until", "url_host"]
