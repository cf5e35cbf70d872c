"""What an IstioOperator may say: each field that is acted on, the form of its value, and what it does.

The table here is also that of docs/install.md. A field that is not in it is told of, by name, and has no effect.
"""

import difflib
import re
from collections.abc import Callable, Iterator
from typing import Any, Final, NamedTuple

MOST_WORKERS: Final = 64  # of a node proxy

Path = tuple[str, ...]


class BadValue(Exception):
    """A value that a field cannot have; the message says what it is and what would be right."""


class Field(NamedTuple):
    """A field below `spec`; `check` returns the value in the form in which it is used, or raises BadValue."""

    path: Path
    check: Callable[[Any], Any]
    does: str

    @property
    def name(self) -> str:
        return ".".join(self.path)


class Warned(NamedTuple):
    """Something in the user's settings that has no effect, or not the one that one may expect."""

    field: str
    message: str

    def __str__(self) -> str:
        return f"{self.field}: {self.message}"


# The forms of values.


def _told(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."


def text(value: object) -> str:
    """A text; numbers are taken as they are written."""
    if isinstance(value, bool) or not isinstance(value, str | int | float):
        raise BadValue(f"expected a text, got {_told(value)}")
    return str(value)


def flag(value: object) -> bool:
    """true or false."""
    if isinstance(value, bool):
        return value
    if value in ("true", "false"):
        return value == "true"
    raise BadValue(f"expected true or false, got {_told(value)}")


def count(least: int, most: int) -> Callable[[Any], int]:
    """A whole number of a range."""

    def check(value: object) -> int:
        number = int(value) if isinstance(value, str) and value.isdecimal() else value
        if isinstance(number, bool) or not isinstance(number, int) or not least <= number <= most:
            raise BadValue(f"expected a number from {least} to {most}, got {_told(value)}")
        return number

    return check


def one_of(*words: str) -> Callable[[Any], str]:
    """One of these words."""

    def check(value: object) -> str:
        if value not in words:
            raise BadValue(f"expected one of {', '.join(words)}, got {_told(value)}")
        return str(value)

    return check


def label(value: object) -> str:
    """A name that is part of others: at most 40 lower case letters, digits and '-'."""
    name = text(value)
    if not re.fullmatch(r"[a-z0-9]([-a-z0-9]{0,38}[a-z0-9])?", name):
        raise BadValue(
            f"{name!r} cannot be part of a name: use at most 40 lower case letters, digits and '-', such as 1-24-0"
        )
    return name


def variables(value: object) -> dict[str, str]:
    """Environment: names and values. A null takes the variable out."""
    if not isinstance(value, dict):
        raise BadValue(f"expected 'NAME: value' lines, got {_told(value)}")
    found = {}
    for name, given in value.items():
        if not re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]*", str(name)):
            raise BadValue(f"{name!r} is not a name of a variable")
        if isinstance(given, dict | list):
            raise BadValue(f"{name}: expected a text, got {_told(given)}")
        if given is not None:
            found[str(name)] = str(given).lower() if isinstance(given, bool) else str(given)
    return found


def named_variables(value: object) -> dict[str, str]:
    """Environment as Kubernetes writes it: a list of name and value."""
    if not isinstance(value, list):
        raise BadValue(f"expected a list, got {_told(value)}")
    found = {}
    for item in value:
        if not isinstance(item, dict) or set(item) - {"name", "value"} or "name" not in item:
            raise BadValue(f"expected name and value, got {_told(item)}")
        found[str(item["name"])] = item.get("value", "")
    return variables(found)


_QUANTITY = re.compile(r"[0-9]+(\.[0-9]+)?(m|k|M|G|T|P|Ki|Mi|Gi|Ti|Pi|e[0-9]+)?")


def resources(value: object) -> dict[str, dict[str, str]]:
    """What Kubernetes calls resources: requests and limits."""
    if not isinstance(value, dict) or set(value) - {"requests", "limits"}:
        raise BadValue(f"expected requests and limits, got {_told(value)}")
    found: dict[str, dict[str, str]] = {}
    for part, amounts in value.items():
        if not isinstance(amounts, dict):
            raise BadValue(f"{part}: expected 'cpu: ...' and 'memory: ...', got {_told(amounts)}")
        for name, amount in amounts.items():
            if amount is None:
                continue
            if isinstance(amount, bool) or not _QUANTITY.fullmatch(str(amount)):
                raise BadValue(f"{part}.{name}: {_told(amount)} is not an amount such as 100m or 128Mi")
            found.setdefault(part, {})[str(name)] = str(amount)
    return found


