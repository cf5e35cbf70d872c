"""The policies of the cluster: objects in, changed Authorization resources out, and which of them a pod lists.

Translates only what a change touches. Which pods have to be looked at again is told once a flush, in one pass over
the pods of the namespaces concerned, however many policies changed.
"""

import logging
from collections import defaultdict
from collections.abc import Iterator, Mapping
from typing import Final, NamedTuple

from ztunnel.controlplane import policies, policy_status, waypoint_policies
from ztunnel.controlplane.claims import Owner
from ztunnel.controlplane.policies import Modes, policy_key
from ztunnel.controlplane.policy_status import Finding
from ztunnel.controlplane.resources import AUTHORIZATION_TYPE, Entry, entry
from ztunnel.controlplane.waypoint_policies import Target
from ztunnel.store import authorization, peerauth
from ztunnel.store.authorization import DENY, Policy
from ztunnel.store.models import AuthorizationPolicy, PeerAuthentication, Pod
from ztunnel.store.peerauth import STRICT, UNSET, PeerPolicy
from ztunnel.telemetry.log import fields

logger = logging.getLogger("controlplane.policies")

PolicyObject = AuthorizationPolicy | PeerAuthentication

_EVERYWHERE: Final = ""  # the namespace under which stands what selects pods of all of them
_NOT_A_TIME: Final = "~"  # sorts after every timestamp
_CLOSED: Final = Policy(DENY, {}, (), (), False, False, ())
_CLOSED_PEER: Final = PeerPolicy({}, STRICT, {}, False, False, ())


class PolicyUpdate(NamedTuple):
    """Resources to replace (None: to remove), and what the status of changed objects shall say.

    `targeted` are the policies of waypoints.
    """

    resources: dict[str, Entry | None]
    findings: list[tuple[PolicyObject, Finding]]
    targeted: dict[str, Entry | None]


class _Selections:
    """Label selectors, each under one of the labels that it asks for: what selects a pod is found by its labels."""

    def __init__(self) -> None:
        self._by_label: dict[tuple[str, str, str], dict[Owner, dict[str, str]]] = {}
        self.namespaces: dict[str, int] = {}  # how many stand under each

    def add(self, namespace: str, owner: Owner, selector: dict[str, str]) -> None:
        """Put in a selector, which must not be empty."""
        label = min(selector)
        self._by_label.setdefault((namespace, label, selector[label]), {})[owner] = selector
        self.namespaces[namespace] = self.namespaces.get(namespace, 0) + 1

    def remove(self, namespace: str, owner: Owner, selector: dict[str, str]) -> None:
        """Take out what was put in."""
        label = min(selector)
        place = (namespace, label, selector[label])
        del self._by_label[place][owner]
        if not self._by_label[place]:
            del self._by_label[place]
        self.namespaces[namespace] -= 1
        if not self.namespaces[namespace]:
            del self.namespaces[namespace]

    def of(self, namespace: str, labels: Mapping[str, str]) -> Iterator[Owner]:
        """Whose selectors, standing under this namespace, select these labels."""
        for label, value in labels.items():
            for owner, selector in self._by_label.get((namespace, label, value), {}).items():
                if len(selector) == 1 or selector.items() <= labels.items():
                    yield owner


