"""Which waypoint stands before a Service or Pod, as proxies are told; and which policies waypoints are told."""

from typing import Any

import pytest
from google.protobuf.message import Message

from ztunnel.controlplane.registry import Registry
from ztunnel.controlplane.resources import Entry
from ztunnel.controlplane.translate import Settings
from ztunnel.store.decode import decode
from ztunnel.store.models import Object
from ztunnel.wire.authorization_pb2 import ALLOW, DENY
from ztunnel.wire.waypoint_pb2 import Policy
from ztunnel.wire.workload_pb2 import Address, GatewayAddress
from ztunnel.wire.xds_pb2 import DeltaDiscoveryResponse

SERVICE = "default/web.default.svc.cluster.local"
POD = "Kubernetes//Pod/default/web-1"
HOSTNAME = "waypoint.default.svc.cluster.local"
USE = {"istio.io/use-waypoint": "waypoint"}
READY: list[dict[str, str]] = [
    {"type": "IPAddress", "value": "10.96.9.9"},
    {"type": "Hostname", "value": HOSTNAME},
]


def made(data: dict[str, Any]) -> Object:
    result = decode(data)
    assert result.obj is not None, result.faults
    return result.obj


def service(name: str = "web", **labels: str) -> Object:
    spec = {"clusterIP": "10.96.0.1", "ports": [{"port": 80}], "selector": {"app": "web"}}
    return made({"apiVersion": "v1", "kind": "Service", "metadata": _meta(name, labels), "spec": spec})


def pod(name: str = "web-1", **labels: str) -> Object:
    status = {"phase": "Running", "podIPs": [{"ip": "10.0.0.1"}]}
    spec = {"containers": [{"name": "c"}], "nodeName": "node-1"}
    return made(
        {
            "apiVersion": "v1",
            "kind": "Pod",
            "metadata": _meta(name, {"app": "web", **labels}),
            "spec": spec,
            "status": status,
        }
    )


def namespace(name: str = "default", **labels: str) -> Object:
    return made({"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": name, "labels": labels}})


def gateway(
    name: str = "waypoint",
    space: str = "default",
    addresses: list[dict[str, str]] = READY,
    allowed: dict[str, Any] | None = None,
    class_name: str = "istio-waypoint",
    **labels: str,
) -> Object:
    listener: dict[str, Any] = {"name": "mesh", "port": 15008, "protocol": "HBONE"}
    if allowed is not None:
        listener["allowedRoutes"] = {"namespaces": allowed}
    return made(
        {
            "apiVersion": "gateway.networking.k8s.io/v1",
            "kind": "Gateway",
            "metadata": {"name": name, "namespace": space, "labels": labels},
            "spec": {"gatewayClassName": class_name, "listeners": [listener]},
            "status": {"addresses": addresses},
        }
    )


def waypoint_for(traffic: str) -> dict[str, Any]:
    return {"istio.io/waypoint-for": traffic}


def _meta(name: str, labels: dict[str, str]) -> dict[str, Any]:
    return {"name": name, "namespace": "default", "labels": labels}


class Told:
    """What proxies were told last of each resource, and the problems."""

    def __init__(self, *objects: Object) -> None:
        self.registry = Registry(Settings())
        self.resources: dict[str, Address] = {}
        self.policies: dict[str, Policy] = {}
        self.changed: set[str] = set()
        self.now(*objects)

    def now(self, *objects: Object, gone: tuple[Object, ...] = ()) -> "Told":
        for obj in objects:
            self.registry.upsert(obj)
        for obj in gone:
            self.registry.remove(obj)
        update = self.registry.flush()
        told, self.resources = self.resources, dict(self.resources)
        for name, entry in update.resources.items():
            self.resources[name] = _message(entry, Address())
        self.changed = {name for name, message in self.resources.items() if told.get(name) != message}
        for name, entry in update.targeted.items():
            self.policies[name] = _message(entry, Policy())
        return self

    @property
    def service(self) -> GatewayAddress:
        return self.resources[SERVICE].service.waypoint

    @property
    def pod(self) -> GatewayAddress:
        return self.resources[POD].workload.waypoint

    @property
    def problems(self) -> str:
        return "\n".join(map(str, self.registry.problems))


