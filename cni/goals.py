"""What shall be true of one pod of this node, decided from its object and its namespace's. Pure."""

from dataclasses import replace
from typing import NamedTuple

from cni.capture import capture_of
from cni.rules import Settings
from ztunnel.inpod.pods import WorkloadInfo
from ztunnel.store.membership import (
    REDIRECTION_ANNOTATION,
    REDIRECTION_ENABLED,
    REDIRECTION_ERROR_ANNOTATION,
    in_mesh,
    redirection_error,
    wants_mesh,
)
from ztunnel.store.models import Namespace, Pod

ENDED = ("Succeeded", "Failed")


class Goal(NamedTuple):
    """`joined`: it shall be in the mesh. `started`: its programs run. `enabled` and `error`: its annotations now.

    `problems`: what of its annotations about capture cannot be used.
    `ended`: its programs have ended for good; `removed`: and its network goes with it.
    `addresses`: the pod's, as far as its object tells. `ending`: it is being deleted.
    """

    uid: str
    info: WorkloadInfo
    joined: bool
    started: bool
    settings: Settings
    enabled: bool
    error: str
    problems: str = ""
    ended: bool = False
    removed: bool = False
    addresses: tuple[str, ...] = ()
    ending: bool = False

    @property
    def pod(self) -> str:
        """How people are told of it."""
        return f"Pod {self.info.namespace}/{self.info.name}"

    def same_work(self, other: "Goal") -> bool:
        """Whether both ask for the same, whatever has been written on the pod.

        That its programs have started decides only in which order a pod joins.
        """
        return self._work() == other._work()

    def _work(self) -> tuple[object, ...]:
        return self.uid, self.info, self.joined, self.settings, self.problems


def goal_of(pod: Pod, namespace: Namespace | None, settings: Settings) -> Goal:
    """The goal for a pod of this node; `settings` are the agent's, which the pod's annotations change (see capture)."""
    asked = capture_of(pod.metadata.annotations)
    own = replace(
        settings,
        dns_capture=settings.dns_capture if asked.dns is None else asked.dns,
        capture_inbound=settings.capture_inbound and not asked.bypass_inbound,
        exclude_ranges=asked.exclude_ranges,
        include_ranges=asked.include_ranges,
        exclude_ports=asked.exclude_ports,
        exclude_inbound_ports=asked.exclude_inbound_ports,
    )
    return Goal(
        uid=pod.metadata.uid,
        info=WorkloadInfo(pod.name, pod.namespace, pod.service_account),
        joined=wants_mesh(pod, namespace) and pod.status.phase not in ENDED,
        started=pod.status.phase == "Running",
        settings=own,
        enabled=in_mesh(pod),
        error=redirection_error(pod),
        problems="; ".join(asked.problems),
        ended=pod.status.phase in ENDED,
        removed=pod.status.phase in ENDED and bool(pod.metadata.deletion_timestamp),
        addresses=tuple(pod.addresses),
        ending=bool(pod.metadata.deletion_timestamp),
    )


def annotations_patch(pod: Pod, *, enabled: bool, error: str) -> dict[str, object] | None:
    """The merge patch (RFC 7386) that writes this on the pod, or None where it says so already."""
    if in_mesh(pod) == enabled and redirection_error(pod) == error:
        return None
    values = {
        REDIRECTION_ANNOTATION: REDIRECTION_ENABLED if enabled else None,
        REDIRECTION_ERROR_ANNOTATION: error or None,
    }
    return {"metadata": {"annotations": values}}
