"""A node of a lab: a cell with containerd, kubelet and kube-proxy, and a link to the control plane's bridge."""

import contextlib
import json
import shutil
import subprocess
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from tests.kube import cgroups
from tests.kube.cell import Cell, CellError
from tests.kube.controlplane import ADDRESS, BRIDGE, DNS_SERVICE, SERVICES, node_address
from tests.kube.image import PAUSE
from tests.kube.processes import Process

CONTAINERD_LIMIT = 30.0
PODS = "10.244.0.0/16"


def pod_network(number: int) -> str:
    return f"10.244.{number}.0/24"


class Node:
    """Number 1 or 2. Its files lie in `folder`, whose `node/` is the upper layer of what the machine looks like."""

    def __init__(
        self, number: int, lab: str, folder: Path, pki: Path, programs: Path, init: Path, control: Cell
    ) -> None:
        self.number = number
        self.name = f"node{number}"
        self.address = node_address(number)
        self.cell = Cell(self.name, folder, init)
        self.cgroup = f"ambient-lab-{lab}-{self.name}"
        self._folder = folder
        self._pki = pki
        self._programs = programs
        self._control = control

    def run(self, argv: Sequence[str | Path], *, timeout: float = 60, stdin: str = "") -> str:
        """Run a program in the node's namespaces; what it wrote to stdout. Raises CellError if it fails."""
        return self.cell.run(argv, timeout=timeout, stdin=stdin)

    def path(self, inside: str) -> Path:
        """A file of the node as the host sees it, through /proc/PID/root: the node must be up."""
        return Path(f"/proc/{self.cell.pid}/root{inside}")

    def start(self, record: Callable[[Process], None], nodes: Sequence[int]) -> None:
        """The machine, its links and containerd. `nodes`: the numbers of all nodes, for routes to their pods."""
        (self._folder / "node").mkdir(parents=True, exist_ok=True)
        self._configure()
        cgroups.create(self.cgroup)
        self.cell.start(record)
        self._link(nodes)
        self.cell.spawn("containerd", ["containerd", "--config", self._folder / "containerd.toml"])
        end = time.monotonic() + CONTAINERD_LIMIT
        while True:
            try:
                self.run(["ctr", "version"], timeout=5)
                return
            except CellError as error:
                if time.monotonic() > end:
                    raise CellError(
                        f"{self.name}: containerd: {self.cell.last_words('containerd')}"
                    ) from error
            time.sleep(0.05)

    def start_kubernetes(self) -> None:
        """kubelet and kube-proxy: the API server must be there."""
        self.cell.spawn(
            "kubelet",
            [self._programs / "kubelet", f"--config={self._folder / 'kubelet.yaml'}",
             f"--kubeconfig={self._pki / f'{self.name}.conf'}", f"--hostname-override={self.name}",
             f"--node-ip={self.address}", "--v=2"],
        )  # fmt: skip
        self.cell.spawn(
            "kube-proxy", [self._programs / "kube-proxy", f"--config={self._folder / 'kube-proxy.yaml'}"]
        )

    def restart_kubernetes(self) -> None:
        """kubelet and kube-proxy start anew; the containers stay."""
        for name in ("kubelet", "kube-proxy"):
            self.cell.stop(name)
        self.start_kubernetes()

    def kill(self) -> None:
        """A power cut: the link goes, every process of the node dies. Its disk stays as it is."""
        with contextlib.suppress(CellError):
            self._control.run(["ip", "link", "delete", self.name])
        self.cell.kill()
        cgroups.remove(self.cgroup)

    def import_images(self, archive: Path) -> None:
        """Take the images of a docker archive into containerd, for the kubelet."""
        self.run(["ctr", "-n", "k8s.io", "images", "import", archive], timeout=120)

    def _link(self, nodes: Sequence[int]) -> None:
        with contextlib.suppress(
            CellError
        ):  # a link of a node that died: the kernel removes it some time later
            self._control.run(["ip", "link", "delete", self.name])
        # The control plane's network namespace, but the host's process ids.
        argv = ["nsenter", "-t", str(self._control.pid), "-n", "ip", "link", "add", self.name, "type", "veth"]
        peer = ["peer", "name", "eth0", "netns", str(self.cell.pid)]
        subprocess.run([*argv, *peer], check=True, capture_output=True)
        self._control.run(["ip", "link", "set", self.name, "master", BRIDGE, "up"])
        self._control.run(["ip", "route", "replace", pod_network(self.number), "via", self.address])
        commands = [
            f"ip address add {self.address}/24 dev eth0",
            "ip link set eth0 up",
            f"ip route add default via {ADDRESS}",
        ]
        commands += [
            f"ip route add {pod_network(n)} via {node_address(n)}" for n in nodes if n != self.number
        ]
        self.run(["sh", "-ec", "\n".join(commands)])
        self.route_services()

    def route_services(self) -> None:
        """Let the control plane reach Services, for webhooks, through this node's kube-proxy."""
        self._control.run(["ip", "route", "replace", SERVICES, "via", self.address])

    def _configure(self) -> None:
        """Files for the parts of the node, as an installer would write them. JSON is YAML."""
        (self._folder / "resolv.conf").write_text("")  # nothing outside the cluster has a name
        (self._folder / "containerd.toml").write_text(_CONTAINERD.format(pause=PAUSE, runc=_runc()))
        routes = [{"dst": "0.0.0.0/0"}]
        ipam = {
            "type": "host-local", "ranges": [[{"subnet": pod_network(self.number)}]], "routes": routes,
            "dataDir": "/run/cni-ipam",
        }  # fmt: skip
        # ptp, not bridge: two pods of a node on one bridge would answer each other past the Services' translation.
        plugins = [
            {"type": "ptp", "ipMasq": False, "ipam": ipam},
            {"type": "portmap", "capabilities": {"portMappings": True}},
        ]
        conflist = {"cniVersion": "1.0.0", "name": "lab", "plugins": plugins}
        (self._folder / "node" / "cni.conflist").write_text(json.dumps(conflist, indent=2) + "\n")
        kubelet = {
            "apiVersion": "kubelet.config.k8s.io/v1beta1",
            "kind": "KubeletConfiguration",
            "address": self.address,
            "healthzBindAddress": "127.0.0.1",
            "tlsCertFile": str(self._pki / f"{self.name}.crt"),
            "tlsPrivateKeyFile": str(self._pki / f"{self.name}.key"),
            "authentication": {
                "anonymous": {"enabled": False},
                "webhook": {"enabled": True},
                "x509": {"clientCAFile": str(self._pki / "ca.crt")},
            },
            "authorization": {"mode": "Webhook"},
            "containerRuntimeEndpoint": "unix:///run/containerd/containerd.sock",
            "cgroupDriver": "cgroupfs",
            "cgroupRoot": f"/{self.cgroup}",
            "failCgroupV1": False,
            "failSwapOn": False,
            "protectKernelDefaults": True,
            "makeIPTablesUtilChains": False,
            "maxOpenFiles": 20000,
            "maxPods": 110,
            "clusterDNS": [DNS_SERVICE],
            "clusterDomain": "cluster.local",
            "resolvConf": str(self._folder / "resolv.conf"),
            "evictionHard": {
                "memory.available": "50Mi", "nodefs.available": "1%", "imagefs.available": "1%",
                "nodefs.inodesFree": "1%",
            },
            "imageGCHighThresholdPercent": 100,
            "imageGCLowThresholdPercent": 99,
            "volumePluginDir": "/var/lib/kubelet/volumeplugins",
        }  # fmt: skip
        (self._folder / "kubelet.yaml").write_text(json.dumps(kubelet, indent=1))
        proxy = {
            "apiVersion": "kubeproxy.config.k8s.io/v1alpha1",
            "kind": "KubeProxyConfiguration",
            "mode": "nftables",
            "clientConnection": {"kubeconfig": str(self._pki / "proxy.conf")},
            "hostnameOverride": self.name,
            "clusterCIDR": PODS,
            # Zero: leave the machine's connection tracking as it is.
            "conntrack": {
                "maxPerCore": 0,
                "min": 0,
                "tcpEstablishedTimeout": "0s",
                "tcpCloseWaitTimeout": "0s",
            },
            "healthzBindAddress": "127.0.0.1:10256",
            "metricsBindAddress": "127.0.0.1:10249",
        }
        (self._folder / "kube-proxy.yaml").write_text(json.dumps(proxy, indent=1))


