"""A laboratory with a waypoint: client and server pods behind real workers, a real control plane process in a node's
namespace, and waypoint pods that run `python -m waypoint`. Node proxies' model is filled in beside, by the test."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import msgspec
from cryptography.hazmat.primitives.asymmetric import ec

from tests.controlplane.objects import authorization, node, service
from tests.controlplane.objects import pod as pod_object
from tests.proxy.meshlab import MeshLab
from tests.telemetry.written import whole_lines
from ztunnel.embedded.testing import LabPod, LabSpace, until
from ztunnel.identity import jwt
from ztunnel.identity.ca import Authority
from ztunnel.mesh.model import GatewayAddress, Port, Service, TunnelProtocol
from ztunnel.store.decode import decode
from ztunnel.store.directory import DirectoryStore
from ztunnel.store.models import Object, ServicePort

ISSUER = "https://kubernetes.default.svc.cluster.local"
LIMIT = 60.0
HOSTNAME = "waypoint.default.svc.cluster.local"
VIP, WAYPOINT_VIP = "10.96.0.1", "10.96.9.9"
USE = {"istio.io/use-waypoint": "waypoint"}
IDENTITY = "spiffe://cluster.local/ns/default/sa/waypoint"


def obj(data: dict[str, Any]) -> Object:
    """An object of plain data."""
    result = decode(data)
    assert result.obj is not None, result.faults
    return result.obj


class Replica:
    """A waypoint pod and its process."""

    def __init__(self, pod: LabPod, log: Path, process: subprocess.Popen[bytes]) -> None:
        self.pod = pod
        self.log_path = log
        self.process = process

    @property
    def log(self) -> str:
        return self.log_path.read_text()

    def access_log(self) -> list[dict[str, Any]]:
        events = [msgspec.json.decode(line) for line in whole_lines(self.log_path) if line[:1] == b"{"]
        return [event for event in events if event.get("scope") == "access"]

    def page(self, port: int, path: str) -> tuple[int, str]:
        """Status and body of a page, asked for from within the pod."""
        with self.pod.connect("127.0.0.1", port) as sock:
            sock.sendall(f"GET {path} HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n".encode())
            data = b""
            while part := sock.recv(65536):
                data += part
        head, _, body = data.partition(b"\r\n\r\n")
        return int(head.split()[1]), body.decode()

    def ready(self) -> bool:
        try:
            return self.page(15021, "/healthz/ready")[0] == 200
        except OSError:
            return False


class WaypointLab(MeshLab):
    """See above."""

    def __init__(self, directory: Path) -> None:
        super().__init__(directory, nodes=2, workers=1)
        for name in ("objects", "tokens"):
            (directory / name).mkdir()
        self.authority = Authority.load_or_create(directory / "ca")
        self.store = DirectoryStore(directory / "objects")
        self._key = ec.generate_private_key(ec.SECP256R1())
        (directory / "keys.json").write_bytes(jwt.key_set(self._key.public_key()))
        self.plane: LabSpace | None = None
        self.replicas: list[Replica] = []

    def start_plane(self) -> None:
        """Start the control plane, and wait until it serves."""
        space = self.plane = self.node(1)
        port_file = self.directory / "port"
        with (self.directory / "plane.log").open("ab") as log:
            process = space.start(
                [
                    sys.executable, "-m", "ztunnel.controlplane",
                    "--store", self.directory / "objects", "--ca-dir", self.directory / "ca",
                    "--token-keys", self.directory / "keys.json",
                    "--listen", f"{space.ip4}:15012", "--port-file", port_file,
                ],
                stderr=log,
                env=os.environ | {"LOG_FORMAT": "json", "LOG_LEVEL": "info"},
            )  # fmt: skip
        until(lambda: port_file.exists() or process.poll() is not None, "the control plane serves", LIMIT)
        assert process.poll() is None, (self.directory / "plane.log").read_text()

    def apply(self, *objects: Object) -> None:
        for one in objects:
            self.store.apply(one)

    def base(self) -> None:
        """The cluster as both sides know it: Service web, behind the waypoint that a Gateway stands for."""
        self.apply(
            node("node-1"),
            node("node-2"),
            obj({"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": "default", "labels": USE}}),
            obj(
                {
                    "apiVersion": "gateway.networking.k8s.io/v1",
                    "kind": "Gateway",
                    "metadata": {
                        "name": "waypoint",
                        "namespace": "default",
                        "labels": {"istio.io/waypoint-for": "all"},
                    },
                    "spec": {
                        "gatewayClassName": "istio-waypoint",
                        "listeners": [{"name": "mesh", "port": 15008, "protocol": "HBONE"}],
                    },
                    "status": {"addresses": [{"type": "Hostname", "value": HOSTNAME}]},
                }
            ),
            service("web", VIP, ports=[ServicePort(port=80, target_port=8080)]),
            obj(
                {
                    "apiVersion": "v1",
                    "kind": "Service",
                    "metadata": {
                        "name": "waypoint",
                        "namespace": "default",
                        "labels": {"gateway.istio.io/managed": "istio.io-mesh-controller"},
                    },
                    "spec": {
                        "clusterIP": WAYPOINT_VIP,
                        "ports": [{"port": 15008}],
                        "selector": {"gateway.networking.k8s.io/gateway-name": "waypoint"},
                    },
                }
            ),
        )
        gateway = GatewayAddress(service=f"default/{HOSTNAME}")
        self.service("waypoint", WAYPOINT_VIP, Port(15008, 15008))
        self.change(
            self.state.upsert_service(
                Service(
                    name="web",
                    namespace="default",
                    hostname="web.default.svc.cluster.local",
                    vips=(("", bytes([10, 96, 0, 1])),),
                    ports=(Port(80, 8080),),
                    waypoint=gateway,
                )
            )
        )

    def server(self, pod: LabPod, mesh: bool = True) -> LabPod:
        """A pod of the Service web, in the mesh or not, known to both sides."""
        self.apply(
            pod_object(
                pod.name, pod.ip4, pod.ip6, labels={"app": "web"}, mesh=mesh, node=pod.node_name,
                account=pod.service_account,
            )
        )  # fmt: skip
        key = "default/web.default.svc.cluster.local"
        one = self.workload(
            pod,
            mesh,
            services={key: (Port(80, 8080),)},
            waypoint=GatewayAddress(service=f"default/{HOSTNAME}"),
        )
        self.change(self.state.upsert_workload(one))
        return pod

    def replica(self, name: str, number: int) -> Replica:
        """Start another pod of the waypoint on this node, and wait until it is ready; both sides know it then."""
        pod = self.pod(name, number, service_account="waypoint")
        labels = {"gateway.networking.k8s.io/gateway-name": "waypoint"}
        self.apply(pod_object(name, pod.ip4, pod.ip6, labels=labels, node=pod.node_name, account="waypoint"))
        token = self.directory / "tokens" / name
        token.write_text(self._token(name, pod.node_name))
        log = self.directory / f"{name}.log"
        assert self.plane is not None
        environment = {
            "WAYPOINT_NAME": "waypoint", "POD_NAME": name, "POD_NAMESPACE": "default",
            "SERVICE_ACCOUNT": "waypoint", "INSTANCE_IP": pod.ip4, "NODE_NAME": pod.node_name,
            "XDS_ADDRESS": f"https://{self.plane.ip4}:15012", "AUTH_TOKEN": str(token),
            "XDS_ROOT_CA": str(self.directory / "ca" / "published" / "root-cert.pem"),
            "ZTUNNEL_WORKER_THREADS": "1", "LOG_FORMAT": "json", "LOG_LEVEL": "info",
            "MINIMUM_DRAIN_DURATION": "1s", "TERMINATION_GRACE_PERIOD": "20s",
        }  # fmt: skip
        with log.open("ab") as stderr:
            process = pod.start(
                # Without privileges, as in a cluster: nothing of it enters namespaces or marks packets.
                ["setpriv", "--bounding-set=-all", "--inh-caps=-all", "--no-new-privs",
                 sys.executable, "-m", "waypoint"],
                stderr=stderr,
                env=os.environ | environment,
            )  # fmt: skip
        made = Replica(pod, log, process)
        self.replicas.append(made)
        until(lambda: made.ready() or process.poll() is not None, f"{name} is ready", LIMIT)
        assert process.poll() is None, made.log
        self.known(made, True)
        return made

    def known(self, replica: Replica, healthy: bool) -> None:
        """Tell the node proxies of a replica."""
        workload = self.workload(
            replica.pod,
            False,
            tunnel_protocol=TunnelProtocol.NONE,
            services={f"default/{HOSTNAME}": (Port(15008, 15008),)},
            healthy=healthy,
        )
        self.change(self.state.upsert_workload(workload))

    def _token(self, pod: str, on: str) -> str:
        now = int(time.time())
        claims = {
            "iss": ISSUER, "aud": ["istio-ca"], "sub": "system:serviceaccount:default:waypoint",
            "iat": now, "nbf": now, "exp": now + 3600,
            "kubernetes.io": {
                "namespace": "default", "node": {"name": on}, "pod": {"name": pod, "uid": f"uid-{pod}"},
                "serviceaccount": {"name": "waypoint", "uid": "u"},
            },
        }  # fmt: skip
        return jwt.sign(claims, self._key)

    def close(self) -> None:
        """End the waypoints, then the rest."""
        for replica in self.replicas:
            if replica.process.poll() is None:
                replica.process.send_signal(signal.SIGKILL)
        super().close()


__all__ = ["HOSTNAME", "IDENTITY", "LIMIT", "VIP", "Replica", "WaypointLab", "authorization", "until"]
