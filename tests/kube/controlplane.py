"""etcd, API server, controller manager and scheduler of a lab, in a cell of their own."""

import shutil
import time
from pathlib import Path

from tests.kube.cell import Cell, CellError
from tests.kube.pki import Pki
from tests.kube.rest import Rest, RestError

ADDRESS = "10.99.0.1"  # on the bridge that the nodes' links lead to, so that pods reach the API server
PORT = 6443
SERVICES = "10.96.0.0/16"
KUBERNETES_SERVICE = "10.96.0.1"
DNS_SERVICE = "10.96.0.10"
BRIDGE = "lab0"
ETCD = "http://127.0.0.1:2379"
PEERS = "http://127.0.0.1:2380"
READY_LIMIT = 90.0


def node_address(number: int) -> str:
    return f"10.99.0.1{number}"


def write_pki(folder: Path, port: int) -> Pki:
    """All certificates, and kubeconfig files: `admin.conf` for the host's side of the relay, the others for inside."""
    pki = Pki(folder / "pki")
    names = [
        "kubernetes",
        *(f"kubernetes.default{rest}" for rest in ("", ".svc", ".svc.cluster.local")),
        "localhost",
    ]
    pki.issue("apiserver", "kube-apiserver", names=[*names, "127.0.0.1", KUBERNETES_SERVICE, ADDRESS])
    pki.issue("apiserver-kubelet", "kube-apiserver-kubelet-client", "system:masters")
    pki.issue("admin", "admin", "system:masters")
    for name in ("controller-manager", "scheduler"):
        pki.issue(name, f"system:kube-{name}")
    pki.issue("proxy", "system:kube-proxy")
    for number in (1, 2):
        node = f"node{number}"
        pki.issue(node, f"system:node:{node}", "system:nodes", names=[node, node_address(number)])
    pki.service_accounts()
    inside = f"https://{ADDRESS}:{PORT}"
    for user in ("controller-manager", "scheduler", "proxy", "node1", "node2"):
        _secret(folder / "pki" / f"{user}.conf", pki.kubeconfig(user, inside))
    _secret(folder / "admin.conf", pki.kubeconfig("admin", f"https://127.0.0.1:{port}"))
    return pki


class ControlPlane:
    """`programs` is the folder of Kubernetes' binaries, `port` the relay's on the host's loopback."""

    def __init__(self, cell: Cell, folder: Path, programs: Path, port: int) -> None:
        self.cell = cell
        self._folder = folder
        self._programs = programs
        self._port = port

    @property
    def rest(self) -> Rest:
        """The API from the host, as administrator."""
        return Rest("127.0.0.1", self._port, self._folder / "pki", "admin")

    def start_network(self) -> None:
        self.cell.run(["ip", "link", "add", BRIDGE, "type", "bridge"])
        self.cell.run(["ip", "address", "add", f"{ADDRESS}/24", "dev", BRIDGE])
        self.cell.run(["ip", "link", "set", BRIDGE, "up"])
        self.cell.run(["sysctl", "-qw", "net.ipv4.ip_forward=1"])

    def start_etcd(self) -> None:
        """No fsync: the data of a lab need not survive the machine's power cut."""
        self.cell.spawn(
            "etcd",
            ["etcd", "--name=lab", f"--data-dir={self._folder / 'etcd'}", "--unsafe-no-fsync", "--log-level=warn",
             f"--listen-client-urls={ETCD}", f"--advertise-client-urls={ETCD}", f"--listen-peer-urls={PEERS}",
             f"--initial-advertise-peer-urls={PEERS}", f"--initial-cluster=lab={PEERS}"],
        )  # fmt: skip

    def start_apiserver(self) -> None:
        """Returns when it is ready."""
        pki = self._folder / "pki"
        self.cell.spawn(
            "apiserver",
            [self._programs / "kube-apiserver", f"--etcd-servers={ETCD}", f"--bind-address={ADDRESS}",
             f"--advertise-address={ADDRESS}", f"--secure-port={PORT}", f"--service-cluster-ip-range={SERVICES}",
             "--authorization-mode=Node,RBAC", "--enable-admission-plugins=NodeRestriction",
             "--allow-privileged=true", f"--client-ca-file={pki / 'ca.crt'}",
             f"--tls-cert-file={pki / 'apiserver.crt'}", f"--tls-private-key-file={pki / 'apiserver.key'}",
             "--service-account-issuer=https://kubernetes.default.svc.cluster.local",
             f"--service-account-signing-key-file={pki / 'sa.key'}", f"--service-account-key-file={pki / 'sa.pub'}",
             f"--kubelet-client-certificate={pki / 'apiserver-kubelet.crt'}",
             f"--kubelet-client-key={pki / 'apiserver-kubelet.key'}",
             f"--kubelet-certificate-authority={pki / 'ca.crt'}", "--kubelet-preferred-address-types=InternalIP",
             "--profiling=false"],
        )  # fmt: skip
        self._wait_ready()

    def start_controllers(self) -> None:
        """The controller manager, if it does not run yet: service accounts, endpoints, garbage, namespaces' ends."""
        if (self.cell.folder / "pid" / "controller-manager").exists():
            return
        pki = self._folder / "pki"
        self.cell.spawn(
            "controller-manager",
            [self._programs / "kube-controller-manager", f"--kubeconfig={pki / 'controller-manager.conf'}",
             f"--service-account-private-key-file={pki / 'sa.key'}", f"--root-ca-file={pki / 'ca.crt'}",
             "--use-service-account-credentials=true", "--leader-elect=false", "--bind-address=127.0.0.1",
             "--flex-volume-plugin-dir=/run/flex"],
        )  # fmt: skip

    def start_scheduler(self) -> None:
        self.cell.spawn(
            "scheduler",
            [self._programs / "kube-scheduler", f"--kubeconfig={self._folder / 'pki' / 'scheduler.conf'}",
             "--leader-elect=false", "--bind-address=127.0.0.1"],
        )  # fmt: skip

    def stop_apiserver(self) -> None:
        """At once, as a crash would."""
        self.cell.stop("apiserver")

    def snapshot(self, name: str) -> None:
        """Keep etcd's data as it is now. etcd is away for a moment, which its client, the API server, survives."""
        kept = self._folder / "snapshots" / name
        shutil.rmtree(kept, ignore_errors=True)
        self.cell.stop("etcd", 15)
        shutil.copytree(self._folder / "etcd", kept)
        self.start_etcd()
        self._wait_ready()

    def restore(self, name: str) -> None:
        """Go back to the data of a snapshot, as after a disaster: resource versions go back too."""
        self.stop_apiserver()
        self.cell.stop("etcd", 15)
        shutil.rmtree(self._folder / "etcd")
        shutil.copytree(self._folder / "snapshots" / name, self._folder / "etcd")
        self.start_etcd()
        self.start_apiserver()
        # What Kubernetes' documents ask for after a restore: its own parts start anew. Ours do not.
        for name, start in (
            ("controller-manager", self.start_controllers),
            ("scheduler", self.start_scheduler),
        ):
            if (self.cell.folder / "pid" / name).exists():
                self.cell.stop(name)
                start()

    def _wait_ready(self) -> None:
        end = time.monotonic() + READY_LIMIT
        reason: object = "no answer"
        while time.monotonic() < end:
            try:
                self.rest.request("GET", "/readyz")
                return
            except (RestError, OSError) as error:
                reason = error
            time.sleep(0.1)
        raise CellError(f"API server: not ready: {reason}: {self.cell.last_words('apiserver')}")


def _secret(path: Path, text: str) -> None:
    path.touch(mode=0o600)
    path.write_text(text)
