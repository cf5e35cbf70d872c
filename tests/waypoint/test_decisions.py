"""What the waypoint's control process answers and tells, and what its workers take for a destination."""

from typing import Any

import pytest

from tests.mesh.meshes import key, mesh, pod, service
from waypoint.config import WaypointSettings
from waypoint.destinations import GRACE, PATIENCE, Destinations
from waypoint.passage import parse_target
from waypoint.policies import FIRST_SERVICE, WaypointPolicies
from ztunnel.cli.verbs.proxy_status import _who
from ztunnel.config import SettingError
from ztunnel.mesh.model import GatewayAddress
from ztunnel.mesh.policy import Authorization
from ztunnel.mesh.route import Route
from ztunnel.proxy import messages
from ztunnel.proxy.errors import RequestRefused
from ztunnel.xds.targeted import EVERYTHING, Target, Targets

OWN = key("waypoint")
GATEWAY = GatewayAddress(service=OWN)
SERVER = pod("web-1", "10.0.0.1", services={"web": {80: 8080}})


class Asked:
    """Destinations with a clock that the test turns, and what was answered."""

    def __init__(self, *members: Any) -> None:
        self.now = 0.0
        self.state = mesh(*members)
        self.answers: list[tuple[Route, bool]] = []
        self.destinations = Destinations(
            self.state, OWN, "", lambda: None, lambda service: 7, lambda: self.now
        )

    def ask(self, authority: str = "10.96.0.1:80") -> "Asked":
        question = messages.AskRoute(1, "uid", authority.encode(), 0)
        self.destinations.answer(question, lambda route, remember: self.answers.append((route, remember)))
        return self

    def change(self, **fields: Any) -> None:
        tags = self.state.upsert_service(service("web", "10.96.0.1", ports={80: 8080}, **fields))
        self.destinations.changed(tags)

    def after(self, seconds: float) -> None:
        self.now += seconds
        self.destinations.sweep()


def test_a_destination_is_answered_with_the_number_of_its_policies() -> None:
    asked = Asked(service("web", "10.96.0.1", ports={80: 8080}, waypoint=GATEWAY), SERVER).ask()
    ((route, remember),) = asked.answers
    assert (route.error, route.subject, remember) == ("", 7, True)


def test_what_is_not_known_yet_waits_a_little() -> None:
    asked = Asked(service("web", "10.96.0.1", ports={80: 8080}), SERVER).ask()
    assert asked.answers == []
    asked.after(PATIENCE / 2)
    assert asked.answers == []
    asked.change(waypoint=GATEWAY)
    assert [route.error for route, _ in asked.answers] == [""]
    asked.ask("10.96.0.9:80")
    asked.after(PATIENCE)
    route, _ = asked.answers[-1]
    assert (route.status, len(asked.answers)) == (404, 2)


def test_what_was_behind_the_waypoint_is_served_a_little_longer() -> None:
    asked = Asked(service("web", "10.96.0.1", ports={80: 8080}, waypoint=GATEWAY), SERVER).ask()
    asked.change()
    asked.ask()
    assert [(route.error, remember) for route, remember in asked.answers] == [("", True), ("", False)]
    asked.after(GRACE)
    asked.ask()
    asked.after(PATIENCE)
    assert asked.answers[-1][0].status == 404


def test_a_refusal_without_tags_is_not_remembered() -> None:
    asked = Asked().ask("nobody.example.com:80")
    asked.after(PATIENCE)
    ((route, remember),) = asked.answers
    assert (route.status, route.tags, remember) == (404, (), False)


@pytest.mark.parametrize(
    ("authority", "target"),
    [
        ("10.96.0.1:80", ("10.96.0.1", 80)),
        ("[fd00::1]:80", ("fd00::1", 80)),
        ("[::ffff:10.96.0.1]:80", ("10.96.0.1", 80)),
        ("Web.Default.svc.cluster.local:8080", ("web.default.svc.cluster.local", 8080)),
    ],
)
def test_destinations(authority: str, target: tuple[str, int]) -> None:
    assert parse_target(authority) == target


