"""Words of istioctl, linkerd and kubectl that `ambient` has other words for. Pure."""

from collections.abc import Iterable, Mapping, Sequence
from types import MappingProxyType

ALIASES: Mapping[str, str] = MappingProxyType(
    {"ps": "proxy-status", "pc": "proxy-config", "zc": "proxy-config", "ztunnel-config": "proxy-config"}
)
"""istioctl's other names of verbs that are the same here."""

_VERSION = "for this command: ambient --version; for what runs: ambient check"
_LABEL = "there are no sidecars: label the namespace (ambient label namespace NAME istio.io/dataplane-mode=ambient)"
_ALONE = "leave the word out: ambient stat, top, tap, check, waypoint and the others are verbs of their own"

WORDS: Mapping[str, str] = MappingProxyType(
    {
        "admin": "levels of the logs: docs/debugging.md, /logging",
        "annotate": "kubectl annotate",
        "bug-report": "ambient check, ambient analyze, ambient proxy-config all",
        "config": "ambient get",
        "create": "ambient apply -f FILE",
        "create-remote-secret": "there is one cluster to a mesh in this version",
        "dashboard": "no web pages: ambient stat, ambient top, ambient graph; docs/telemetry.md for Prometheus",
        "describe": "kubectl describe; who may connect: ambient authz explain; the proxy's view: ambient proxy-config",
        "diagnostics": "ambient proxy-config, ambient proxy-status",
        "diff": "ambient install --dry-run, ambient authz check -f FILE",
        "edges": "ambient graph",
        "edit": "kubectl edit",
        "experimental": _ALONE,
        "identity": "ambient proxy-config certificates",
        "inject": _LABEL,
        "kube-inject": _LABEL,
        "kube-uninject": _LABEL,
        "ls": "ambient get",
        "manifest": "ambient install -o yaml",
        "multicluster": "there is one cluster to a mesh in this version",
        "operator": "ambient install",
        "precheck": "ambient check --pre",
        "profile": "ambient install --profile ambient, demo or minimal; docs/install.md",
        "remote-clusters": "there is one cluster to a mesh in this version",
        "restart": "kubectl rollout restart daemonset/ztunnel -n istio-system",
        "rollout": "kubectl rollout; to bring the mesh to this version: ambient upgrade",
        "routes": "ambient stat services",
        "start": "ambient up DIR, or in a cluster ambient install",
        "stop": "ambient down, or in a cluster ambient uninstall --purge",
        "tag": "revisions are chosen by name (label istio.io/rev); docs/install.md",
        "uninject": _LABEL,
        "unlabel": "ambient label KIND NAME KEY-",
        "validate": "ambient analyze -f FILE",
        "verify-install": "ambient check",
        "version": _VERSION,
        "viz": _ALONE,
        "wait": "ambient check --wait 60, ambient waypoint status --wait",
        "x": _ALONE,
    }
)
"""What other commands' words are here, as it is told."""

_PARTS: Mapping[str, str] = MappingProxyType(
    {
        "bootstrap": "all",
        "cluster": "services",
        "clusters": "services",
        "endpoint": "workloads",
        "endpoints": "workloads",
        "listener": "",
        "listeners": "",
        "route": "services",
        "routes": "services",
        "secret": "certificates",
        "secrets": "certificates",
    }
)
"""What `istioctl proxy-config` calls the parts of Envoy's configuration, and where the same is seen here."""


def of_verb(word: str, known: Iterable[str]) -> str:
    """What to say of a verb that does not exist, "" if nothing comes to mind."""
    return WORDS.get(word) or near(word, [*known, *ALIASES])


def of_part(word: str, known: Iterable[str]) -> str:
    """What to say of something that `proxy-config` does not show, "" if nothing comes to mind."""
    part = _PARTS.get(word)
    if part is None:
        return near(word, known)
    return f"the node proxy has none; nearest is: {part}" if part else "the node proxy has none"


def near(word: str, known: Iterable[str]) -> str:
    """A question for the known words that are spelt nearly so, "" if there is none."""
    import difflib

    found: Sequence[str] = difflib.get_close_matches(word, list(known), n=2)
    return f"did you mean {' or '.join(found)}?" if found else ""
