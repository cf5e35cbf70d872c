"""What a Gateway of class istio-waypoint becomes in the cluster: the objects, and the Gateway's status. Pure functions.

Names, labels, annotations and ports are those of Istio's waypoints, so that whatever selects them finds these.
"""

import copy
import re
from collections.abc import Iterable, Mapping
from types import MappingProxyType
from typing import Any, Final, NamedTuple

from ztunnel.controlplane.translate import service_hostname
from ztunnel.controlplane.waypoint_registry import (
    GATEWAY_NAME,
    HBONE_PORT,
    HBONE_PROTOCOL,
    MANAGED,
    MANAGED_BY_MESH,
    TRAFFIC,
    WAYPOINT_FOR,
)
from ztunnel.store.gateways import Gateway

GATEWAY_CLASS_NAME: Final = "gateway.networking.k8s.io/gateway-class-name"
READINESS_PORT: Final = 15021
METRICS_PORT: Final = 15020
LONGEST_NAME: Final = 63  # of a Service: a DNS label

OVERLAYS: Final = {
    "serviceAccount": "ServiceAccount",
    "deployment": "Deployment",
    "service": "Service",
    "horizontalPodAutoscaler": "HorizontalPodAutoscaler",
    "podDisruptionBudget": "PodDisruptionBudget",
}
"""Keys of the ConfigMap that a Gateway's infrastructure.parametersRef names, each YAML that is laid over the object.

The last two make the object, which a waypoint does not have otherwise.
"""
OPTIONAL: Final = {
    "HorizontalPodAutoscaler": "autoscaling/v2",
    "PodDisruptionBudget": "policy/v1",
}

Manifest = dict[str, Any]


DEFAULT_RESOURCES: Final[Mapping[str, Any]] = MappingProxyType(
    {"requests": {"cpu": "100m", "memory": "128Mi"}, "limits": {"cpu": "2", "memory": "1Gi"}}
)


class Deployment(NamedTuple):
    """What waypoints of this control plane are made with. `xds_address` is https://HOST:PORT.

    `default_revision` is the one that deploys those that name none.
    """

    image: str
    pull_policy: str
    xds_address: str
    revision: str
    cluster_id: str
    trust_domain: str
    network: str
    root_namespace: str
    pull_secrets: tuple[str, ...] = ()
    resources: Mapping[str, Any] = DEFAULT_RESOURCES
    default_revision: str = "default"


class Fault(NamedTuple):
    """What keeps a Gateway from being deployed: `reason` is one of the Gateway API's."""

    reason: str
    message: str


def faults(gateway: Gateway) -> list[Fault]:
    """What is wrong with a Gateway, by field."""
    found = []
    if len(gateway.name) > LONGEST_NAME or not re.fullmatch(r"[a-z]([-a-z0-9]*[a-z0-9])?", gateway.name):
        found.append(
            Fault(
                "Invalid",
                f"metadata.name: {gateway.name!r} is to be the name of a Service, too: use at most {LONGEST_NAME} "
                "lower case letters, digits and '-', beginning with a letter",
            )
        )
    listeners = gateway.spec.listeners
    if not any(one.port == HBONE_PORT and one.protocol == HBONE_PROTOCOL for one in listeners):
        given = ", ".join(f"{one.protocol or 'no protocol'} on {one.port}" for one in listeners) or "none"
        found.append(
            Fault(
                "ListenersNotValid",
                f"spec.listeners: a waypoint has a listener of protocol {HBONE_PROTOCOL} on port {HBONE_PORT} "
                f"(given: {given}): add it",
            )
        )
    return found


def objects(gateway: Gateway, deployment: Deployment, overlays: Mapping[str, Any]) -> list[Manifest]:
    """The objects of a Gateway without `faults`, in the order in which they are to be made."""
    made = {
        "ServiceAccount": _service_account(gateway),
        "Service": _service(gateway),
        "Deployment": _deployment(gateway, deployment),
    }
    for key, kind in OVERLAYS.items():
        overlay = overlays.get(key)
        if overlay is None:
            continue
        if kind not in made:
            made[kind] = _optional(gateway, kind)
        made[kind] = merged(
            made[kind], {"spec": overlay.get("spec", {}), "metadata": _open_metadata(overlay)}
        )
    if "HorizontalPodAutoscaler" in made:
        # Whatever the Deployment's overlay says: two who set it would never agree.
        made["Deployment"]["spec"].pop("replicas", None)
    return list(made.values())