class PolicyRegistry:
    """AuthorizationPolicies and PeerAuthentications, indexed by whom they concern."""

    def __init__(self, root_namespace: str) -> None:
        self.root_namespace = root_namespace
        self.targets = waypoint_policies.Targets(root_namespace)
        self._moved_targets: set[Target] = set()
        self._authorizations: dict[Owner, tuple[AuthorizationPolicy, Policy]] = {}
        self._peers: dict[Owner, tuple[PeerAuthentication, PeerPolicy]] = {}
        self._authorization_selectors = _Selections()
        self._peer_selectors = _Selections()
        self._wide_peers: dict[str, set[Owner]] = defaultdict(set)  # those without a selector, by namespace
        self._modes: dict[
            str, str
        ] = {}  # of a namespace by its own PeerAuthentication, absent where there is none
        self._closed: set[str] = set()  # namespaces with such a PeerAuthentication that is not understood
        self._strict = policy_key(root_namespace, policies.STATIC_STRICT)
        self._changed_authorizations: dict[Owner, None] = {}
        self._changed_peers: dict[Owner, None] = {}
        self._fresh = True
        self._touched = _Selections()
        self._touched_marks = 0
        self._touched_namespaces: set[str] = set()

    def change(self, owner: Owner, kind: type[PolicyObject], obj: PolicyObject | None) -> bool:
        """Take note of an object as it is now (None: gone); False if what it says is as before."""
        if kind is AuthorizationPolicy:
            return self._change_authorization(owner, obj if isinstance(obj, AuthorizationPolicy) else None)
        return self._change_peer(owner, obj if isinstance(obj, PeerAuthentication) else None)

    def names_of(self, pod: Pod) -> list[str]:
        """The policies that the pod's workload lists, sorted."""
        labels = pod.metadata.labels
        names = {
            policy_key(*owner)
            for namespace in (pod.namespace, _EVERYWHERE)
            for owner in self._authorization_selectors.of(namespace, labels)
        }
        peer = self._peer_name(pod)
        if peer:
            names.add(peer)
        return sorted(names)

    def touched(self, pods: Mapping[str, Mapping[str, Pod]]) -> Iterator[Owner]:
        """The pods (by namespace, then name) that may list other policies since the last call."""
        touched, self._touched = self._touched, _Selections()
        namespaces, self._touched_namespaces = self._touched_namespaces, set()
        if _EVERYWHERE in namespaces or _EVERYWHERE in touched.namespaces:
            concerned = set(pods)
        else:
            concerned = (namespaces | touched.namespaces.keys()) & pods.keys()
        for namespace in concerned:
            whole = namespace in namespaces or _EVERYWHERE in namespaces
            for name, pod in pods[namespace].items():
                labels = pod.metadata.labels
                if whole or any(
                    True for place in (namespace, _EVERYWHERE) for _ in touched.of(place, labels)
                ):
                    yield Owner(namespace, name)

    def moved_targets(self) -> set[Target]:
        """What policies of waypoints are for since the last call, or are for no more."""
        moved, self._moved_targets = self._moved_targets, set()
        return moved

    def flush(self) -> PolicyUpdate:
        """Translate what changed since the last call."""
        changed, self._changed_authorizations = self._changed_authorizations, {}
        changed_peers, self._changed_peers = self._changed_peers, {}
        resources: dict[str, Entry | None] = {}
        findings: list[tuple[PolicyObject, Finding]] = []
        targeted: dict[str, Entry | None] = {}
        if self._fresh:
            self._fresh = False
            message = policies.static_strict(self.root_namespace)
            resources[self._strict] = entry(self._strict, message, AUTHORIZATION_TYPE)
        for owner in changed:
            name = policy_key(*owner)
            obj, policy = self._authorizations.get(owner, (None, None))
            resources[name] = targeted[name] = None
            if obj is None or policy is None:
                continue
            if policies.is_sent(policy):
                resources[name] = self._authorization_entry(owner, policy)
            elif waypoint_policies.is_sent(policy):
                targeted[name] = waypoint_policies.policy_entry(owner, policy, self.root_namespace)
            findings.append((obj, policy_status.of_authorization(policy)))
        for owner in changed_peers:
            name = policy_key(owner.namespace, policies.CONVERTED_PREFIX + owner.name)
            peer_obj, peer = self._peers.get(owner, (None, None))
            converted = None
            if peer_obj is not None and peer is not None:
                converted = policies.peer_authentication(*owner, peer, self._modes_of(owner.namespace))
                findings.append(
                    (peer_obj, policy_status.of_peer_authentication(peer, self._older(owner, peer)))
                )
            resources[name] = entry(name, converted, AUTHORIZATION_TYPE) if converted is not None else None
        return PolicyUpdate(resources, findings, targeted)

    def _authorization_entry(self, owner: Owner, policy: Policy) -> Entry:
        name = policy_key(*owner)
        try:
            message = policies.authorization(*owner, policy, self.root_namespace)
        except Exception as error:
            logger.error("cannot translate a policy", exc_info=error, extra=fields(object=name))
            message = policies.authorization(*owner, _CLOSED, self.root_namespace)
        return entry(name, message, AUTHORIZATION_TYPE)

    def _change_authorization(self, owner: Owner, obj: AuthorizationPolicy | None) -> bool:
        before, old = self._authorizations.pop(owner, (None, None))
        new = _read(obj) if obj is not None else None
        if obj is not None and new is not None:
            self._authorizations[owner] = (obj, new)
        if old == new and _same_words(before, obj):
            return False
        self._changed_authorizations[owner] = None
        self._moved_targets |= self.targets.change(owner, old, new)
        place = _EVERYWHERE if owner.namespace == self.root_namespace else owner.namespace
        selectors = [
            policy.selector
            if policy is not None and policies.is_sent(policy) and policies.is_selective(policy)
            else None
            for policy in (old, new)
        ]
        if selectors[0] == selectors[1]:
            return True
        if selectors[0]:
            self._authorization_selectors.remove(place, owner, selectors[0])
            self._touch(place, selectors[0])
        if selectors[1]:
            self._authorization_selectors.add(place, owner, selectors[1])
            self._touch(place, selectors[1])
        return True

    def _change_peer(self, owner: Owner, obj: PeerAuthentication | None) -> bool:
        before, old = self._peers.pop(owner, (None, None))
        new = _read_peer(obj) if obj is not None else None
        if obj is not None and new is not None:
            self._peers[owner] = (obj, new)
        if old == new and _same_words(before, obj):
            return False
        self._changed_peers[owner] = None
        wide = False
        for policy, is_new in ((old, False), (new, True)):
            if policy is None:
                continue
            if not policy.selector:
                wide = True
                (
                    self._wide_peers[owner.namespace].add
                    if is_new
                    else self._wide_peers[owner.namespace].discard
                )(owner)
                continue
            (self._peer_selectors.add if is_new else self._peer_selectors.remove)(
                owner.namespace, owner, policy.selector
            )
            self._touch(owner.namespace, policy.selector)
        if wide:
            self._change_namespace(owner.namespace)
        return True

    def _change_namespace(self, namespace: str) -> None:
        """A PeerAuthentication for all workloads of the namespace came, went or changed."""
        wide = self._wide_peers[namespace]
        # The status tells which of several counts.
        self._changed_peers.update(dict.fromkeys(wide))
        oldest = self._wide_peer(namespace)
        mode = self._peers[oldest][1].mode if oldest is not None else UNSET
        closed = any(not self._peers[owner][1].sound for owner in wide)
        if (mode, closed) == (self._modes.get(namespace, UNSET), namespace in self._closed):
            return
        self._modes[namespace] = mode
        (self._closed.add if closed else self._closed.discard)(namespace)
        everywhere = namespace == self.root_namespace
        self._touched_namespaces.add(_EVERYWHERE if everywhere else namespace)
        for owner, (_, policy) in self._peers.items():
            if policy.ports and policy.mode == UNSET and (everywhere or owner.namespace == namespace):
                self._changed_peers[owner] = None

    def _modes_of(self, namespace: str) -> Modes:
        mesh = self._modes.get(self.root_namespace, UNSET)
        return Modes(UNSET if namespace == self.root_namespace else self._modes.get(namespace, UNSET), mesh)

    def peer_of(self, pod: Pod) -> str:
        """The PeerAuthentication that decides about plaintext to the pod ("" if none says anything)."""
        candidates = [self._peer_selected(pod), *map(self._wide_peer, (pod.namespace, self.root_namespace))]
        closed = [owner for owner in self._peers_of(pod) if not self._peers[owner][1].sound]
        said = [owner for owner in candidates if owner and self._peers[owner][1].mode != UNSET]
        deciding = min(closed, default=next(iter(said), None))
        return self._peers[deciding][0].ref if deciding else ""

    def _peers_of(self, pod: Pod) -> list[Owner]:
        """Every PeerAuthentication that concerns the pod, whether it counts or not."""
        wide = [
            owner
            for space in {pod.namespace, self.root_namespace}
            for owner in self._wide_peers.get(space, ())
        ]
        return [*self._peer_selectors.of(pod.namespace, pod.metadata.labels), *wide]

    def _peer_selected(self, pod: Pod) -> Owner | None:
        """Of those that select the pod the one that counts."""
        return min(self._peer_selectors.of(pod.namespace, pod.metadata.labels), key=self._age, default=None)

    def _wide_peer(self, namespace: str) -> Owner | None:
        """Of those of a whole namespace the one that counts."""
        return min(self._wide_peers.get(namespace, ()), key=self._age, default=None)

    def _peer_name(self, pod: Pod) -> str:
        """The policy that stands for the PeerAuthentications that concern the pod, "" if plaintext is taken."""
        if any(not self._peers[owner][1].sound for owner in self._peers_of(pod)):
            return self._strict
        modes = self._modes_of(pod.namespace)
        general, selected = modes.effective, self._peer_selected(pod)
        if selected is not None:
            general, others = policies.port_exceptions(self._peers[selected][1], modes)
            if others:
                return policy_key(selected.namespace, policies.CONVERTED_PREFIX + selected.name)
        return self._strict if general == STRICT else ""

    def _older(self, owner: Owner, policy: PeerPolicy) -> str:
        """The PeerAuthentication that counts for the whole namespace instead of this one, "" if this one does."""
        if policy.selector:
            return ""
        oldest = self._wide_peer(owner.namespace)
        return "" if oldest is None or oldest == owner else self._peers[oldest][0].ref

    def _age(self, owner: Owner) -> tuple[str, str]:
        return self._peers[owner][0].metadata.creation_timestamp or _NOT_A_TIME, owner.name

    def _touch(self, namespace: str, selector: dict[str, str]) -> None:
        # An owner of its own for each mark: one policy may mark two selectors.
        self._touched_marks += 1
        self._touched.add(namespace, Owner(namespace, str(self._touched_marks)), selector)


def _read(obj: AuthorizationPolicy) -> Policy:
    try:
        return authorization.read(obj)
    except Exception as error:
        logger.error(
            "cannot read a policy: it denies everything", exc_info=error, extra=fields(object=obj.ref)
        )
        return _CLOSED


def _read_peer(obj: PeerAuthentication) -> PeerPolicy:
    try:
        return peerauth.read(obj)
    except Exception as error:
        logger.error("cannot read a policy: it is STRICT", exc_info=error, extra=fields(object=obj.ref))
        return _CLOSED_PEER


def _same_words(before: PolicyObject | None, now: PolicyObject | None) -> bool:
    """Whether two versions of an object differ at most in what others write on it."""
    if before is None or now is None:
        return before is now
    return (before.metadata.uid, before.metadata.creation_timestamp, before.metadata.generation) == (
        now.metadata.uid,
        now.metadata.creation_timestamp,
        now.metadata.generation,
    )