def mapping(value: object) -> dict[str, Any]:
    """A mapping of anything."""
    if not isinstance(value, dict):
        raise BadValue(f"expected a mapping, got {_told(value)}")
    return value


def texts(value: object) -> dict[str, str]:
    """A mapping of texts: labels, annotations."""
    return {
        str(key): str(each).lower() if isinstance(each, bool) else str(each)
        for key, each in mapping(value).items()
    }


def items(value: object) -> list[Any]:
    """A list of anything."""
    if not isinstance(value, list):
        raise BadValue(f"expected a list, got {_told(value)}")
    return value


def providers(value: object) -> list[Any]:
    """extensionProviders: each has a name, and no two the same."""
    found = items(value)
    names = [each.get("name") if isinstance(each, dict) else None for each in found]
    for index, name in enumerate(names):
        if not isinstance(name, str) or not name:
            raise BadValue(f"[{index}].name: is missing")
        if name in names[:index]:
            raise BadValue(f"[{index}].name: {name!r} is there twice")
    return found


def amount(value: object) -> str | int:
    """A number, or a percentage such as 25%."""
    if isinstance(value, int) and not isinstance(value, bool) and value >= 0:
        return value
    if isinstance(value, str) and re.fullmatch(r"[0-9]+%?", value):
        return value if value.endswith("%") else int(value)
    raise BadValue(f"expected a number or a percentage such as 25%, got {_told(value)}")


def _pods(what: str) -> list[tuple[str, Callable[[Any], Any], str]]:
    """What each of the three workloads can be told, below values.COMPONENT."""
    return [
        ("hub", text, f"registry and folder of {what}'s image, instead of hub"),
        ("tag", text, f"tag of {what}'s image, instead of tag"),
        ("image", text, f"{what}'s image: its last part, or, with a / in it, all of it"),
        ("env", variables, f"environment of {what}"),
        ("resources", resources, f"resources of {what}"),
        ("nodeSelector", texts, f"nodes for {what}, by their labels"),
        ("tolerations", items, f"taints that {what} tolerates"),
        ("affinity", mapping, f"affinity of {what}"),
        ("podAnnotations", texts, f"further annotations of {what}'s pods"),
        ("podLabels", texts, f"further labels of {what}'s pods"),
    ]


def _component(path: str, what: str) -> list[tuple[str, Callable[[Any], Any], str]]:
    """What components.NAME can say: the same, as the IstioOperator API writes it."""
    return [
        (f"{path}.enabled", flag, f"whether {what} is installed"),
        (f"{path}.k8s.resources", resources, f"resources of {what}"),
        (f"{path}.k8s.env", named_variables, f"environment of {what}"),
        (f"{path}.k8s.nodeSelector", texts, f"nodes for {what}, by their labels"),
        (f"{path}.k8s.tolerations", items, f"taints that {what} tolerates"),
        (f"{path}.k8s.affinity", mapping, f"affinity of {what}"),
        (f"{path}.k8s.podAnnotations", texts, f"further annotations of {what}'s pods"),
    ]


COMPONENTS: Final = {"pilot": "the control plane", "cni": "the node agent", "ztunnel": "the node proxy"}
"""Components by the names that Istio gives them in settings."""

_LOG_LEVEL: Final = one_of("debug", "info", "warn", "error")

