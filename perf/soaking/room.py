"""The mesh that is soaked: two nodes, pods with servers and clients in the mesh and out of it, and what they do.

| pod | node | in the mesh | |
|---|---|---|---|
| east, west | 1, 2 | yes | servers and clients |
| spare | 1 | yes | joins the Service `web` beside west, and leaves it, by its label |
| quiet | 2 | yes | visited so seldom that each visit needs a new tunnel |
| stranger | 1 | no | servers and clients, in a namespace outside of the mesh |
| outsider | 2 | no | servers on the node's own address, which the proxies do not know |
"""

import json
import os
import sys
import threading
from pathlib import Path
from types import TracebackType
from typing import Self

from perf import nginx
from perf.soaking.ledger import Ledger
from perf.soaking.payload import BANNER_PORT, HTTP_PORT, TALK_PORT, body
from perf.soaking.traffic import SIZES, TIMEOUT, Job
from ztunnel.embedded.testmesh import RunningMesh
from ztunnel.store.models import Pod, Service

ROOT = Path(__file__).parents[2]
START_LIMIT = 30.0  # seconds, on a machine that has other things to do
CERTIFICATE_LIFE = 60  # seconds; certificates are renewed at half of it
TUNNEL_IDLE = 10  # seconds after which an unused tunnel is closed

BASE = """
apiVersion: v1
kind: Namespace
metadata: {name: default, labels: {istio.io/dataplane-mode: ambient}}
---
apiVersion: v1
kind: Namespace
metadata: {name: outside}
"""

ACCOUNT = """
apiVersion: v1
kind: ServiceAccount
metadata: {{name: {name}, namespace: {namespace}}}
"""

POD = """
apiVersion: v1
kind: Pod
metadata: {{name: {name}, namespace: {namespace}, labels: {labels}}}
spec:
  nodeName: {node}
  serviceAccountName: {name}
  hostNetwork: {host_network}
  containers:
    - name: http
      command: [nginx, -e, stderr, -p, {home}, -c, {home}/nginx.conf]
      ports: [{{containerPort: {http}}}]
    - name: talk
      command: ["{python}", -m, perf.soaking.serving]
      env: [{{name: PYTHONPATH, value: "{root}"}}]
      ports: [{{containerPort: {talk}}}, {{containerPort: {banner}}}]
"""

VISITOR = """
apiVersion: v1
kind: Pod
metadata: {{name: {name}, namespace: default}}
spec:
  nodeName: {node}
  serviceAccountName: {name}
  restartPolicy: Never
  containers:
    - name: client
      command: ["{python}", -m, perf.soaking.traffic, --seconds, "{seconds}", '{jobs}']
      env: [{{name: PYTHONPATH, value: "{root}"}}]
"""


class Server:
    """A pod of servers. `labels` are those that it has at first."""

    def __init__(
        self, name: str, node: str, namespace: str = "default", *, host_network: bool = False
    ) -> None:
        self.name = name
        self.node = node
        self.namespace = namespace
        self.host_network = host_network
        self.labels: dict[str, str] = {"app": name}

    def manifest(self, home: Path) -> str:
        """The pod and its account, as they are to be now."""
        account = ACCOUNT.format(name=self.name, namespace=self.namespace)
        return f"{account}---{self._pod(home / self.name)}"

    def _pod(self, home: Path) -> str:
        return POD.format(
            name=self.name, namespace=self.namespace, labels=json.dumps(self.labels), node=self.node, home=home,
            host_network=json.dumps(self.host_network), python=sys.executable, root=ROOT,
            http=HTTP_PORT, talk=TALK_PORT, banner=BANNER_PORT,
        )  # fmt: skip


