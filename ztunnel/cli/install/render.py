"""The objects of an installation: those of manifests/, changed as the settings say. No cluster is asked.

Changes are made to the readable files' objects, not to templates: what `kubectl apply -k manifests/` brings is what
comes out here for settings that say nothing.
"""

import copy
import json
from collections.abc import Callable, Mapping
from typing import Any, Final

import yaml

from ztunnel import __version__
from ztunnel.cli.install import assets
from ztunnel.cli.install.settings import DEFAULT_REVISION, NAMESPACE, Settings

Object = dict[str, Any]

PART_OF: Final = "app.kubernetes.io/part-of"
PART: Final = "ambient-mesh"
"""The label that all objects of an installation have, and its value."""
COMPONENT: Final = "operator.istio.io/component"
REVISION: Final = "istio.io/rev"
VERSION: Final = "app.kubernetes.io/version"

SERVES_UNLABELLED: Final = "DEFAULT_REVISION"
"""What tells a control plane which one serves whoever names no revision, where that has a name."""
_FOR_UNLABELLED: Final = "validation.istio.io"
"""The webhook for objects that name no revision."""
_KEPT_LABELS: Final = ("app", "app.kubernetes.io/name", COMPONENT, PART_OF)
_FILES: Final = {
    "pilot": ("mesh.yaml", "istiod.yaml"),
    "cni": ("istio-cni.yaml",),
    "ztunnel": ("ztunnel.yaml",),
}


def render(settings: Settings, *, default: str = DEFAULT_REVISION) -> list[Object]:
    """The objects, in the order in which they are needed.

    `default` is the revision that also serves whoever names none.
    """
    found: list[Object] = []
    if settings.enabled("base"):
        found += assets.documents("base/namespace.yaml") + assets.documents("base/crds")
    if settings.enabled("pilot"):
        found += _control_plane(settings, default)
    if settings.enabled("cni"):
        found += _agent(settings)
    if settings.enabled("ztunnel"):
        found += _proxy(settings)
    for obj in found:
        obj["metadata"]["labels"][VERSION] = __version__
    return found


def gateway_api() -> list[Object]:
    """Minimal definitions of the Gateway API, for clusters without one."""
    return assets.documents("gateway-api")


def definitions(objects: list[Object]) -> list[Object]:
    """Those of the objects that are CustomResourceDefinitions."""
    return [obj for obj in objects if obj["kind"] == "CustomResourceDefinition"]


def to_yaml(objects: list[Object]) -> str:
    """The objects as one YAML text."""
    return yaml.dump_all(objects, Dumper=_Plain, sort_keys=False, width=110, explicit_start=True)


class _Plain(yaml.SafeDumper):
    """Repeats what is the same, instead of pointing to it; texts of several lines stay readable."""

    def ignore_aliases(self, data: object) -> bool:
        return True

    def represent_str(self, data: str) -> yaml.ScalarNode:
        return self.represent_scalar("tag:yaml.org,2002:str", data, style="|" if "\n" in data else None)


_Plain.add_representer(str, _Plain.represent_str)


# The three workloads.


def _control_plane(settings: Settings, default: str) -> list[Object]:
    objects = [obj for name in _FILES["pilot"] for obj in assets.documents(f"base/{name}")]
    if settings.revision != DEFAULT_REVISION:
        objects = [_of_revision(obj, settings.revision) for obj in objects]
    kinds = {obj["kind"]: obj for obj in objects}
    config = kinds["ConfigMap"]
    mesh = yaml.safe_load(config["data"]["mesh"])
    config["data"]["mesh"] = yaml.safe_dump({**mesh, **settings.mesh_config}, sort_keys=True)
    deployment = kinds["Deployment"]
    container = container_of(deployment)
    _options(container, _plane_options(settings))
    set_variables(container, {
        **_logging(settings, "pilot"),
        "WAYPOINT_RESOURCES": _waypoint_resources(settings),
        SERVES_UNLABELLED: None if default == DEFAULT_REVISION else default,
        **settings.get("values.pilot.env", {}),
    })  # fmt: skip
    _pods(settings, "pilot", deployment)
    _scale(settings, objects, deployment, kinds["HorizontalPodAutoscaler"])
    if not settings.get("values.global.defaultPodDisruptionBudget.enabled", True):
        objects.remove(kinds["PodDisruptionBudget"])
    webhook = kinds["ValidatingWebhookConfiguration"]
    if not settings.get("values.global.configValidation", True):
        objects.remove(webhook)
    elif settings.revision != default:
        webhook["webhooks"] = [each for each in webhook["webhooks"] if each["name"] != _FOR_UNLABELLED]
    return objects


def serves_unlabelled(webhook: Object) -> bool:
    """Whether a ValidatingWebhookConfiguration is that of the control plane for whoever names no revision."""
    return any(each.get("name") == _FOR_UNLABELLED for each in webhook.get("webhooks") or ())