_FIELDS: list[tuple[str, Callable[[Any], Any], str]] = [
    ("profile", text, "which settings to start from: ambient, demo or minimal"),
    ("revision", label, "name of a second control plane beside the default one"),
    ("hub", text, "registry and folder of the image"),
    ("tag", text, "tag of the image"),
    ("namespace", one_of("istio-system"), "where the mesh is; only istio-system is possible"),
    ("components.base.enabled", flag, "whether namespace and definitions are installed"),
    *(field for name, what in COMPONENTS.items() for field in _component(f"components.{name}", what)),
    ("components.pilot.k8s.replicaCount", count(1, 100), "how many istiods, where they are not scaled by load"),
    ("components.pilot.k8s.hpaSpec.minReplicas", count(1, 100), "how many istiods at least"),
    ("components.pilot.k8s.hpaSpec.maxReplicas", count(1, 100), "how many istiods at most"),
    ("meshConfig.trustDomain", text, "the mesh's trust domain"),
    ("meshConfig.rootNamespace", label, "where policies of the whole mesh are"),
    ("meshConfig.defaultConfig.concurrency", count(1, MOST_WORKERS), "worker processes of each node proxy"),
    ("meshConfig.defaultConfig.proxyMetadata", variables, "environment of the node proxy"),
    ("meshConfig.extensionProviders", providers, "who decides for policies with action CUSTOM"),
    ("values.global.hub", text, "as hub"),
    ("values.global.tag", text, "as tag"),
    ("values.global.istioNamespace", one_of("istio-system"), "as namespace"),
    ("values.global.imagePullPolicy", one_of("Always", "IfNotPresent", "Never"), "when images are pulled"),
    ("values.global.imagePullSecrets", items, "names of Secrets that images are pulled with"),
    ("values.global.logAsJson", flag, "whether logs are JSON"),
    ("values.global.logging.level", _LOG_LEVEL, "log level of the control plane and the node agent"),
    ("values.global.network", text, "name of the cluster's network"),
    ("values.global.multiCluster.clusterName", text, "name of the cluster"),
    ("values.global.proxy.logLevel", _LOG_LEVEL, "log level of the node proxy"),
    ("values.global.proxy.resources", resources, "resources of the node proxy and of waypoints"),
    ("values.global.waypoint.resources", resources, "resources of waypoints"),
    ("values.global.defaultPodDisruptionBudget.enabled", flag, "whether one istiod at a time may be evicted"),
    ("values.global.configValidation", flag, "whether policies that are wrong are refused"),
    ("values.revision", label, "as revision"),
    *(
        (f"values.{name}.{path}", check, does)
        for name, what in COMPONENTS.items() for path, check, does in _pods(what)
    ),
    ("values.pilot.autoscaleEnabled", flag, "whether istiod is scaled by its load"),
    ("values.pilot.autoscaleMin", count(1, 100), "how many istiods at least"),
    ("values.pilot.autoscaleMax", count(1, 100), "how many istiods at most"),
    ("values.pilot.replicaCount", count(1, 100), "how many istiods, where they are not scaled by load"),
    ("values.pilot.cpu.targetAverageUtilization", count(1, 100), "the load that istiod is scaled by, in percent"),
    ("values.cni.enabled", flag, "as components.cni.enabled"),
    ("values.cni.cniBinDir", text, "the nodes' folder of CNI plugins"),
    ("values.cni.cniConfDir", text, "the nodes' folder of CNI configuration"),
    ("values.cni.cniNetnsDir", text, "the nodes' folder of network namespaces"),
    ("values.cni.logging.level", _LOG_LEVEL, "log level of the node agent"),
    ("values.cni.ambient.dnsCapture", flag, "whether pods' DNS queries are answered by the node proxy"),
    ("values.cni.updateStrategy.rollingUpdate.maxUnavailable", amount, "nodes whose agent is replaced at a time"),
    ("values.ztunnel.enabled", flag, "as components.ztunnel.enabled"),
    ("values.ztunnel.revision", label, "which control plane the node proxies follow"),
    ("values.ztunnel.xdsAddress", text, "the control plane's address, if it is not the cluster's own"),
    ("values.ztunnel.caAddress", text, "the certificate authority's address, if it is not the control plane's"),
    ("values.ztunnel.logLevel", _LOG_LEVEL, "log level of the node proxy"),
    ("values.ztunnel.logAsJson", flag, "whether the node proxy's log is JSON"),
    ("values.ztunnel.terminationGracePeriodSeconds", count(1, 86400),
     "how long a leaving node proxy's connections may finish, in seconds"),
    ("values.ztunnel.updateStrategy.rollingUpdate.maxSurge", amount, "nodes whose proxy is replaced at a time"),
]  # fmt: skip

