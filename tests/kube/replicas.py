"""Control planes as processes of this machine that serve a lab's API server with the rights of the manifests."""

import json
import os
import signal
import subprocess
import sys
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Self

import trio
import trio_asyncio
import yaml
from google.protobuf.struct_pb2 import Struct
from grpclib.client import Channel

from tests.kube.controlplane import ADDRESS, PORT
from tests.kube.lab import Lab
from tests.telemetry.written import whole_lines
from ztunnel.store.kube.api import Api
from ztunnel.wire.citadel_grpc import IstioCertificateServiceStub
from ztunnel.wire.citadel_pb2 import IstioCertificateRequest

LIMIT = 60.0  # seconds for whatever is waited for, on a machine with other things to do
MANIFESTS = Path(__file__).parents[2] / "manifests" / "base"
RIGHTS = ("ServiceAccount", "ClusterRole", "ClusterRoleBinding", "Role", "RoleBinding")


async def until(condition: Callable[[], object], what: str, limit: float = LIMIT) -> None:
    """Wait for the condition, looking often; in a thread, for it may ask the API server."""
    with trio.move_on_after(limit):
        while not await trio.to_thread.run_sync(condition):
            await trio.sleep(0.1)
        return
    raise AssertionError(f"not within {limit} s: {what}")


class Mesh:
    """A namespace in which control planes run, with their rights; others of the lab are not touched."""

    def __init__(self, lab: Lab, folder: Path) -> None:
        self.lab = lab
        self.api: Api = lab.api
        self.folder = folder
        self.namespace = f"plane-{uuid.uuid4().hex[:6]}"
        self.replicas: list[Replica] = []
        self.cluster_wide: list[tuple[str, str, str]] = []

    @classmethod
    @contextmanager
    def made(cls, lab: Lab, folder: Path) -> Iterator[Self]:
        """One for the block; its processes end with it."""
        mesh = cls(lab, folder)
        try:
            mesh.api.apply({"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": mesh.namespace}})
            for name in ("security.istio.io_authorizationpolicies", "security.istio.io_peerauthentications"):
                mesh.apply_text((MANIFESTS / "crds" / f"{name}.yaml").read_text())
            mesh.apply_text((MANIFESTS / "istiod.yaml").read_text(), *RIGHTS)
            mesh.account("ztunnel")
            yield mesh
        finally:
            for replica in mesh.replicas:
                replica.kill()
            for place in mesh.cluster_wide:
                mesh.api.delete(place[0], place[1], "", place[2])

    def apply_text(self, text: str, *kinds: str) -> None:
        """Objects of the manifests, in this namespace; of these kinds, or all."""
        for obj in yaml.safe_load_all(text):
            if obj and (not kinds or obj["kind"] in kinds):
                data = json.dumps(obj).replace("istio-system", self.namespace)
                obj = json.loads(data)
                if obj["kind"] in ("ClusterRole", "ClusterRoleBinding", "ValidatingWebhookConfiguration"):
                    self.cluster_wide.append((obj["apiVersion"], obj["kind"], obj["metadata"]["name"]))
                self.api.apply(obj)

    def account(self, name: str, namespace: str = "") -> None:
        """A service account."""
        metadata = {"name": name, "namespace": namespace or self.namespace}
        self.api.apply({"apiVersion": "v1", "kind": "ServiceAccount", "metadata": metadata})

    def pod(self, name: str, account: str, node: str) -> str:
        """A running pod on a node that nobody has; its uid."""
        self.account(account)
        metadata = {"name": name, "namespace": self.namespace}
        spec = {
            "nodeName": node,
            "serviceAccountName": account,
            "automountServiceAccountToken": False,
            "containers": [{"name": "a", "image": "x"}],
        }
        made = self.api.apply({"apiVersion": "v1", "kind": "Pod", "metadata": metadata, "spec": spec})
        self.api.patch("v1", "Pod", self.namespace, name, {"status": {"phase": "Running"}}, "status")
        return str(made["metadata"]["uid"])

    def remove_pod(self, name: str) -> None:
        """At once: no kubelet says that it has ended."""
        path = self.api.path("v1", "Pod", self.namespace, name)
        self.api.request("DELETE", path, query={"gracePeriodSeconds": "0"})

    def token(self, account: str, pod: str = "", audience: str = "istio-ca") -> str:
        """A real token of a service account, bound to a pod."""
        bound = ["--bound-object-kind=Pod", f"--bound-object-name={pod}"] if pod else []
        return self.lab.kubectl(
            "create", "token", account, "-n", self.namespace, f"--audience={audience}", *bound
        ).strip()

    def kubeconfig(self, name: str, *, inside: bool = False) -> Path:
        """As the control plane's service account; `inside` the API server's own network namespace."""
        config = json.loads(self.lab.kubeconfig.read_text())
        token = self.lab.kubectl("create", "token", "istiod", "-n", self.namespace, "--duration=2h").strip()
        config["users"][0]["user"] = {"token": token}
        if inside:
            config["clusters"][0]["cluster"]["server"] = f"https://{ADDRESS}:{PORT}"
        path = self.folder / f"{name}.conf"
        path.touch(0o600)
        path.write_text(json.dumps(config))
        return path

    def replica(self, name: str, **how: Any) -> "Replica":
        """A control plane that is not started yet."""
        replica = Replica(self, name, **how)
        self.replicas.append(replica)
        return replica

    def roots(self, namespace: str = "") -> bytes:
        """What the ConfigMap of a namespace says; nothing if there is none."""
        found = self.api.get("v1", "ConfigMap", namespace or self.namespace, "istio-ca-root-cert")
        return str((found or {}).get("data", {}).get("root-cert.pem", "")).encode()

    def holder(self) -> str:
        """Who holds the lease."""
        found = self.api.get("coordination.k8s.io/v1", "Lease", self.namespace, "istio-leader")
        return str((found or {}).get("spec", {}).get("holderIdentity") or "")