def _message(entry: Entry | None, message: Any) -> Any:
    if entry is not None:
        (resource,) = DeltaDiscoveryResponse.FromString(entry.encoded).resources
        message.ParseFromString(resource.resource.value)
    assert isinstance(message, Message)
    return message


def is_through(address: GatewayAddress) -> bool:
    """Whether it names the waypoint, by its hostname."""
    if not address.ByteSize():
        return False
    assert (address.hostname.namespace, address.hostname.hostname) == ("default", HOSTNAME)
    assert address.hbone_mtls_port == 15008
    return True


@pytest.mark.parametrize(
    ("of_namespace", "of_object", "traffic", "of_service", "of_pod"),
    [
        ({}, {}, "", False, False),
        (USE, {}, "", True, False),
        ({}, USE, "", True, False),
        (USE, {}, "service", True, False),
        (USE, {}, "workload", False, True),
        (USE, {}, "all", True, True),
        (USE, {}, "none", False, False),
        (USE, {"istio.io/use-waypoint": "none"}, "all", False, False),
        ({"istio.io/use-waypoint": "other"}, USE, "all", True, True),
        (USE, {"istio.io/use-waypoint": "other"}, "all", False, False),
        ({"istio.io/use-waypoint": "none"}, {}, "all", False, False),
        ({"istio.io/use-waypoint": "none"}, USE, "all", True, True),
    ],
)
def test_who_has_a_waypoint(
    of_namespace: dict[str, str], of_object: dict[str, str], traffic: str, of_service: bool, of_pod: bool
) -> None:
    """The object's label over the namespace's, and of the traffic that the waypoint is for."""
    told = Told(
        namespace(**of_namespace),
        gateway(**waypoint_for(traffic)) if traffic else gateway(),
        service(**of_object),
        pod(**of_object),
    )
    assert is_through(told.service) == of_service
    assert is_through(told.pod) == of_pod


def test_a_waypoint_counts_from_when_it_has_an_address_on() -> None:
    told = Told(namespace(**USE), gateway(addresses=[]), service(), pod())
    assert not is_through(told.service)
    assert "waypoint default/waypoint is not ready yet" in told.problems
    told.now(gateway())
    assert is_through(told.service)
    assert told.problems == ""
    told.now(gone=(gateway(),))
    assert not is_through(told.service)
    assert "waypoint default/waypoint does not exist" in told.problems
    assert "ambient waypoint apply --namespace default --name waypoint" in told.problems


def test_changes_of_labels_travel_at_once_and_no_others_are_told_again() -> None:
    told = Told(namespace(), gateway(), service(), pod())
    assert SERVICE in told.now(namespace(**USE)).changed
    assert is_through(told.service)
    assert told.now(namespace(**USE, team="a")).changed == set()
    assert told.now(gateway()).changed == set()
    assert not is_through(told.now(namespace()).service)
    assert is_through(told.now(service(**USE)).service)
    assert told.changed == {SERVICE}


def test_by_address_where_there_is_no_hostname() -> None:
    told = Told(namespace(**USE), gateway(addresses=READY[:1]), service())
    assert told.service.address.address == bytes([10, 96, 9, 9])
    told.now(gateway(addresses=[{"type": "IPAddress", "value": "not one"}]))
    assert not told.service.ByteSize()


