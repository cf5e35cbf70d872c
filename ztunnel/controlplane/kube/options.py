"""The control plane's command line and environment in a cluster: names and defaults are istiod's where it has them."""

import argparse
import json
import os
import socket
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final, NamedTuple

from ztunnel.controlplane.authn import NODE_PROXIES
from ztunnel.controlplane.waypoint_objects import DEFAULT_RESOURCES
from ztunnel.store.names import dns_label_fault

DEFAULT_REVISION: Final = "default"

ENVIRONMENT: Final = """environment in a cluster (a flag that is given counts before it):
  POD_NAME, POD_NAMESPACE, POD_UID   who this replica is
  REVISION, CLUSTER_ID, TRUST_DOMAIN, NETWORK, ROOT_NAMESPACE
  CA_TRUSTED_NODE_ACCOUNTS           service accounts (NAMESPACE/NAME,...) that act for the pods of their node,
                                     default istio-system/ztunnel with the namespace of the control plane
  DEFAULT_REVISION                   the revision that serves whoever names none, default `default`
  WAYPOINT_RESOURCES                 requests and limits of waypoints, as JSON
  VALIDATION_WEBHOOK_CONFIG_NAME     the ValidatingWebhookConfiguration to keep the certificate of
"""


class ClusterOptions(NamedTuple):
    """What the process was asked to be, in a cluster. `default_revision` serves whoever names none."""

    namespace: str
    revision: str
    replica: str
    uid: str
    kubeconfig: Path | None
    context: str | None
    ready: str
    metrics: str
    webhook: str
    webhook_config: str
    node_proxies: tuple[str, ...]
    default_revision: str = DEFAULT_REVISION
    waypoint_resources: Mapping[str, Any] = DEFAULT_RESOURCES

    @property
    def suffix(self) -> str:
        """What the names of objects of this revision end in."""
        return "" if self.revision == DEFAULT_REVISION else f"-{self.revision}"

    @property
    def service(self) -> str:
        """The Service that is in front of this control plane."""
        return f"istiod{self.suffix}"

    @property
    def lease(self) -> str:
        """The Lease of its writers."""
        return f"istio-leader{self.suffix}"

    @property
    def server_names(self) -> tuple[str, ...]:
        """The names by which the Service is reached."""
        names = dict.fromkeys((self.service, "istiod"))
        return tuple(
            name
            for one in names
            for name in (
                f"{one}.{self.namespace}.svc",
                f"{one}.{self.namespace}",
                f"{one}.{self.namespace}.svc.cluster.local",
            )
        )


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The flags that count with --kubernetes."""
    group = parser.add_argument_group("in a Kubernetes cluster")
    group.add_argument(
        "--kubernetes",
        action="store_true",
        help="serve the cluster that this pod is in; --store, --ca-dir and --tokens are not used then",
    )
    group.add_argument(
        "--kubeconfig", type=Path, metavar="FILE", help="serve this cluster instead, for development"
    )
    group.add_argument("--context", metavar="NAME", help="of the kubeconfig, default its current one")
    group.add_argument(
        "--namespace",
        metavar="NAME",
        help="where the control plane keeps its Secrets and Lease, default POD_NAMESPACE or istio-system",
    )
    group.add_argument(
        "--revision",
        metavar="NAME",
        help="which of several control planes this is, default REVISION or default",
    )
    for flag, port, what in (
        ("--ready", 8080, "readiness (/ready)"),
        ("--metrics", 15014, "metrics (/metrics) and readiness"),
        ("--webhook", 15017, "the validating webhook (HTTPS)"),
    ):
        group.add_argument(
            flag, metavar="ADDRESS", default=f"{anywhere()}:{port}", help=f"{what}, default %(default)s"
        )
    group.add_argument(
        "--webhook-config",
        metavar="NAME",
        help="the ValidatingWebhookConfiguration whose certificate is kept right, default that of the revision",
    )


def read(given: argparse.Namespace, environment: Mapping[str, str] = os.environ) -> ClusterOptions:
    """The options of a cluster. Raises ValueError naming the flag or variable."""
    namespace = given.namespace or environment.get("POD_NAMESPACE") or "istio-system"
    revision = given.revision or environment.get("REVISION") or DEFAULT_REVISION
    for flag, name in (("--namespace", namespace), ("--revision", revision)):
        if remedy := dns_label_fault(name):
            raise ValueError(f"{flag}: {name!r} is not a valid name: {remedy}")
    accounts = environment.get("CA_TRUSTED_NODE_ACCOUNTS", "")
    trusted = tuple(one.strip() for one in accounts.split(",") if one.strip())
    for one in trusted:
        if one.count("/") != 1 or not all(one.split("/")):
            raise ValueError(f"CA_TRUSTED_NODE_ACCOUNTS: {one!r} is not NAMESPACE/NAME of a service account")
    if not trusted:
        trusted = tuple(dict.fromkeys((*NODE_PROXIES, f"{namespace}/ztunnel")))
    suffix = "" if revision == DEFAULT_REVISION else f"-{revision}"
    return ClusterOptions(
        namespace=namespace,
        revision=revision,
        replica=environment.get("POD_NAME") or f"{socket.gethostname()}-{os.getpid()}",
        uid=environment.get("POD_UID", ""),
        kubeconfig=given.kubeconfig,
        context=given.context,
        ready=given.ready,
        metrics=given.metrics,
        webhook=given.webhook,
        webhook_config=given.webhook_config
        or environment.get("VALIDATION_WEBHOOK_CONFIG_NAME")
        or f"istio-validator{suffix}-{namespace}",
        node_proxies=trusted,
        default_revision=environment.get("DEFAULT_REVISION") or DEFAULT_REVISION,
        waypoint_resources=_resources(environment),
    )


def _resources(environment: Mapping[str, str]) -> Mapping[str, Any]:
    """What waypoints ask for. Raises ValueError."""
    text = environment.get("WAYPOINT_RESOURCES")
    if not text:
        return DEFAULT_RESOURCES
    try:
        found = json.loads(text)
    except ValueError:
        found = None
    if not isinstance(found, dict) or not set(found) <= {"requests", "limits"}:
        raise ValueError(f"WAYPOINT_RESOURCES: {text!r} is not requests and limits as JSON")
    return found


def anywhere() -> str:
    """The address that takes connections of both families, where this machine has IPv6."""
    try:
        with socket.socket(socket.AF_INET6) as probe:
            probe.bind(("::", 0))
    except OSError:
        return "0.0.0.0"  # noqa: S104 (pods and the kubelet connect to the pod's address)
    return "[::]"