def _runc() -> str:
    return shutil.which("runc", path="/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin") or "runc"


# restrict_oom_score_adj: without CAP_SYS_RESOURCE nothing may have a lower score than its parent.
_CONTAINERD = """version = 2
root = "/var/lib/containerd"
state = "/run/containerd"
oom_score = 0
disabled_plugins = [
  "io.containerd.snapshotter.v1.aufs", "io.containerd.snapshotter.v1.btrfs",
  "io.containerd.snapshotter.v1.devmapper", "io.containerd.snapshotter.v1.zfs",
  "io.containerd.tracing.processor.v1.otlp", "io.containerd.internal.v1.tracing",
]

[grpc]
  address = "/run/containerd/containerd.sock"

[plugins."io.containerd.grpc.v1.cri"]
  sandbox_image = "{pause}"
  restrict_oom_score_adj = true
  stream_server_address = "127.0.0.1"
  stream_server_port = "0"

  [plugins."io.containerd.grpc.v1.cri".containerd]
    snapshotter = "overlayfs"
    default_runtime_name = "runc"

    [plugins."io.containerd.grpc.v1.cri".containerd.runtimes.runc]
      runtime_type = "io.containerd.runc.v2"

      [plugins."io.containerd.grpc.v1.cri".containerd.runtimes.runc.options]
        SystemdCgroup = false
        BinaryName = "{runc}"

  [plugins."io.containerd.grpc.v1.cri".cni]
    bin_dir = "/opt/cni/bin"
    conf_dir = "/etc/cni/net.d"

[plugins."io.containerd.internal.v1.opt"]
  path = "/var/lib/containerd/opt"
"""