@pytest.mark.parametrize(
    "authority",
    [
        "", ":80", "web", "web:", "web:0", "web:65536", "web:8o", "fd00::1:80", "[web]:80", "127.0.0.1:80", "[::1]:80",
        "0.0.0.0:80", "224.0.0.1:80", "a b:80", "a..b:80", "a/b:80", "x" * 254 + ":80", "web:-1", "[fd00::1:80",
    ],
)  # fmt: skip
def test_no_destinations(authority: str) -> None:
    with pytest.raises(RequestRefused) as refused:
        parse_target(authority)
    assert refused.value.status == 400


def settings(**environment: str) -> WaypointSettings:
    return WaypointSettings.from_environment({"WAYPOINT_NAME": "waypoint", **environment})


def test_settings() -> None:
    made = settings(POD_NAMESPACE="shop", SERVICE_ACCOUNT="keeper")
    assert made.key == "shop/waypoint.shop.svc.cluster.local"
    assert made.identity == "spiffe://cluster.local/ns/shop/sa/keeper"
    with pytest.raises(SettingError, match="WAYPOINT_NAME"):
        WaypointSettings.from_environment({})
    with pytest.raises(SettingError, match="MINIMUM_DRAIN_DURATION"):
        settings(MINIMUM_DRAIN_DURATION="soon")


def policy(name: str) -> Authorization:
    return Authorization(name=name, namespace="default")


def test_workers_get_the_policies_of_the_waypoint_and_of_services_that_were_asked_for() -> None:
    sent: list[messages.Message] = []
    web, other = Target("Service", "default", HOST), Target("Service", "default", "other")
    targets: dict[str, Targets] = {
        "default/mine": (Target("Gateway", "default", "waypoint"),),
        "default/anothers": (Target("Gateway", "default", "another"),),
        "default/class": (Target("GatewayClass", "istio-system", "istio-waypoint"),),
        "default/every": (Target("Gateway", "default", "*"),),
        "default/broken": (EVERYTHING,),
        "default/web": (web, other),
    }
    policies = WaypointPolicies(settings(), sent.append, targets)
    policies.add(1, "default", "waypoint-0")
    # Nothing is served before the first state has come.
    assert not any(isinstance(one, messages.PodPolicies) for one in sent)
    policies.update({name: policy(name.partition("/")[2]) for name in targets})
    put = [one for one in sent if isinstance(one, messages.Policies)]
    assert [(one.group, sorted(p.name for p in one.put)) for one in put] == [
        (1, ["broken", "class", "every", "mine"])
    ]
    assert messages.PodPolicies(1, (1,)) in sent
    assert isinstance(sent[-1], messages.PoliciesSettled)

    sent.clear()
    number = policies.subject(f"default/{HOST}")
    assert number == FIRST_SERVICE
    assert sent == [
        messages.Policies(number, (policy("web"),)),
        messages.PodPolicies(number, (1, number)),
        messages.PoliciesSettled(),
    ]
    sent.clear()
    assert policies.subject(f"default/{HOST}") == number
    assert sent == []
    # What concerns nobody here is not sent; what changes its target leaves.
    policies.update({"default/anothers": policy("anothers")})
    assert sent == []
    targets["default/web"] = (other,)
    policies.update({"default/web": policy("web")})
    assert sent == [messages.Policies(number, (), ("default/web",)), messages.PoliciesSettled()]
    introduced = list(policies.introduce(frozenset({1})))
    assert introduced[-1] == messages.PoliciesSettled()
    assert messages.PodPolicies(number, (1, number)) in introduced


HOST = "web.default.svc.cluster.local"


def test_a_waypoint_is_no_nodes_proxy_to_proxy_status() -> None:
    node = {"node": "node-1", "id": "ztunnel~10.0.0.1~ztunnel-x.istio-system~istio-system.svc.cluster.local"}
    waypoint = {"node": "node-1", "id": "waypoint~10.0.0.2~waypoint-y.default~default.svc.cluster.local"}
    assert [_who(one) for one in (node, waypoint, {"node": "node-2", "id": ""})] == [
        "node-1",
        "waypoint-y.default",
        "node-2",
    ]