class Client:
    """A program with jobs in a pod, and the threads that wait for it and listen to it."""

    def __init__(self, mesh: RunningMesh, namespace: str, pod: str, jobs: list[Job], ledger: Ledger) -> None:
        self.name = pod
        self._ledger = ledger
        self._stdin, self._out = os.pipe(), os.pipe()
        self._argv = [
            "env", f"PYTHONPATH={ROOT}", sys.executable, "-m", "perf.soaking.traffic", "--stdin",
            json.dumps([job._asdict() for job in jobs]),
        ]  # fmt: skip
        self._threads = [
            threading.Thread(target=self._run, args=(mesh, namespace), daemon=True),
            threading.Thread(target=self._listen, daemon=True),
        ]
        for thread in self._threads:
            thread.start()

    def _run(self, mesh: RunningMesh, namespace: str) -> None:
        streams = (self._stdin[0], self._out[1], self._out[1])
        try:
            mesh.client.exec(namespace, self.name, self._argv, streams=streams)
        except Exception as error:
            self._ledger.fail(self.name, "program", f"could not run: {error}")
        finally:
            for fd in (self._stdin[0], self._out[1]):
                os.close(fd)

    def _listen(self) -> None:
        with os.fdopen(self._out[0], encoding="utf-8") as lines:
            for line in lines:
                self._ledger.take(self.name, line)
        self._ledger.close(self.name)

    def stop(self) -> None:
        """Tell it to end."""
        os.close(self._stdin[1])

    def wait(self) -> None:
        """Until it has ended, and all that it said was taken in."""
        for thread in self._threads:
            thread.join(3 * TIMEOUT)
            if thread.is_alive():
                self._ledger.fail(self.name, "program", "does not end")


