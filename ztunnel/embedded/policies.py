"""Policies that are correct and yet protect less than their author may think: what the resolver says about them.

This is looked at with every change of the cluster, so it reads no more of a policy than it needs.
"""

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence

from ztunnel.embedded.findings import Finding
from ztunnel.store.authorization import UNSUPPORTED_ACTIONS
from ztunnel.store.membership import wants_mesh
from ztunnel.store.models import AuthorizationPolicy, Namespace, Object, PeerAuthentication, Pod

ROOT_NAMESPACE = "istio-system"
_NAMES_TOLD = 3

Policy = AuthorizationPolicy | PeerAuthentication


def unprotecting(
    objects: Iterable[Object], pods: Sequence[Pod], namespaces: Mapping[str, Namespace]
) -> list[Finding]:
    """A warning for each policy that selects no pod, or pods that are not in the mesh, where nothing is enforced."""
    policies = [obj for obj in objects if isinstance(obj, Policy)]
    if not policies:
        return []
    by_namespace, by_label = defaultdict[str, list[Pod]](list), defaultdict[tuple[str, str], list[Pod]](list)
    for pod in pods:
        by_namespace[pod.namespace].append(pod)
        for label in pod.metadata.labels.items():
            by_label[label].append(pod)
    outside = {
        name: [pod for pod in members if not wants_mesh(pod, namespaces.get(name))]
        for name, members in by_namespace.items()
    }
    left_out = {id(pod) for members in outside.values() for pod in members}
    findings = []
    for obj in policies:
        selector = _selector(obj)
        if selector is None:
            continue
        everywhere = obj.namespace == ROOT_NAMESPACE and isinstance(obj, AuthorizationPolicy)
        if not selector:
            findings += _outside(
                obj, outside.get(obj.namespace, []) if obj.namespace != ROOT_NAMESPACE else []
            )
            continue
        concerned = [
            pod
            for pod in by_label.get(min(selector.items()), ())
            if (everywhere or pod.namespace == obj.namespace)
            and selector.items() <= pod.metadata.labels.items()
        ]
        if not concerned:
            labels = ",".join(f"{key}={value}" for key, value in selector.items())
            where = "any namespace" if everywhere else f"namespace {obj.namespace}"
            message = f"spec.selector ({labels}) selects no pod of {where}"
            findings.append(
                Finding(obj.key, message, "make it match the labels of the pods meant", "warning")
            )
        elif not everywhere:
            findings += _outside(obj, [pod for pod in concerned if id(pod) in left_out])
    return findings


def _outside(obj: Policy, pods: Sequence[Pod]) -> list[Finding]:
    if not pods:
        return []
    names = ", ".join(pod.name for pod in pods[:_NAMES_TOLD])
    more = f" and {len(pods) - _NAMES_TOLD} more" if len(pods) > _NAMES_TOLD else ""
    message = f"is not enforced for {names}{more}: not in the mesh"
    remedy = "label the namespace or the pods istio.io/dataplane-mode=ambient"
    return [Finding(obj.key, message, remedy, "warning")]


def _selector(obj: Policy) -> dict[str, str] | None:
    """The labels that the policy asks for, none for all pods; None where it has no effect or is not understood."""
    spec = obj.spec
    if not isinstance(spec, dict) or "targetRef" in spec or "targetRefs" in spec:
        return None
    if spec.get("action") in UNSUPPORTED_ACTIONS:
        return None
    selector = spec.get("selector", {})
    labels = selector.get("matchLabels", {}) if isinstance(selector, dict) else None
    if not isinstance(labels, dict) or not all(isinstance(value, str) for value in labels.values()):
        return None
    return labels