FIELDS: Final = {
    tuple(name.split(".")): Field(tuple(name.split(".")), check, does) for name, check, does in _FIELDS
}

_ALIASES: Final[dict[Path, Path]] = {
    ("values", "revision"): ("revision",),
    ("values", "profile"): ("profile",),
    ("values", "global", "hub"): ("hub",),
    ("values", "global", "tag"): ("tag",),
    ("values", "global", "istioNamespace"): ("namespace",),
    ("values", "cni", "enabled"): ("components", "cni", "enabled"),
    ("values", "ztunnel", "enabled"): ("components", "ztunnel", "enabled"),
    **{
        ("components", name, "k8s", part): ("values", name, part)
        for name in COMPONENTS
        for part in ("resources", "env", "nodeSelector", "tolerations", "affinity", "podAnnotations")
    },
    ("components", "pilot", "k8s", "replicaCount"): ("values", "pilot", "replicaCount"),
    ("components", "pilot", "k8s", "hpaSpec", "minReplicas"): ("values", "pilot", "autoscaleMin"),
    ("components", "pilot", "k8s", "hpaSpec", "maxReplicas"): ("values", "pilot", "autoscaleMax"),
}


def read(spec: dict[str, Any]) -> tuple[dict[Path, Any], list[Warned], list[Warned]]:
    """The values of a spec by their fields (several names of one thing: by one of them), warnings, and errors."""
    found: dict[Path, Any] = {}
    warnings: list[Warned] = []
    errors: list[Warned] = []
    for path, value in _leaves(spec, ()):
        field = FIELDS.get(path)
        if field is None:
            warnings.append(Warned(".".join(path), _unknown(path)))
            continue
        try:
            checked = field.check(value)
        except BadValue as error:
            errors.append(Warned(field.name, str(error)))
            continue
        target = _ALIASES.get(path, path)
        # Environment is written in two places, and both count.
        found[target] = {**checked, **found.get(target, {})} if target[-1] == "env" else checked
    if found.get(("meshConfig", "extensionProviders")):
        names = ", ".join(each["name"] for each in found["meshConfig", "extensionProviders"])
        warnings.append(
            Warned(
                "meshConfig.extensionProviders",
                f"{names}: kept in the mesh's configuration; policies with action CUSTOM, which they decide, are not "
                "enforced by this version",
            )
        )
    return found, warnings, errors


def normalized(spec: dict[str, Any]) -> dict[str, Any]:
    """The spec with values.meshConfig where it belongs; it is not changed itself."""
    values = spec.get("values")
    if not isinstance(values, dict) or "meshConfig" not in values:
        return spec
    inner = values["meshConfig"]
    rest = {**spec, "values": {key: value for key, value in values.items() if key != "meshConfig"}}
    return merged(rest, {"meshConfig": inner})


def merged(below: dict[str, Any], above: dict[str, Any]) -> dict[str, Any]:
    """Both, `above` where both say something; mappings are merged, lists are not."""
    result = dict(below)
    for key, value in above.items():
        before = result.get(key)
        result[key] = merged(before, value) if isinstance(before, dict) and isinstance(value, dict) else value
    return result


def _leaves(data: dict[str, Any], path: Path) -> Iterator[tuple[Path, Any]]:
    """The values of known fields, and the topmost ones of what is not known."""
    for key, value in data.items():
        here = (*path, str(key))
        if here in FIELDS or value is None:
            if value is not None:
                yield here, value
        elif isinstance(value, dict) and any(known[: len(here)] == here for known in FIELDS):
            yield from _leaves(value, here)
        else:
            yield here, value


def _unknown(path: Path) -> str:
    if path[:1] == ("meshConfig",):
        message = "is kept in the mesh's configuration, but this version does not act on it"
    else:
        message = "is not known to this version and has no effect"
    beside = [
        known[len(path) - 1]
        for known in FIELDS
        if known[: len(path) - 1] == path[:-1] and len(known) >= len(path)
    ]
    close = difflib.get_close_matches(path[-1], beside, 1, cutoff=0.8)
    return f"{message}; did you mean {'.'.join((*path[:-1], close[0]))}?" if close else message
