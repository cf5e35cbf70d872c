"""Waiting until what was applied is there and works, and, where it does not, finding out why."""

import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Final

from ztunnel.cli.errors import UserError
from ztunnel.cli.install.render import Object, reference

if TYPE_CHECKING:
    from ztunnel.cli.install.progress import Progress
    from ztunnel.store.kube.api import Api

_PAUSE: Final = 0.3  # seconds between two looks
_PULL: Final = (
    "ImagePullBackOff",
    "ErrImagePull",
    "ErrImageNeverPull",
    "InvalidImageName",
    "ImageInspectError",
)


class Deadline:
    """One limit for all that is waited for, in seconds."""

    def __init__(self, seconds: float) -> None:
        self.seconds = seconds
        self._end = time.monotonic() + seconds

    @property
    def over(self) -> bool:
        return time.monotonic() >= self._end


def until(look: Callable[[], str], deadline: Deadline, progress: "Progress") -> str:
    """Look until there is nothing left to wait for ("") or the deadline is over; what is missing then.

    An API server that does not answer is waited for, too.
    """
    from ztunnel.store.kube.api import ApiError

    while True:
        try:
            missing = look()
        except ApiError as error:
            if not error.transient:
                raise
            missing = str(error)
        if not missing or deadline.over:
            return missing
        progress.waiting(missing)
        time.sleep(_PAUSE)


def definition_ready(live: Object | None) -> str:
    """What a CustomResourceDefinition lacks, "" if it is served. Raises UserError where it never will be."""
    if live is None:
        return "not created yet"
    for condition in (live.get("status") or {}).get("conditions") or ():
        if condition["type"] == "NamesAccepted" and condition["status"] == "False":
            raise UserError(
                f"{reference(live)}: its names are taken: {condition.get('message', '')}",
                "remove the definition that has them: kubectl get crds",
            )
        if condition["type"] == "Established" and condition["status"] == "True":
            return ""
    return "not served yet"


def workload_ready(live: Object | None) -> str:
    """What a Deployment or DaemonSet lacks until all of its pods are new and available, "" for nothing."""
    if live is None:
        return "not created yet"
    status: dict[str, Any] = live.get("status") or {}
    if status.get("observedGeneration", 0) < live["metadata"].get("generation", 0):
        return "not looked at yet by its controller"
    if live["kind"] == "DaemonSet":
        wanted = status.get("desiredNumberScheduled", 0)
        new, available = status.get("updatedNumberScheduled", 0), status.get("numberAvailable", 0)
        old = 0
    else:
        wanted = live["spec"].get("replicas", 1)
        new, available = status.get("updatedReplicas", 0), status.get("availableReplicas", 0)
        old = status.get("replicas", 0) - new
    if new < wanted:
        return f"{new} of {wanted} pods are new"
    if old > 0:
        return f"{old} old pods are leaving"
    return "" if available >= wanted else f"{available} of {wanted} pods are ready"


def wait_for(api: "Api", obj: Object, deadline: Deadline, progress: "Progress") -> None:
    """Wait for a definition or a workload. Raises UserError naming what keeps it."""
    ready = definition_ready if obj["kind"] == "CustomResourceDefinition" else workload_ready
    metadata, what = obj["metadata"], reference(obj)

    def look() -> str:
        live = api.get(obj["apiVersion"], obj["kind"], metadata.get("namespace", ""), metadata["name"])
        missing = ready(live)
        return f"{what}: {missing}" if missing else ""

    missing = until(look, deadline, progress)
    if missing:
        why, remedy = diagnose(api, obj)
        raise UserError(
            f"{missing} after {deadline.seconds:.0f}s",
            remedy or "look with: kubectl describe, or wait longer with --timeout",
            detail=why,
        )


def diagnose(api: "Api", workload: Object) -> tuple[str, str]:
    """Why a workload's pods are not ready, and what to do; "" where that cannot be seen."""
    from ztunnel.store.kube.api import ApiError

    if "selector" not in workload.get("spec", {}):
        return "", ""
    namespace, selector = workload["metadata"]["namespace"], workload["spec"]["selector"]["matchLabels"]
    try:
        pods = api.list("v1", "Pod", namespace, ",".join(f"{key}={value}" for key, value in selector.items()))
        for pod in pods:
            found = _pod_fault(pod)
            if found[0]:
                return found
        return _not_made(api, workload) if not pods else _latest_event(api, pods)
    except ApiError as error:
        return str(error), ""


def _pod_fault(pod: Object) -> tuple[str, str]:
    """What keeps a pod from being ready, and what to do."""
    name = f"{pod['metadata']['namespace']}/{pod['metadata']['name']}"
    node = pod["spec"].get("nodeName", "")
    what = f"Pod {name}" + (f" on {node}" if node else "")
    status = pod.get("status") or {}
    for condition in status.get("conditions") or ():
        if condition["type"] == "PodScheduled" and condition["status"] == "False":
            return (
                f"{what}: no node takes it: {condition.get('message', '')}",
                "make room, or ask for less: resources",
            )
    for container in [*(status.get("initContainerStatuses") or ()), *(status.get("containerStatuses") or ())]:
        waiting = (container.get("state") or {}).get("waiting") or {}
        reason, message = waiting.get("reason", ""), waiting.get("message", "")
        if reason in _PULL:
            told = f"{what}: image {container.get('image', '')}: {reason}: {message}"
            return told, "give the image with --set hub=... --set tag=..., or import it on the nodes"
        if reason == "CrashLoopBackOff":
            last = (container.get("lastState") or {}).get("terminated") or {}
            told = f"{what}: container {container['name']} ended with exit code {last.get('exitCode')}"
            return (
                told,
                f"see its log: kubectl logs -p -n {pod['metadata']['namespace']} {pod['metadata']['name']}",
            )
        if reason and reason not in ("ContainerCreating", "PodInitializing"):
            return f"{what}: {reason}: {message}", ""
    return "", ""


def _not_made(api: "Api", workload: Object) -> tuple[str, str]:
    """Why there are no pods: the latest refusal of a workload's own, or of its ReplicaSet."""
    name, namespace = workload["metadata"]["name"], workload["metadata"]["namespace"]
    for event in _events(api, namespace):
        about = event.get("involvedObject") or {}
        if event.get("reason") == "FailedCreate" and about.get("name", "").startswith(name):
            return (
                f"{about.get('kind')} {about.get('name')}: {event.get('message', '')}",
                "see what refuses its pods",
            )
    return (
        f"{reference(workload)} has no pods",
        "does a controller manager run, and do nodes match its nodeSelector?",
    )


def _latest_event(api: "Api", pods: list[Object]) -> tuple[str, str]:
    """The latest warning of pods that do not tell themselves what they lack."""
    names = {pod["metadata"]["name"] for pod in pods}
    for event in _events(api, pods[0]["metadata"]["namespace"]):
        about = event.get("involvedObject") or {}
        if about.get("kind") == "Pod" and about.get("name") in names:
            name = about["name"]
            told = f"Pod {about.get('namespace')}/{name}: {event.get('reason')}: {event.get('message', '')}"
            return told, f"see its log: kubectl logs -n {about.get('namespace')} {name}"
    return "", ""


def _events(api: "Api", namespace: str) -> list[Object]:
    """The warnings of a namespace, latest first."""
    found = [event for event in api.list("v1", "Event", namespace) if event.get("type") == "Warning"]
    return sorted(
        found, key=lambda event: event.get("lastTimestamp") or event.get("eventTime") or "", reverse=True
    )
