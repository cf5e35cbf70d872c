"""A sample application on both nodes, and what tests ask of it: requests, load, how its pods are."""

import json
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from typing import Any, NamedTuple

from perf.upgrade import Run, parse
from tests.kube.lab import Lab, LabError
from ztunnel.embedded.testing import until

LONGEST = 240  # seconds of load
LIMIT = 90.0  # seconds for what Kubernetes does, on two busy cores
JOINED = "ambient.istio.io/redirection"
LABEL = "istio.io/dataplane-mode"
WORDS = b"hello-from-the-sample"  # what each answer says
PORT = 8080
HBONE = 15008

APP = """
apiVersion: v1
kind: ConfigMap
metadata: {{name: reviews}}
data:
  nginx.conf: |
    worker_processes 1;
    daemon off;
    error_log stderr;
    pid /tmp/nginx.pid;
    events {{ worker_connections 4096; }}
    http {{
      access_log off;
      client_body_temp_path /tmp; proxy_temp_path /tmp; fastcgi_temp_path /tmp;
      uwsgi_temp_path /tmp; scgi_temp_path /tmp;
      keepalive_requests 100000000;
      server {{
        listen {port} backlog=4096;
        location / {{ return 200 "{words} $hostname\\n"; }}
      }}
    }}
---
apiVersion: v1
kind: ServiceAccount
metadata: {{name: reviews}}
---
apiVersion: v1
kind: ServiceAccount
metadata: {{name: sleep}}
---
apiVersion: v1
kind: Service
metadata: {{name: reviews}}
spec: {{selector: {{app: reviews}}, ports: [{{name: http, port: 80, targetPort: {port}}}]}}
---
apiVersion: apps/v1
kind: Deployment
metadata: {{name: reviews}}
spec:
  selector: {{matchLabels: {{app: reviews}}}}
  template:
    metadata: {{labels: {{app: reviews}}}}
    spec:
      serviceAccountName: reviews
      nodeSelector: {{kubernetes.io/hostname: node2}}
      terminationGracePeriodSeconds: 1
      containers:
      - name: nginx
        image: lab.local/tools:test
        command: [nginx, -c, /etc/sample/nginx.conf]
        readinessProbe: {{httpGet: {{port: {port}}}, periodSeconds: 1}}
        livenessProbe: {{tcpSocket: {{port: {port}}}, periodSeconds: 2}}
        volumeMounts: [{{name: configuration, mountPath: /etc/sample}}]
      volumes: [{{name: configuration, configMap: {{name: reviews}}}}]
---
apiVersion: apps/v1
kind: Deployment
metadata: {{name: sleep}}
spec:
  selector: {{matchLabels: {{app: sleep}}}}
  template:
    metadata: {{labels: {{app: sleep}}}}
    spec:
      serviceAccountName: sleep
      nodeSelector: {{kubernetes.io/hostname: node1}}
      terminationGracePeriodSeconds: 1
      containers:
      - {{name: sleep, image: lab.local/tools:test, command: [sleep, infinity]}}
"""


class Life(NamedTuple):
    """What tells a pod's container from another one, and whether it was ever started again."""

    pod: str
    uid: str
    container: str
    restarts: int


def ambient(lab: Lab, *words: str, code: int | None = 0, timeout: float = 300) -> str:
    """What `ambient WORDS` writes to its standard output, as a user of the lab's cluster runs it.

    AssertionError with all of its words where the exit code is another than `code` (None: any).
    """
    done = subprocess.run(
        [sys.executable, "-m", "ztunnel.cli.main", *words, "--kubeconfig", str(lab.kubeconfig)],
        capture_output=True, text=True, timeout=timeout,
    )  # fmt: skip
    assert code is None or done.returncode == code, (
        f"ambient {' '.join(words)}: exit code {done.returncode}\n{done.stdout}\n{done.stderr}"
    )
    return done.stdout


def install(lab: Lab, *words: str) -> None:
    """`ambient install` with the tests' image."""
    ambient(lab, "install", "-y", "--set", "hub=lab.local", "--set", "tag=test", *words)


