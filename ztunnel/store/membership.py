"""Who belongs to the mesh: what the labels ask for, and what the node agent says has been done.

Pure functions of the objects; names are those of Istio's ambient mode.
"""

from ztunnel.store.models import Namespace, Pod

MODE_LABEL = "istio.io/dataplane-mode"
MODE_AMBIENT = "ambient"
MODE_NONE = "none"
REDIRECTION_ANNOTATION = "ambient.istio.io/redirection"
REDIRECTION_ENABLED = "enabled"
SIDECAR_ANNOTATION = "sidecar.istio.io/status"
REDIRECTION_ERROR_ANNOTATION = "ambient.istio.io/redirection-error"
"""Ours: why the node agent could not bring a pod in, or take it out; absent if it could."""


def asks_for_mesh(pod: Pod, namespace: Namespace | None) -> bool:
    """Whether the labels ask for the pod to be in the mesh.

    The label on the pod decides where it is set (`none` leaves, `ambient` joins), else the one on its namespace.
    """
    mode = pod.metadata.labels.get(MODE_LABEL, "")
    if not mode and namespace is not None:
        mode = namespace.metadata.labels.get(MODE_LABEL, "")
    return mode == MODE_AMBIENT


def cannot_join(pod: Pod) -> str:
    """Why the pod can never be in the mesh, and what helps; "" if it can."""
    if pod.spec.host_network:
        return (
            "it uses the node's own network (hostNetwork), where the traffic of one pod cannot be told from others'; "
            f"label it {MODE_LABEL}={MODE_NONE}, or give it a network of its own"
        )
    if SIDECAR_ANNOTATION in pod.metadata.annotations:
        return f"it has a sidecar proxy; start it anew without one, or label it {MODE_LABEL}={MODE_NONE}"
    return ""


def wants_mesh(pod: Pod, namespace: Namespace | None) -> bool:
    """Whether the pod shall be in the mesh: its labels ask for it, and it can be."""
    return asks_for_mesh(pod, namespace) and not cannot_join(pod)


def in_mesh(pod: Pod) -> bool:
    """Whether the pod's traffic is redirected now: the node agent has written so on the pod."""
    return pod.metadata.annotations.get(REDIRECTION_ANNOTATION) == REDIRECTION_ENABLED


def redirection_error(pod: Pod) -> str:
    """Why the node agent cannot do what the labels ask for, "" if it can."""
    return pod.metadata.annotations.get(REDIRECTION_ERROR_ANNOTATION, "")
