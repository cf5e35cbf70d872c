"""The memory of a node's daemon as it comes, with pods in the mesh and nothing to do."""

import time

from perf.machine import pss_mb
from perf.room import node_proxies
from ztunnel.embedded.testmesh import RunningMesh

PODS = 20
SETTLE = 3.0  # seconds in which what start-up has left is done

MESH = """
apiVersion: v1
kind: Namespace
metadata: {name: default, labels: {istio.io/dataplane-mode: ambient}}
"""

POD = """
---
apiVersion: v1
kind: Pod
metadata: {{name: idle-{number}}}
spec:
  nodeName: node-1
  containers: [{{name: idle, command: [sleep, infinity]}}]
"""


def idle_pss(pods: int = PODS) -> float:
    """MB (PSS) of the ztunnel of a node, its control process and workers, after `pods` pods have joined the mesh."""
    resources = MESH + "".join(POD.format(number=number) for number in range(pods))
    with RunningMesh(resources, nodes=1) as mesh:
        mesh.wait_pods(mesh=True, limit=60)
        time.sleep(SETTLE)
        return max(map(pss_mb, node_proxies(mesh)))