def with_unlabelled(webhooks: list[Object]) -> list[Object]:
    """The webhooks of a control plane that from now on is also that of whoever names no revision."""
    if serves_unlabelled({"webhooks": webhooks}) or not webhooks:
        return webhooks
    selector = {"matchExpressions": [{"key": REVISION, "operator": "DoesNotExist"}]}
    return [*webhooks, {**webhooks[0], "name": _FOR_UNLABELLED, "objectSelector": selector}]


def _plane_options(settings: Settings) -> dict[str, str | None]:
    return {
        "--trust-domain": settings.get("meshConfig.trustDomain"),
        "--root-namespace": settings.get("meshConfig.rootNamespace"),
        "--cluster-id": settings.get("values.global.multiCluster.clusterName"),
        "--network": settings.get("values.global.network"),
    }


def _waypoint_resources(settings: Settings) -> str | None:
    given = settings.get("values.global.waypoint.resources", settings.get("values.global.proxy.resources"))
    return json.dumps(given) if given is not None else None


def _scale(settings: Settings, objects: list[Object], deployment: Object, scaler: Object) -> None:
    """By load, or to a number."""
    if not settings.get("values.pilot.autoscaleEnabled", True):
        objects.remove(scaler)
        deployment["spec"]["replicas"] = settings.get("values.pilot.replicaCount", 1)
        return
    spec = scaler["spec"]
    least = settings.get("values.pilot.autoscaleMin", spec["minReplicas"])
    spec["minReplicas"] = least
    spec["maxReplicas"] = settings.get("values.pilot.autoscaleMax", max(spec["maxReplicas"], least))
    load = settings.get("values.pilot.cpu.targetAverageUtilization")
    if load is not None:
        spec["metrics"][0]["resource"]["target"]["averageUtilization"] = load


def _agent(settings: Settings) -> list[Object]:
    objects = assets.documents("base/istio-cni.yaml")
    daemons = _one(objects, "DaemonSet")
    daemons["metadata"]["labels"][REVISION] = settings.node_revision
    container = container_of(daemons)
    capture = settings.get("values.cni.ambient.dnsCapture")
    set_variables(container, {
        **_logging(settings, "cni"),
        "LOG_LEVEL": settings.get("values.cni.logging.level", settings.get("values.global.logging.level")),
        "AMBIENT_DNS_CAPTURE": None if capture is None else str(capture).lower(),
        **settings.get("values.cni.env", {}),
    })  # fmt: skip
    for field, volume in (("cniBinDir", "cni-bin"), ("cniConfDir", "cni-conf"), ("cniNetnsDir", "netns")):
        path = settings.get(f"values.cni.{field}")
        if path is not None:
            for each in pod_of(daemons)["volumes"]:
                if each["name"] == volume:
                    each["hostPath"]["path"] = path
    unavailable = settings.get("values.cni.updateStrategy.rollingUpdate.maxUnavailable")
    if unavailable is not None:
        daemons["spec"]["updateStrategy"]["rollingUpdate"]["maxUnavailable"] = unavailable
    _pods(settings, "cni", daemons)
    return objects


def _proxy(settings: Settings) -> list[Object]:
    objects = assets.documents("base/ztunnel.yaml")
    daemons = _one(objects, "DaemonSet")
    daemons["metadata"]["labels"][REVISION] = settings.node_revision
    container = container_of(daemons)
    plane = service_name(settings.node_revision)
    xds = _address(settings.get("values.ztunnel.xdsAddress", f"{plane}.{NAMESPACE}.svc:15012"))
    grace = settings.get("values.ztunnel.terminationGracePeriodSeconds")
    workers = settings.get("meshConfig.defaultConfig.concurrency")
    capture = settings.get("values.cni.ambient.dnsCapture")
    set_variables(container, {
        **_logging(settings, "ztunnel"),
        "LOG_LEVEL": settings.get("values.ztunnel.logLevel", settings.get("values.global.proxy.logLevel")),
        "XDS_ADDRESS": xds,
        "CA_ADDRESS": _address(settings.get("values.ztunnel.caAddress", xds)),
        "CLUSTER_ID": settings.get("values.global.multiCluster.clusterName"),
        "NETWORK": settings.get("values.global.network"),
        "TRUST_DOMAIN": settings.get("meshConfig.trustDomain"),
        "ZTUNNEL_WORKER_THREADS": None if workers is None else str(workers),
        "TERMINATION_GRACE_PERIOD": None if grace is None else f"{grace}s",
        "ISTIO_META_DNS_CAPTURE": None if capture is None else str(capture).lower(),
        **settings.get("meshConfig.defaultConfig.proxyMetadata", {}),
        **settings.get("values.ztunnel.env", {}),
    })  # fmt: skip
    if grace is not None:
        pod_of(daemons)["terminationGracePeriodSeconds"] = grace + 10
    surge = settings.get("values.ztunnel.updateStrategy.rollingUpdate.maxSurge")
    if surge is not None:
        daemons["spec"]["updateStrategy"]["rollingUpdate"]["maxSurge"] = surge
    if (given := settings.get("values.global.proxy.resources")) is not None:
        container["resources"] = given
    _pods(settings, "ztunnel", daemons)
    return objects


