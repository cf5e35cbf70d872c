"""A large mesh as the files of a store: Deployments of equal pods behind their Services, on nodes far away."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ztunnel.store.directory import object_file
from ztunnel.store.models import Key

CREATED = "2026-01-01T00:00:00Z"
NAMESPACES = 100
NODES = 1000
PORT = 80


def write(folder: Path, pods: int, services: int, first: int = 0) -> None:
    """Write so many of each below `folder`, numbered from `first` on. Pods have two addresses and one Service."""
    for number in range(first, first + services):
        _put(folder, _service(number))
    for number in range(first, first + pods):
        _put(folder, _pod(number, first + (number - first) % services))


def _put(folder: Path, manifest: dict[str, Any]) -> None:
    metadata = manifest["metadata"]
    path = folder / object_file(Key("", manifest["kind"], metadata["namespace"], metadata["name"]))
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(manifest))


def _metadata(name: str, app: int, **more: Any) -> dict[str, Any]:
    namespace = f"team-{app % NAMESPACES}"
    return {"name": name, "namespace": namespace, "creationTimestamp": CREATED, **more}


def _service(app: int) -> dict[str, Any]:
    address = ".".join(
        map(str, _bytes(0x0A70_0000 + app))
    )  # 10.112.0.0/12: none that a mesh of ours gives out
    spec = {
        "clusterIP": address,
        "clusterIPs": [address],
        "selector": {"app": f"app-{app}"},
        "ports": [{"port": PORT, "targetPort": 8080}],
    }
    return {"apiVersion": "v1", "kind": "Service", "metadata": _metadata(f"app-{app}", app), "spec": spec}


def _pod(number: int, app: int) -> dict[str, Any]:
    addresses = [
        ".".join(map(str, _bytes(0x0A80_0000 + number))),
        f"fd00::{number >> 16:x}:{number & 0xFFFF:x}",
    ]
    metadata = _metadata(
        f"app-{app}-7d9f8b6c5d-{number:05x}",
        app,
        uid=f"00000000-0000-4000-8000-{number:012x}",
        labels={"app": f"app-{app}"},
        annotations={"ambient.istio.io/redirection": "enabled"},
    )
    spec = {
        "nodeName": f"far-{number % NODES}",
        "serviceAccountName": f"app-{app}",
        "containers": [{"name": "app", "command": ["app"], "ports": [{"containerPort": 8080}]}],
    }
    status = {
        "phase": "Running",
        "podIP": addresses[0],
        "podIPs": [{"ip": address} for address in addresses],
        "conditions": [{"type": "Ready", "status": "True"}],
    }
    return {"apiVersion": "v1", "kind": "Pod", "metadata": metadata, "spec": spec, "status": status}


def _bytes(address: int) -> Iterator[int]:
    return iter(address.to_bytes(4))