class Sample:
    """The application in one namespace: `sleep` on node 1 asks `reviews` on node 2."""

    def __init__(self, lab: Lab, namespace: str) -> None:
        self.lab = lab
        self.namespace = namespace

    def pods(self, selector: str = "") -> list[dict[str, Any]]:
        """The namespace's pods that are not about to end."""
        found = json.loads(
            self.lab.kubectl("get", "pods", "-n", self.namespace, "-l", selector, "-o", "json")
        )
        return [one for one in found["items"] if "deletionTimestamp" not in one["metadata"]]

    def pod(self, app: str) -> str:
        """The name of the one pod of `app`."""
        (found,) = self.pods(f"app={app}")
        return str(found["metadata"]["name"])

    def address(self, app: str) -> str:
        (found,) = self.pods(f"app={app}")
        return str(found["status"]["podIP"])

    def lives(self) -> set[Life]:
        """Of all containers."""
        return {
            Life(
                pod["metadata"]["name"], pod["metadata"]["uid"], status["containerID"], status["restartCount"]
            )
            for pod in self.pods()
            for status in pod["status"]["containerStatuses"]
        }

    def run(self, *words: str, app: str = "sleep", timeout: float = 60) -> str:
        """Run a program in the pod of `app`."""
        return self.lab.execute(self.namespace, self.pod(app), words, timeout=timeout)

    def ask(self, url: str = "", *options: str) -> str:
        """One request's answer. AssertionError or LabError where there is none."""
        return self.run(
            "curl", "-sS", "-m", "20", *options, url or f"http://{self.address('reviews')}:{PORT}/"
        )

    def in_mesh(self, selector: str = "") -> bool:
        """Whether all pods say so."""
        pods = self.pods(selector)
        return bool(pods) and all(self._joined(pod) for pod in pods)

    def out_of_mesh(self) -> bool:
        """Whether none does."""
        return not any(self._joined(pod) for pod in self.pods())

    @staticmethod
    def _joined(pod: Mapping[str, Any]) -> bool:
        return bool(pod["metadata"].get("annotations", {}).get(JOINED) == "enabled")

    def label(self, value: str = "ambient") -> None:
        """Label the namespace, as a user does, and wait until all pods are in."""
        self.lab.kubectl("label", "namespace", self.namespace, f"{LABEL}={value}", "--overwrite")
        until(self.in_mesh, f"all pods of {self.namespace} are in the mesh", LIMIT)

    def unlabel(self) -> None:
        """Take the label away, and wait until all pods are out."""
        self.lab.kubectl("label", "namespace", self.namespace, f"{LABEL}-")
        until(self.out_of_mesh, f"all pods of {self.namespace} are out of the mesh", LIMIT)

    @contextmanager
    def joined(self) -> Iterator[None]:
        """In the mesh for the block."""
        self.label()
        try:
            yield
        finally:
            self.unlabel()

    def load(self, act: Callable[[], None], *, kept: bool, connections: int = 16) -> Run:
        """wrk from `sleep` to `reviews`, from a second before `act()` to a second after it.

        `kept`: the connections; else each request has its own.
        """
        header = "" if kept else '-H "Connection: close"'
        words = f"wrk -t1 -c{connections} -d{LONGEST}s --timeout 20s --latency {header}"
        target = f"http://{self.address('reviews')}:{PORT}/"
        found: list[str | BaseException] = []

        def work() -> None:
            try:
                script = f"echo $$ > /tmp/load; exec {words} {target}"
                found.append(self.run("sh", "-c", script, timeout=LONGEST + 60))
            except BaseException as error:  # told by the thread that waits
                found.append(error)

        thread = threading.Thread(target=work)
        thread.start()
        try:
            time.sleep(1.0)  # that much of it with nothing else going on
            act()
            time.sleep(1.0)
            in_time = thread.is_alive()
        finally:
            with suppress(LabError):  # it has ended, which is told below
                self.run("sh", "-c", "kill -INT $(cat /tmp/load)")
            thread.join()
        (told,) = found
        if isinstance(told, BaseException):
            raise told
        assert in_time, f"the load ended too early: {told}"
        return parse(told)


@contextmanager
def sample(lab: Lab, namespace: str) -> Iterator[Sample]:
    """The application, running, in a namespace that is there (`default`); all of it is removed at the end."""
    manifest = APP.format(port=PORT, words=WORDS.decode())
    lab.kubectl("apply", "-n", namespace, "-f", "-", stdin=manifest)
    try:
        for name in ("reviews", "sleep"):
            lab.wait_rollout("deployment", name, namespace)
        yield Sample(lab, namespace)
    finally:
        lab.kubectl("delete", "-n", namespace, "--ignore-not-found", "-f", "-", stdin=manifest, timeout=120)


def ports_seen(frames: list[bytes], port: int) -> int:
    """How many of the captured Ethernet frames are TCP over IPv4 from or to a port."""
    wanted = port.to_bytes(2)
    count = 0
    for frame in frames:
        if frame[12:14] == b"\x08\x00" and frame[23] == 6:
            at = 14 + 4 * (frame[14] & 15)
            count += wanted in (frame[at : at + 2], frame[at + 2 : at + 4])
    return count