def service_name(revision: str) -> str:
    """The Service of a control plane."""
    return "istiod" if revision == DEFAULT_REVISION else f"istiod-{revision}"


def _address(text: str) -> str:
    return text if "://" in text else f"https://{text}"


# What all workloads have.


def pod_of(workload: Object) -> Object:
    """The pods' spec."""
    spec: Object = workload["spec"]["template"]["spec"]
    return spec


def container_of(workload: Object) -> Object:
    """The pods' main container."""
    container: Object = pod_of(workload)["containers"][0]
    return container


def set_variables(container: Object, variables: Mapping[str, str | None]) -> None:
    """Set environment; None leaves a variable as it is."""
    present = container.setdefault("env", [])
    for name, value in variables.items():
        if value is None:
            continue
        item = {"name": name, "value": value}
        for index, each in enumerate(present):
            if each["name"] == name:
                present[index] = item
                break
        else:
            present.append(item)


def _options(container: Object, options: Mapping[str, str | None]) -> None:
    """Set options of the command line; None leaves one as it is."""
    arguments: list[str] = container.setdefault("args", [])
    for option, value in options.items():
        if value is None:
            continue
        if option in arguments:
            arguments[arguments.index(option) + 1] = value
        else:
            arguments += [option, value]


def _logging(settings: Settings, component: str) -> dict[str, str | None]:
    as_json = settings.get(f"values.{component}.logAsJson", settings.get("values.global.logAsJson"))
    level = settings.get("values.global.logging.level") if component == "pilot" else None
    return {"LOG_FORMAT": "json" if as_json else None, "LOG_LEVEL": level}


def _pods(settings: Settings, component: str, workload: Object) -> None:
    """What may be set for each of the workloads."""
    pod, template = pod_of(workload), workload["spec"]["template"]["metadata"]
    image, policy = settings.image(component), settings.get("values.global.imagePullPolicy")
    for container in (*pod.get("initContainers", ()), *pod["containers"]):
        container["image"] = image
        if policy is not None:
            container["imagePullPolicy"] = policy
    if (given := settings.get(f"values.{component}.resources")) is not None:
        container_of(workload)["resources"] = given
    secrets = settings.get("values.global.imagePullSecrets")
    if secrets:
        pod["imagePullSecrets"] = [each if isinstance(each, dict) else {"name": each} for each in secrets]
    pod["nodeSelector"] = {
        **pod.get("nodeSelector", {}),
        **settings.get(f"values.{component}.nodeSelector", {}),
    }
    for field in ("tolerations", "affinity"):
        if (given := settings.get(f"values.{component}.{field}")) is not None:
            pod[field] = given
    template["annotations"].update(settings.get(f"values.{component}.podAnnotations", {}))
    template["labels"] = {**settings.get(f"values.{component}.podLabels", {}), **template["labels"]}


# A revision's own names.


def _of_revision(obj: Object, revision: str) -> Object:
    """The object as that of another control plane: every name in it that is the default one's gets its own."""
    names = {
        "istiod": f"istiod-{revision}",
        "istio": f"istio-{revision}",
        "istiod-clusterrole-istio-system": f"istiod-clusterrole-{revision}-istio-system",
        "istio-validator-istio-system": f"istio-validator-{revision}-istio-system",
        "istio-leader": f"istio-leader-{revision}",
        DEFAULT_REVISION: revision,
    }
    renamed: Object = _renamed(copy.deepcopy(obj), lambda text: names.get(text, text))
    return renamed


def _renamed(data: Any, rename: Callable[[str], str], key: str = "") -> Any:
    if isinstance(data, dict):
        return {name: _renamed(value, rename, name) for name, value in data.items()}
    if isinstance(data, list):
        return [_renamed(value, rename, key) for value in data]
    return rename(data) if isinstance(data, str) and key not in _KEPT_LABELS else data


def _one(objects: list[Object], kind: str) -> Object:
    return next(obj for obj in objects if obj["kind"] == kind)


def reference(obj: Object) -> str:
    """How people are told of it: "Deployment istio-system/istiod", "Namespace istio-system"."""
    metadata = obj["metadata"]
    namespace = f"{metadata['namespace']}/" if metadata.get("namespace") else ""
    return f"{obj['kind']} {namespace}{metadata['name']}"