def merged(base: Any, overlay: Any) -> Any:
    """`overlay` laid over `base`: mappings key by key (null removes one), lists of named things name by name."""
    if isinstance(base, dict) and isinstance(overlay, dict):
        result = dict(base)
        for key, value in overlay.items():
            if value is None:
                result.pop(key, None)
            else:
                result[key] = merged(result[key], value) if key in result else copy.deepcopy(value)
        return result
    if isinstance(base, list) and isinstance(overlay, list) and _named(base) and _named(overlay):
        named = {item["name"]: item for item in base}
        for item in overlay:
            name = item["name"]
            named[name] = merged(named[name], item) if name in named else copy.deepcopy(item)
        return list(named.values())
    return copy.deepcopy(overlay)


def _named(items: Iterable[Any]) -> bool:
    return all(isinstance(item, dict) and isinstance(item.get("name"), str) for item in items)


def _open_metadata(overlay: Mapping[str, Any]) -> Manifest:
    """What of an overlay's metadata may be laid over: not who the object is."""
    metadata = overlay.get("metadata") or {}
    return {key: metadata[key] for key in ("labels", "annotations") if key in metadata}


def _metadata(gateway: Gateway, **more: str) -> Manifest:
    infrastructure = gateway.spec.infrastructure
    labels = dict(infrastructure.labels) if infrastructure is not None else {}
    annotations = dict(infrastructure.annotations) if infrastructure is not None else {}
    labels |= {
        GATEWAY_NAME: gateway.name,
        GATEWAY_CLASS_NAME: gateway.spec.gateway_class_name,
        MANAGED: MANAGED_BY_MESH,
    }
    metadata: Manifest = {
        "name": gateway.name,
        "namespace": gateway.namespace,
        "labels": labels,
        "ownerReferences": [
            {
                "apiVersion": gateway.API_VERSION,
                "kind": gateway.KIND,
                "name": gateway.name,
                "uid": gateway.metadata.uid,
                "controller": True,
            }
        ],
    }
    if annotations or more:
        metadata["annotations"] = annotations | more
    return metadata


def _service_account(gateway: Gateway) -> Manifest:
    return {"apiVersion": "v1", "kind": "ServiceAccount", "metadata": _metadata(gateway)}


def _service(gateway: Gateway) -> Manifest:
    ports: dict[int, Manifest] = {
        READINESS_PORT: {
            "name": "status-port",
            "port": READINESS_PORT,
            "protocol": "TCP",
            "appProtocol": "tcp",
        }
    }
    for one in gateway.spec.listeners:
        if one.port == HBONE_PORT and one.protocol == HBONE_PROTOCOL:
            ports[one.port] = {
                "name": one.name or "mesh",
                "port": one.port,
                "protocol": "TCP",
                "appProtocol": "hbone",
            }
    return {
        "apiVersion": "v1",
        "kind": "Service",
        "metadata": _metadata(gateway, **{"networking.istio.io/traffic-distribution": "PreferClose"}),
        "spec": {
            "type": "ClusterIP",
            "ipFamilyPolicy": "PreferDualStack",
            "selector": {GATEWAY_NAME: gateway.name},
            "ports": list(ports.values()),
        },
    }


def _optional(gateway: Gateway, kind: str) -> Manifest:
    spec: Manifest
    if kind == "PodDisruptionBudget":
        spec = {"selector": {"matchLabels": {GATEWAY_NAME: gateway.name}}}
    else:
        target = {"apiVersion": "apps/v1", "kind": "Deployment", "name": gateway.name}
        spec = {"scaleTargetRef": target, "maxReplicas": 1}
    return {"apiVersion": OPTIONAL[kind], "kind": kind, "metadata": _metadata(gateway), "spec": spec}


def _from_field(name: str, path: str) -> Manifest:
    return {"name": name, "valueFrom": {"fieldRef": {"fieldPath": path}}}


