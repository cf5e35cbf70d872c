"""Which policies the waypoint's workers have: those that target it, and those of the services behind it.

Rule: whatever concerns a connection is sent before the answer that lets it through. Each subject, the waypoint itself
and every service that somebody asked for, has a number, which is also that of its group of policies.
"""

from collections.abc import Callable, Iterator, Mapping
from typing import Final

import trio

from waypoint.config import WaypointSettings
from ztunnel.mesh.policy import Authorization
from ztunnel.mesh.policy_store import PolicyChanges, PolicyStore
from ztunnel.proxy import messages
from ztunnel.proxy.distribution import SLICE
from ztunnel.xds.targeted import EVERYTHING, Target, Targets

CLASS: Final = "istio-waypoint"
FIRST_SERVICE: Final = 1 << 20
"""Numbers from here on are services'; below, pods'."""


class WaypointPolicies:
    """The policies of one waypoint, and what the workers were told of them."""

    def __init__(
        self,
        settings: WaypointSettings,
        send: Callable[[messages.Message], object],
        targets: Mapping[str, Targets],
    ) -> None:
        """`send` reaches every worker that runs; `targets` says by policy what it is for, already at an `update`."""
        self.store = PolicyStore()
        self._send = send
        self._targets = targets
        self._own = {
            EVERYTHING,
            Target("Gateway", settings.namespace, settings.name),
            Target("Gateway", settings.namespace, "*"),
            Target("GatewayClass", settings.root_namespace, CLASS),
        }
        self._known = False  # the first state has come
        self._number = 0  # of the waypoint's pod
        self._services: dict[str, int] = {}  # by service key
        self._next = FIRST_SERVICE
        self._members: dict[
            str, dict[str, Authorization]
        ] = {}  # by service key ("": the waypoint), then name
        self._places: dict[str, frozenset[str]] = {}  # of each policy: its keys above

    def update(self, changes: PolicyChanges) -> None:
        """Take a complete change of the policies (of the first state: all of them)."""
        first, self._known = not self._known, True
        changed: dict[str, tuple[list[Authorization], list[str]]] = {}
        for name, policy in changes.items():
            self.store.put(name, policy)
            before = self._places.pop(name, frozenset())
            places = self._places_of(name) if policy is not None else frozenset()
            if places:
                self._places[name] = places
            for place in before - places:
                del self._members[place][name]
                if not self._members[place]:
                    del self._members[place]
                changed.setdefault(place, ([], []))[1].append(name)
            if policy is not None:
                for place in places:
                    self._members.setdefault(place, {})[name] = policy
                    changed.setdefault(place, ([], []))[0].append(policy)
        sent = False
        for place, (put, dropped) in changed.items():
            group = self._group(place)
            if group:
                sent = True
                for message in _slices(group, put, dropped):
                    self._send(message)
        if first and self._number:
            self._send(messages.PodPolicies(self._number, (self._number,)))
            sent = True
        if sent:
            self._send(messages.PoliciesSettled())

    def subject(self, key: str) -> int:
        """The number of a service; the workers know its policies before they read what is sent next."""
        number = self._services.get(key)
        if number is None:
            number = self._services[key] = self._next
            self._next += 1
            for message in self._of_service(key, number):
                self._send(message)
            self._send(messages.PoliciesSettled())
        return number

    def add(self, number: int, namespace: str, name: str) -> None:
        """The waypoint's own pod, before the workers hear of it."""
        self._number = number
        for message in self._of_waypoint():
            self._send(message)
        self._send(messages.PoliciesSettled())

    def remove(self, number: int) -> None:
        """The pod is gone, and so is the waypoint."""

    def workloads_changed(self) -> None:
        """Nothing here hangs on workloads."""

    def introduce(self, pods: frozenset[int]) -> Iterator[messages.Message]:
        """What a new worker must be told before it serves."""
        yield from self._of_waypoint()
        for key, number in self._services.items():
            yield from self._of_service(key, number)
        yield messages.PoliciesSettled()

    async def run(self) -> None:
        """Nothing to look after."""
        await trio.sleep_forever()

    def describe(self) -> Iterator[dict[str, object]]:
        """For the admin page: the policies of the waypoint and of each service that has some, or was asked for."""
        for place in sorted({"", *self._services, *self._members}):
            yield {
                "service": place,
                "policies": sorted(self._members.get(place, ())),
                "asked": place in self._services,
            }

    def _of_waypoint(self) -> Iterator[messages.Message]:
        if self._number and self._known:
            yield from _slices(self._number, list(self._members.get("", {}).values()), [])
            yield messages.PodPolicies(self._number, (self._number,))

    def _of_service(self, key: str, number: int) -> Iterator[messages.Message]:
        yield from _slices(number, list(self._members.get(key, {}).values()), [])
        yield messages.PodPolicies(number, (self._number, number))

    def _group(self, place: str) -> int:
        return self._services.get(place, 0) if place else self._number

    def _places_of(self, name: str) -> frozenset[str]:
        """Where a policy counts: "" for the waypoint, and the keys of services."""
        places = set()
        for target in self._targets.get(name, (EVERYTHING,)):
            if target in self._own:
                places.add("")
            elif target.kind == "Service":
                places.add(f"{target.namespace}/{target.name}")
        return frozenset(places)


def _slices(group: int, put: list[Authorization], dropped: list[str]) -> Iterator[messages.Policies]:
    """The change of a group, in messages of bounded size."""
    yield messages.Policies(group, tuple(put[:SLICE]), tuple(dropped))
    for start in range(SLICE, len(put), SLICE):
        yield messages.Policies(group, tuple(put[start : start + SLICE]))
