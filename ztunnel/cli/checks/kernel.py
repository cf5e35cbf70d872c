"""What the kernel says of the mesh's pods, and the control plane's TLS as a node sees it.

`python -m ztunnel.cli.checks.kernel STATE PID PORT` runs inside the mesh (cli/inside.py) and prints JSON.
"""

import json
import os
import socket
import ssl
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

from cni import rules
from cni.goals import goal_of
from cni.routes import RoutesError
from cni.ruleset import RulesetError
from ztunnel.embedded.statedir import State
from ztunnel.inpod import netns
from ztunnel.store.directory import DirectoryStore
from ztunnel.store.membership import in_mesh
from ztunnel.store.models import Pod

LISTEN = 0x0A
PORTS = (15001, 15006, 15008)
TLS_TIMEOUT = 5.0  # seconds


def pod_report(path: Path, pod: Pod) -> dict[str, Any]:
    """The rules in a pod's namespace that are not as they should be, and the proxy's ports where nobody listens."""
    try:
        descriptor = netns.open_path(path)
    except OSError as error:
        return {"error": f"its network namespace {path} cannot be opened: {error.strerror or error}"}
    try:
        differences = min((_differences(descriptor, pod, dns) for dns in (False, True)), key=len)
        with netns.inside(descriptor):
            listening = _listening()
    except (RulesetError, RoutesError, OSError) as error:
        return {"error": str(error)}
    finally:
        os.close(descriptor)
    return {"differences": differences, "silent": [port for port in PORTS if port not in listening]}


def _differences(descriptor: int, pod: Pod, dns: bool) -> list[str]:
    # Whether DNS is captured is the agent's setting, which nothing here knows: one of the two has to fit.
    settings = goal_of(pod, None, replace(rules.Settings(), dns_capture=dns)).settings
    return rules.verify(descriptor, settings)


def _listening() -> set[int]:
    """The ports on which somebody in this thread's network namespace listens."""
    found = set()
    for table in ("tcp", "tcp6"):
        try:
            lines = Path(f"/proc/thread-self/net/{table}").read_text().splitlines()[1:]
        except OSError:
            continue
        for line in lines:
            words = line.split()
            if int(words[3], 16) == LISTEN:
                found.add(int(words[1].rpartition(":")[2], 16))
    return found


def control_plane_tls(pid: int, port: int, root: str) -> dict[str, Any]:
    """Shake hands with the control plane as a node would; its certificate's end, or the error."""
    try:
        context = ssl.create_default_context(cafile=root)
        context.set_alpn_protocols(["h2"])
        with open(f"/proc/{pid}/ns/net") as namespace, netns.inside(namespace.fileno()):
            plain = socket.create_connection(("127.0.0.1", port), TLS_TIMEOUT)
        with plain, context.wrap_socket(plain, server_hostname="127.0.0.1") as tls:
            certificate = tls.getpeercert() or {}
        return {"not_after": ssl.cert_time_to_seconds(str(certificate["notAfter"]))}
    except (OSError, KeyError, ValueError) as error:
        return {"error": str(error) or type(error).__name__}


def report(state: Path, pid: int, port: int) -> dict[str, Any]:
    """The pods that are in the mesh of a state directory, by uid; `pid` is the mesh's, `port` its control plane's."""
    directory = State(state)
    pods = {
        pod.metadata.uid: pod_report(directory.netns / pod.metadata.uid, pod)
        for pod in DirectoryStore(directory.objects).list(Pod)
        if in_mesh(pod)
    }
    return {"pods": pods, "tls": control_plane_tls(pid, port, str(directory.ca / "root-cert.pem"))}


def main() -> int:
    """Look as told by the command line: STATE PID PORT."""
    state, pid, port = sys.argv[1:]
    print(json.dumps(report(Path(state), int(pid), int(port))))
    return 0


if __name__ == "__main__":
    sys.exit(main())