class SoakRoom:
    """The running mesh with its servers; a context manager, at whose end nothing is left."""

    def __init__(self) -> None:
        settings = {
            "SECRET_TTL": f"{CERTIFICATE_LIFE}s",
            "POOL_UNUSED_RELEASE_TIMEOUT": f"{TUNNEL_IDLE}s",
        }
        self.mesh = RunningMesh(BASE, env=os.environ | settings)
        self.servers = {
            server.name: server
            for server in (
                Server("east", "node-1"),
                Server("west", "node-2"),
                Server("spare", "node-1"),
                Server("quiet", "node-2"),
                Server("stranger", "node-1", "outside"),
                Server("outsider", "node-2", "outside", host_network=True),
            )
        }
        self.servers["west"].labels["web"] = "yes"
        self.addresses: dict[str, list[str]] = {}

    def __enter__(self) -> Self:
        mesh = self.mesh
        files = mesh.home / "files"
        files.mkdir()
        for size in SIZES:
            (files / str(size)).write_bytes(body(size))
        for server in self.servers.values():
            home = mesh.home / server.name
            home.mkdir()
            nginx.write(
                home,
                HTTP_PORT,
                http=f"{nginx.LONG_LIVED} keepalive_timeout 1h; keepalive_time 24h;",
                server=f"listen [::]:{HTTP_PORT} backlog=512; root {files};",
                backlog=512,
            )
            self.write(server)
        mesh.write("web.yaml", web())
        mesh.__enter__()
        try:
            mesh.until(self._settled, "every pod is ready, and in the mesh if it belongs there", START_LIMIT)
            self._find_addresses()
        except BaseException:
            mesh.close()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.mesh.close()

    def write(self, server: Server) -> None:
        """Write the server's pod with the labels that it has now."""
        self.mesh.write(f"{server.name}.yaml", server.manifest(self.mesh.home))

    def remove(self, name: str) -> None:
        """Remove a file of the mesh's directory."""
        (self.mesh.directory / name).unlink(missing_ok=True)

    def visitor(self, name: str, node: str, seconds: float) -> str:
        """The manifest of a pod that makes requests for so long and ends."""
        jobs = [
            Job("visitor, keep-alive", "requests", self.addresses["west"], rate=8, lanes=2),
            Job("visitor, new connections", "short", self.addresses["east"], rate=4, lanes=2),
        ]
        pod = VISITOR.format(
            name=name, node=node, python=sys.executable, root=ROOT, seconds=seconds,
            jobs=json.dumps([job._asdict() for job in jobs]),
        )  # fmt: skip
        return f"{ACCOUNT.format(name=name, namespace='default')}---{pod}"

    def visitor_log(self, name: str) -> Path:
        """What a visitor has said."""
        return self.mesh.state.logs / "pods" / f"default_{name}_client.log"

    def jobs(self, load: float) -> dict[str, tuple[str, list[Job]]]:
        """Who does what: by pod, its namespace and jobs. `load` multiplies the rates."""
        at, mib = self.addresses, 2**20
        given = {
            "east": ("default", [
                Job("keep-alive to a pod", "requests", at["west"], 120, 8),
                Job("keep-alive to a Service", "requests", at["web"], 60, 4, port=80),
                Job("keep-alive out of the mesh", "requests", at["stranger"], 20, 2),
                Job("held connections", "held", at["west"], 4, 4),
                Job("held connections out of the mesh", "held", at["stranger"], 2, 2),
                Job("bulk up", "upload", at["west"], 0.5, 1, 24 * mib),
                Job("bulk down", "download", at["west"], 0.5, 1, 24 * mib),
                Job("bulk up, out of the mesh", "upload", at["stranger"], 0.2, 1, 8 * mib),
                Job("bulk down, out of the mesh", "download", at["stranger"], 0.2, 1, 8 * mib),
                Job("new connections to a pod", "short", at["west"], 20, 4),
                Job("new connections to a Service", "service", at["web"], 10, 2, port=80),
                Job("new connections to a name", "service", ["web.default.svc.cluster.local"], 2, 1, port=80),
                Job("new connections out of the mesh", "short", at["stranger"], 8, 2),
                Job("new connections to unknown addresses", "short", at["outsider"], 5, 2),
                Job("visits that need a new tunnel", "short", at["quiet"], 1 / (1.5 * TUNNEL_IDLE)),
                Job("connections that are refused", "refused", at["west"], 1),
            ]),
            "west": ("default", [
                Job("keep-alive to a pod", "requests", at["east"], 60, 4),
                Job("held connections", "held", at["east"], 4, 4),
                Job("new connections to a pod", "short", at["east"], 10, 2),
            ]),
            "stranger": ("outside", [
                Job("keep-alive into the mesh", "requests", at["west"], 20, 2),
                Job("held connections into the mesh", "held", at["west"], 2, 2),
                Job("bulk up, into the mesh", "upload", at["west"], 0.2, 1, 8 * mib),
                Job("bulk down, into the mesh", "download", at["west"], 0.2, 1, 8 * mib),
                Job("new connections into the mesh", "short", at["west"], 10, 2),
                Job("connections that are refused, into the mesh", "refused", at["west"], 1),
            ]),
        }  # fmt: skip
        return {
            pod: (namespace, [job._replace(rate=job.rate * load) for job in jobs])
            for pod, (namespace, jobs) in given.items()
        }

    def start_clients(self, load: float, ledger: Ledger) -> list[Client]:
        """Start all load."""
        return [
            Client(self.mesh, namespace, pod, jobs, ledger)
            for pod, (namespace, jobs) in self.jobs(load).items()
        ]

    def _settled(self) -> bool:
        pods = {pod["name"]: pod for pod in self.mesh.pods()}
        return pods.keys() == self.servers.keys() and all(
            pod["ready"] and pod["mesh"] == (self.servers[name].namespace == "default")
            for name, pod in pods.items()
        )

    def _find_addresses(self) -> None:
        objects = self.mesh.objects()
        for pod in objects.list(Pod):
            self.addresses[pod.name] = list(pod.addresses)
        for service in objects.list(Service):
            self.addresses[service.name] = list(service.addresses)


def web(more: int = 0) -> str:
    """The Service that the clients use; `more`, if not 0, is a port that it has beside."""
    ports: list[dict[str, str | int]] = [{"name": "http", "port": 80, "targetPort": HTTP_PORT}]
    if more:
        ports.append({"name": "more", "port": more, "targetPort": HTTP_PORT})
    return service("web", {"web": "yes"}, ports)


def service(name: str, selector: dict[str, str], ports: list[dict[str, str | int]]) -> str:
    """A Service's manifest."""
    manifest = {
        "apiVersion": "v1",
        "kind": "Service",
        "metadata": {"name": name, "namespace": "default"},
        "spec": {"selector": selector, "ports": ports},
    }
    return json.dumps(manifest) + "\n"