class Replica:
    """One process. `inside`: in the API server's network namespace, where it can be asked as a webhook."""

    def __init__(self, mesh: Mesh, name: str, *, inside: bool = False, uid: str = "") -> None:
        self.mesh = mesh
        self.name = name
        self.process: subprocess.Popen[bytes] | None = None
        self._inside = inside
        self._uid = uid
        self._config = mesh.kubeconfig(name, inside=inside)
        self._port_file = mesh.folder / f"{name}.port"
        self._log = mesh.folder / f"{name}.log"

    def launch(self, *arguments: str, **environment: str) -> None:
        """Start the process; it is not ready yet."""
        self._port_file.unlink(missing_ok=True)
        self._log.unlink(missing_ok=True)
        command = [sys.executable, "-m", "ztunnel.controlplane", "--kubernetes"]
        named = {"--kubeconfig": self._config, "--port-file": self._port_file}
        for flag in ("--listen", "--ready", "--metrics", "--webhook", "--admin"):
            named[flag] = Path("127.0.0.1:0")
        for flag, value in named.items():
            if flag not in arguments:
                command += [flag, str(value)]
        if self._inside:
            command = ["nsenter", "-t", str(self.mesh.lab.control.cell.pid), "-n", *command]
        environ = {name: os.environ[name] for name in ("PATH", "PYTHONPATH", "HOME") if name in os.environ}
        environ |= {"POD_NAME": self.name, "POD_NAMESPACE": self.mesh.namespace, "POD_UID": self._uid}
        with self._log.open("ab") as log:
            self.process = subprocess.Popen(
                [*command, *arguments], stderr=log, env=environ | {"LOG_FORMAT": "json"} | environment
            )

    async def start(self, *arguments: str, **environment: str) -> None:
        """Start the process and wait until it is ready."""
        self.launch(*arguments, **environment)
        await self.ready()

    async def ready(self) -> None:
        """Wait until it serves."""
        process = self.process
        assert process is not None
        await until(lambda: self._port_file.exists() or process.poll() is not None, f"{self.name} serves")
        assert process.poll() is None, self.log

    @property
    def port(self) -> int:
        """Of xDS and certificates."""
        return int(self._port_file.read_text())

    @property
    def log(self) -> str:
        return self._log.read_text()

    def lines(self, **values: object) -> list[dict[str, Any]]:
        """The log's lines that have these values."""
        lines = [json.loads(line) for line in whole_lines(self._log) if line.startswith(b"{")]
        return [line for line in lines if values.items() <= line.items()]

    async def logged(self, words: str) -> None:
        """Wait for a line of the log with these words."""
        await until(lambda: words in self.log, f"{self.name} says {words!r}")

    def address(self, page: str) -> str:
        """HOST:PORT of the server that has a page."""
        return next(
            str(one["address"]) for one in self.lines(message="listening") if page in str(one.get("pages"))
        )

    def stop(self) -> int:
        """End it in order; the exit status."""
        assert self.process is not None
        self.process.send_signal(signal.SIGTERM)
        return self.process.wait(LIMIT)

    def kill(self) -> None:
        """End it as a crash would."""
        if self.process is not None and self.process.poll() is None:
            self.process.kill()
            self.process.wait(LIMIT)

    async def sign(self, token: str, csr: bytes, identity: str | None, ttl: int = 0) -> list[bytes]:
        """Ask for a certificate: the chain. Needs an asyncio loop. Raises GRPCError, OSError."""
        import ssl

        context = ssl.create_default_context(cadata=self.mesh.roots().decode())
        context.set_alpn_protocols(["h2"])
        metadata = Struct()
        if identity is not None:
            metadata["ImpersonatedIdentity"] = identity
        request = IstioCertificateRequest(csr=csr.decode(), validity_duration=ttl, metadata=metadata)
        channel = Channel("127.0.0.1", self.port, ssl=context)
        try:
            call = IstioCertificateServiceStub(channel).CreateCertificate
            with trio.fail_after(LIMIT):
                answer = await trio_asyncio.aio_as_trio(call)(
                    request, metadata={"authorization": f"Bearer {token}"}
                )
        finally:
            channel.close()
        return [one.encode() for one in answer.cert_chain]