def _deployment(gateway: Gateway, deployment: Deployment) -> Manifest:
    metadata = _metadata(gateway)
    template_labels = {
        "sidecar.istio.io/inject": "false",
        "istio.io/dataplane-mode": "none",
        "service.istio.io/canonical-name": gateway.name,
        "service.istio.io/canonical-revision": "latest",
        **metadata["labels"],
    }
    annotations = {
        "prometheus.io/path": "/stats/prometheus",
        "prometheus.io/port": str(METRICS_PORT),
        "prometheus.io/scrape": "true",
        "istio.io/rev": deployment.revision,
        **metadata.get("annotations", {}),
    }
    pod: Manifest = {
        "serviceAccountName": gateway.name,
        "automountServiceAccountToken": False,
        # Longer than TERMINATION_GRACE_PERIOD, for which open connections may finish.
        "terminationGracePeriodSeconds": 40,
        "containers": [_container(gateway, deployment)],
        "volumes": [
            {"name": "istiod-ca-cert", "configMap": {"name": "istio-ca-root-cert"}},
            {"name": "istio-ca-crl", "configMap": {"name": "istio-ca-crl"}},
            {
                "name": "istio-token",
                "projected": {
                    "sources": [
                        {
                            "serviceAccountToken": {
                                "path": "istio-token",
                                "audience": "istio-ca",
                                "expirationSeconds": 43200,
                            }
                        }
                    ]
                },
            },
        ],
    }
    if deployment.pull_secrets:
        pod["imagePullSecrets"] = [{"name": name} for name in deployment.pull_secrets]
    return {
        "apiVersion": "apps/v1",
        "kind": "Deployment",
        "metadata": metadata,
        # The number of replicas is the user's, or an autoscaler's.
        "spec": {
            "selector": {"matchLabels": {GATEWAY_NAME: gateway.name}},
            "template": {"metadata": {"labels": template_labels, "annotations": annotations}, "spec": pod},
        },
    }


def _container(gateway: Gateway, deployment: Deployment) -> Manifest:
    root = "/var/run/secrets/istio/root-cert.pem"
    given = {
        "WAYPOINT_NAME": gateway.name,
        "XDS_ADDRESS": deployment.xds_address,
        "CA_ADDRESS": deployment.xds_address,
        "XDS_ROOT_CA": root,
        "CA_ROOT_CA": root,
        "CRL_PATH": "/var/run/secrets/istio/crl/ca-crl.pem",
        "AUTH_TOKEN": "/var/run/secrets/tokens/istio-token",
        "CLUSTER_ID": deployment.cluster_id,
        "TRUST_DOMAIN": deployment.trust_domain,
        "NETWORK": deployment.network,
        "ROOT_NAMESPACE": deployment.root_namespace,
        "ZTUNNEL_WORKER_THREADS": "2",
        "TERMINATION_GRACE_PERIOD": "30s",
    }
    probe = {"httpGet": {"path": "/healthz/ready", "port": READINESS_PORT}, "timeoutSeconds": 3}
    return {
        "name": "istio-proxy",
        "image": deployment.image,
        "imagePullPolicy": deployment.pull_policy,
        "command": ["python", "-m", "waypoint"],
        "env": [
            *({"name": name, "value": value} for name, value in given.items() if value),
            _from_field("POD_NAME", "metadata.name"),
            _from_field("POD_NAMESPACE", "metadata.namespace"),
            _from_field("INSTANCE_IP", "status.podIP"),
            _from_field("SERVICE_ACCOUNT", "spec.serviceAccountName"),
            _from_field("NODE_NAME", "spec.nodeName"),
            {
                "name": "MEMORY_LIMIT",
                "valueFrom": {"resourceFieldRef": {"resource": "limits.memory"}},
            },
        ],
        "ports": [
            {"name": "mesh", "containerPort": HBONE_PORT, "protocol": "TCP"},
            {"name": "metrics", "containerPort": METRICS_PORT, "protocol": "TCP"},
            {"name": "status-port", "containerPort": READINESS_PORT, "protocol": "TCP"},
        ],
        "startupProbe": {**probe, "periodSeconds": 1, "failureThreshold": 60},
        "readinessProbe": {**probe, "periodSeconds": 2, "failureThreshold": 2},
        "resources": dict(deployment.resources),
        "securityContext": {
            "allowPrivilegeEscalation": False,
            "privileged": False,
            "readOnlyRootFilesystem": True,
            "runAsNonRoot": True,
            "runAsUser": 1337,
            "runAsGroup": 1337,
            "capabilities": {"drop": ["ALL"]},
            "seccompProfile": {"type": "RuntimeDefault"},
        },
        "volumeMounts": [
            {"name": "istiod-ca-cert", "mountPath": "/var/run/secrets/istio", "readOnly": True},
            {"name": "istio-ca-crl", "mountPath": "/var/run/secrets/istio/crl", "readOnly": True},
            {"name": "istio-token", "mountPath": "/var/run/secrets/tokens", "readOnly": True},
        ],
    }


