"""A kind of the tests' own, whose definition they may install and remove without harming anybody."""

from typing import Any

from tests.kube.lab import Lab
from ztunnel.store.models import Model, Object

GROUP = "test.ambient.example"


class ThingSpec(Model, frozen=True, kw_only=True):
    size: int = 0
    text: str = ""


class Thing(Object, frozen=True, kw_only=True):
    KIND = "Thing"
    API_VERSION = f"{GROUP}/v1"
    PLURAL = "things"

    spec: ThingSpec = ThingSpec()
    status: dict[str, Any] | None = None


DEFINITION = {
    "apiVersion": "apiextensions.k8s.io/v1",
    "kind": "CustomResourceDefinition",
    "metadata": {"name": f"things.{GROUP}"},
    "spec": {
        "group": GROUP,
        "scope": "Namespaced",
        "names": {"plural": "things", "kind": "Thing", "listKind": "ThingList"},
        "versions": [
            {
                "name": "v1",
                "served": True,
                "storage": True,
                "subresources": {"status": {}},
                "schema": {
                    "openAPIV3Schema": {"type": "object", "x-kubernetes-preserve-unknown-fields": True}
                },
            }
        ],
    },
}


def thing(name: str, namespace: str, **spec: Any) -> dict[str, Any]:
    metadata = {"name": name, "namespace": namespace}
    return {"apiVersion": Thing.API_VERSION, "kind": "Thing", "metadata": metadata, "spec": spec}


def define(lab: Lab) -> None:
    """Have the kind, served."""
    lab.api.apply(DEFINITION)
    lab.kubectl("wait", "--for=condition=Established", f"crd/things.{GROUP}", "--timeout=60s", timeout=70)


def undefine(lab: Lab) -> None:
    """Have it no longer, with all that was of it."""
    lab.kubectl("delete", "crd", f"things.{GROUP}", "--ignore-not-found", "--wait=true", timeout=70)
    lab.api.forget(Thing.API_VERSION)


def pod(name: str, namespace: str, **labels: str) -> dict[str, Any]:
    metadata = {"name": name, "namespace": namespace, "labels": labels}
    spec = {
        "containers": [{"name": "a", "image": "x", "command": ["sleep"], "ports": [{"containerPort": 80}]}],
        "automountServiceAccountToken": False,
    }
    return {"apiVersion": "v1", "kind": "Pod", "metadata": metadata, "spec": spec}