@pytest.mark.parametrize(
    ("allowed", "through"),
    [
        (None, False),
        ({"from": "Same"}, False),
        ({"from": "All"}, True),
        ({"from": "Selector", "selector": {"matchLabels": {"team": "a"}}}, True),
        ({"from": "Selector", "selector": {"matchLabels": {"team": "b"}}}, False),
        ({"from": "Selector", "selector": {"matchLabels": {"kubernetes.io/metadata.name": "default"}}}, True),
    ],
)
def test_a_waypoint_of_another_namespace_has_to_allow_it(
    allowed: dict[str, Any] | None, through: bool
) -> None:
    labels = {**USE, "istio.io/use-waypoint-namespace": "shared"}
    told = Told(namespace(team="a"), gateway(space="shared", allowed=allowed), service(**labels))
    assert bool(told.service.ByteSize()) == through
    if through:
        assert told.service.hostname.namespace == "shared"
    else:
        assert "takes nothing from namespace default" in told.problems


def guarding(
    kind: str, target: str, name: str = "guard", space: str = "default", action: str = "ALLOW"
) -> Object:
    """One for a waypoint, which allows a single client (or denies it)."""
    rules = [{"from": [{"source": {"principals": ["cluster.local/ns/default/sa/client"]}}]}]
    group = "" if kind == "Service" else "gateway.networking.k8s.io"
    return made(
        {
            "apiVersion": "security.istio.io/v1",
            "kind": "AuthorizationPolicy",
            "metadata": {"name": name, "namespace": space},
            "spec": {
                "action": action,
                "targetRefs": [{"group": group, "kind": kind, "name": target}],
                "rules": rules,
            },
        }
    )


@pytest.mark.parametrize(
    "guard",
    [
        guarding("Service", "web"),
        guarding("Service", "web", action="DENY"),
        guarding("Gateway", "waypoint"),
        guarding("GatewayClass", "istio-waypoint", space="istio-system"),
    ],
    ids=["service", "deny", "gateway", "class"],
)
def test_nothing_goes_around_a_policy_while_its_waypoint_is_missing(guard: Object) -> None:
    told = Told(namespace(**USE), gateway(), service(), pod(), guard)
    assert is_through(told.service)
    told.now(gone=(gateway(),))
    assert is_through(told.service), "a waypoint that is not there: refused"
    assert "does not exist, and policies are for it, so connections are refused" in told.problems
    told.now(gateway(addresses=[]))
    assert is_through(told.service)
    assert not is_through(told.pod), "this waypoint is for Services"
    told.now(gateway(**waypoint_for("servise")))
    assert told.service.hostname.hostname == "waypoint.default.waypoint.invalid"
    # What somebody chose so is no hole.
    assert not told.now(gateway(**waypoint_for("none"))).service.ByteSize()
    assert not told.now(namespace(), gone=(gateway(),)).service.ByteSize()
    assert is_through(told.now(namespace(**USE)).service)
    # Without policies it is reached directly, as before.
    assert not told.now(gone=(guard,)).service.ByteSize()
    assert "so traffic goes directly" in told.problems
    assert is_through(told.now(guard).service)


def test_a_policy_closes_what_it_is_for_only() -> None:
    told = Told(namespace(**USE), service(), pod(), guarding("Service", "other"))
    told.now(guarding("Gateway", "other", "far"), guarding("Service", "web", "elsewhere", "b"))
    assert not told.service.ByteSize()
    told.now(guarding("Gateway", "waypoint"))
    assert is_through(told.service)
    assert not is_through(told.pod), "of a namespace's label nobody knows that it is for pods, too"
    assert is_through(told.now(pod(**USE)).pod)


def test_a_waypoint_that_does_not_allow_it_is_not_asked_for_what_a_policy_guards() -> None:
    labels = {**USE, "istio.io/use-waypoint-namespace": "shared"}
    told = Told(gateway(space="shared"), service(**labels), guarding("Service", "web"))
    assert told.service.hostname.hostname == "waypoint.shared.waypoint.invalid"
    told.now(gateway(space="shared", allowed={"from": "None"}))
    assert told.service.hostname.hostname == "waypoint.shared.waypoint.invalid"
    told.now(gateway(space="shared", allowed={"from": "All"}))
    assert told.service.hostname.hostname == HOSTNAME