# Status.


class Seen(NamedTuple):
    """What is there of a Gateway's objects: replicas ready and wanted, and the Service's addresses."""

    ready: int = 0
    wanted: int = 1
    addresses: tuple[str, ...] = ()
    problem: str = ""
    """Why the objects could not be made."""


def status(gateway: Gateway, wrong: list[Fault], seen: Seen, now: str) -> Manifest:
    """The Gateway's status; `now` (RFC 3339) is the time of what changes."""
    name = f"{gateway.namespace}/{gateway.name}"
    addresses = [one for one in gateway.status.addresses if one.value]
    if wrong:
        accepted = ("False", wrong[0].reason, "; ".join(one.message for one in wrong))
        programmed = ("False", "Invalid", "not deployed: " + "; ".join(one.message for one in wrong))
    else:
        traffic = gateway.metadata.labels.get(WAYPOINT_FOR, TRAFFIC[0])
        told = f"deployed waypoint to namespace {gateway.namespace}, for {traffic} traffic"
        if traffic not in TRAFFIC:
            known = ", ".join(TRAFFIC)
            told = f"metadata.labels[{WAYPOINT_FOR}]: {traffic!r} is none of {known}: nothing is sent to it"
        accepted = ("True", "Accepted", told)
        if seen.problem:
            programmed = ("False", "Pending", seen.problem)
        elif seen.ready:
            programmed = ("True", "Programmed", f"{seen.ready} of {seen.wanted} pods are ready")
        else:
            waits = f"Deployment {name}: 0 of {seen.wanted} pods are ready"
            programmed = ("False", "Pending", f"{waits}: see `kubectl describe deployment {gateway.name}`")
    given: list[Manifest] = [{"type": one.type, "value": one.value} for one in addresses]
    if not wrong and seen.ready and seen.addresses:
        given = [{"type": "IPAddress", "value": one} for one in seen.addresses]
        given.append({"type": "Hostname", "value": service_hostname(gateway.namespace, gateway.name)})
    return {
        "addresses": given,
        "conditions": _conditions(
            gateway, {"Accepted": accepted, "Programmed": programmed}, gateway.status.conditions, now
        ),
        "listeners": [_listener(gateway, index, now) for index in range(len(gateway.spec.listeners))],
    }


def _listener(gateway: Gateway, index: int, now: str) -> Manifest:
    listener = gateway.spec.listeners[index]
    known = next((one for one in gateway.status.listeners if one.get("name") == listener.name), {})
    if listener.port == HBONE_PORT and listener.protocol == HBONE_PROTOCOL:
        conditions = {
            "Accepted": ("True", "Accepted", "takes tunnels"),
            "Programmed": ("True", "Programmed", "takes tunnels"),
            "ResolvedRefs": ("True", "ResolvedRefs", "names nothing"),
            "Conflicted": ("False", "NoConflicts", "no conflicts"),
        }
    else:
        field = "protocol" if listener.protocol != HBONE_PROTOCOL else "port"
        why = f"spec.listeners[{index}].{field}: a waypoint listens for {HBONE_PROTOCOL} on {HBONE_PORT} only"
        reason = "UnsupportedProtocol" if field == "protocol" else "PortUnavailable"
        conditions = {
            "Accepted": ("False", reason, why),
            "Programmed": ("False", "Invalid", why),
            "ResolvedRefs": ("True", "ResolvedRefs", "names nothing"),
            "Conflicted": ("False", "NoConflicts", "no conflicts"),
        }
    before = known.get("conditions") if isinstance(known.get("conditions"), list) else []
    return {
        "name": listener.name,
        "attachedRoutes": 0,
        "supportedKinds": [],
        "conditions": _conditions(gateway, conditions, before or (), now),
    }


def _conditions(
    gateway: Gateway, wanted: Mapping[str, tuple[str, str, str]], before: Iterable[Any], now: str
) -> list[Manifest]:
    since = {}
    for one in before:
        if isinstance(one, dict):
            since[one.get("type"), one.get("status")] = one.get("lastTransitionTime")
        else:
            since[one.type, one.status] = one.last_transition_time
    return [
        {
            "type": kind,
            "status": word,
            "reason": reason,
            "message": message,
            "observedGeneration": gateway.metadata.generation,
            "lastTransitionTime": since.get((kind, word)) or now,
        }
        for kind, (word, reason, message) in wanted.items()
    ]