def test_a_waypoint_has_no_waypoint() -> None:
    everybody = {"gateway.networking.k8s.io/gateway-name": "waypoint"}
    told = Told(
        namespace(**USE),
        gateway(**waypoint_for("all")),
        service("web", **{"gateway.istio.io/managed": "istio.io-mesh-controller"}),
        pod("web-1", **everybody),
    )
    assert not told.service.ByteSize()
    assert not told.pod.ByteSize()


def test_other_gateways_are_left_alone_and_a_wrong_label_is_told() -> None:
    told = Told(namespace(**USE), gateway(class_name="istio"), service())
    assert not told.service.ByteSize()
    assert "does not exist" in told.problems
    told.now(gateway(**waypoint_for("everything")))
    assert "metadata.labels[istio.io/waypoint-for]: 'everything' is not known" in told.problems


def test_the_class_says_what_its_waypoints_are_for() -> None:
    def class_of(traffic: str) -> Object:
        return made(
            {
                "apiVersion": "gateway.networking.k8s.io/v1",
                "kind": "GatewayClass",
                "metadata": {"name": "istio-waypoint", "labels": waypoint_for(traffic)},
                "spec": {"controllerName": "istio.io/mesh-controller"},
            }
        )

    told = Told(namespace(**USE), class_of("workload"), gateway(), service(), pod())
    assert (is_through(told.service), is_through(told.pod)) == (False, True)
    told.now(class_of("all"))
    assert (is_through(told.service), is_through(told.pod)) == (True, True)
    told.now(gateway(**waypoint_for("service")))
    assert (is_through(told.service), is_through(told.pod)) == (True, False)


def policy(name: str, spec: dict[str, Any], space: str = "default") -> Object:
    return made(
        {
            "apiVersion": "security.istio.io/v1",
            "kind": "AuthorizationPolicy",
            "metadata": {"name": name, "namespace": space},
            "spec": spec,
        }
    )


def test_policies_that_target_waypoints_are_for_them_only() -> None:
    from_a = {"from": [{"source": {"principals": ["cluster.local/ns/default/sa/a"]}}]}
    with_path = {"to": [{"operation": {"paths": ["/x"]}}]}
    told = Told(
        policy("one", {"targetRefs": [{"kind": "Service", "group": "", "name": "web"}], "rules": [from_a]}),
        policy(
            "two",
            {
                "targetRef": {"kind": "Gateway", "group": "gateway.networking.k8s.io", "name": "waypoint"},
                "action": "DENY",
                "rules": [{**from_a, **with_path}],
            },
        ),
        policy("three", {"targetRefs": [{"kind": "Service", "name": "web"}], "rules": [with_path]}),
        policy("four", {"rules": [from_a]}),
    )
    assert set(told.policies) == {"default/one", "default/two", "default/three", "default/four"}
    one, two, three = (told.policies[f"default/{name}"] for name in ("one", "two", "three"))
    assert [(t.kind, t.namespace, t.name) for t in one.targets] == [
        ("Service", "default", "web.default.svc.cluster.local")
    ]
    assert (one.authorization.action, len(one.authorization.rules)) == (ALLOW, 1)
    assert [(t.kind, t.namespace, t.name) for t in two.targets] == [("Gateway", "default", "waypoint")]
    # What it asks of HTTP is left out of a DENY: it denies more.
    (rule,) = two.authorization.rules
    assert (two.authorization.action, len(rule.clauses)) == (DENY, 1)
    # And of an ALLOW the rule: it allows nothing.
    assert (three.authorization.action, len(three.authorization.rules)) == (ALLOW, 0)
    assert not told.policies["default/four"].ByteSize()


def test_a_target_that_is_not_understood_closes_the_namespaces_waypoints() -> None:
    told = Told(policy("one", {"targetRefs": [{"kind": "Pod", "name": "web"}], "rules": [{}]}))
    assert [(t.kind, t.name) for t in told.policies["default/one"].targets] == [("Gateway", "*")]
    assert not told.policies["default/one"].authorization.rules
