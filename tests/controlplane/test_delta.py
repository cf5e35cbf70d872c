"""The incremental protocol as a dialogue: requests and changes in, responses out."""

from collections.abc import Iterable

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ztunnel.controlplane.delta import MAX_UNACKNOWLEDGED, Rejection, Subscription
from ztunnel.controlplane.resources import ADDRESS_TYPE, Entry, ResourceSet, entry
from ztunnel.wire.workload_pb2 import Address, Service, Workload
from ztunnel.wire.xds_pb2 import DeltaDiscoveryRequest, DeltaDiscoveryResponse, Status


def workload(name: str, content: str = "", address: str = "", *services: str) -> Entry:
    message = Address(workload=Workload(uid=name, node=content))
    return entry(name, message, ADDRESS_TYPE, (f"/{address}",) if address else (), services)


def service(name: str, address: str) -> Entry:
    return entry(name, Address(service=Service(name=name)), ADDRESS_TYPE, (f"/{address}",))


class Client:
    """A client and its subscription: keeps what it was sent, as a proxy would."""

    def __init__(self, resources: ResourceSet) -> None:
        self.subscription = Subscription(resources)
        self.stop = resources.listen(self.subscription.changed)
        self.held: dict[str, str] = {}
        self.nonces = 0
        self.unacknowledged: list[str] = []

    def request(
        self,
        subscribe: Iterable[str] = (),
        unsubscribe: Iterable[str] = (),
        held: dict[str, str] | None = None,
        nonce: str = "",
        error: str = "",
    ) -> Rejection | None:
        return self.subscription.request(
            DeltaDiscoveryRequest(
                type_url=ADDRESS_TYPE,
                resource_names_subscribe=list(subscribe),
                resource_names_unsubscribe=list(unsubscribe),
                initial_resource_versions=held or {},
                response_nonce=nonce,
                error_detail=Status(code=3, message=error) if error else None,
            )
        )

    def receive(self, acknowledge: bool = True, limit: int = 1 << 20) -> DeltaDiscoveryResponse | None:
        self.nonces += 1
        response = self.subscription.next_response(str(self.nonces), limit)
        if response is None:
            return None
        message = DeltaDiscoveryResponse.FromString(response.message)
        assert (message.nonce, message.type_url) == (str(self.nonces), ADDRESS_TYPE)
        assert tuple(resource.name for resource in message.resources) == response.sent
        assert tuple(message.removed_resources) == response.removed
        for resource in message.resources:
            self.held[resource.name] = resource.version
        for name in message.removed_resources:
            self.held.pop(name, None)
        self.unacknowledged.append(message.nonce)
        if acknowledge:
            self.acknowledge()
        return message

    def acknowledge(self) -> None:
        for nonce in self.unacknowledged:
            assert self.request(nonce=nonce) is None
        self.unacknowledged.clear()

    def pushes(self) -> list[tuple[set[str], set[str]]]:
        """Everything there is to receive, as (sent, removed) a response."""
        received = []
        while (message := self.receive()) is not None:
            received.append(
                ({resource.name for resource in message.resources}, set(message.removed_resources))
            )
        return received


@pytest.fixture
def resources() -> ResourceSet:
    resources = ResourceSet(ADDRESS_TYPE)
    resources.update(
        {
            "a": workload("a", "1", "10.0.0.1", "s"),
            "b": workload("b", "1", "10.0.0.2"),
            "s": service("s", "10.96.0.1"),
        }
    )
    return resources


@pytest.fixture
def client(resources: ResourceSet) -> Client:
    return Client(resources)


def versions(resources: ResourceSet) -> dict[str, str]:
    return {name: found.version for name in resources if (found := resources.get(name))}


@pytest.mark.parametrize("names", [[], ["*"]])
def test_wildcard_gets_everything_then_changes(
    resources: ResourceSet, client: Client, names: list[str]
) -> None:
    assert client.receive() is None
    client.request(names)
    assert client.pushes() == [({"a", "b", "s"}, set())]
    resources.update({"b": workload("b", "2", "10.0.0.2"), "a": resources.get("a")})
    assert client.pushes() == [({"b"}, set())]
    resources.update({"b": None, "c": workload("c")})
    assert client.pushes() == [({"c"}, {"b"})]
    assert client.held == versions(resources)


def test_a_first_response_comes_even_if_there_is_nothing() -> None:
    client = Client(ResourceSet(ADDRESS_TYPE))
    client.request()
    assert client.pushes() == [(set(), set())]
    assert client.pushes() == []


def test_a_reconnecting_client_gets_the_differences(resources: ResourceSet) -> None:
    first = Client(resources)
    first.request()
    first.pushes()
    resources.update({"a": None, "b": workload("b", "2", "10.0.0.2"), "c": workload("c")})
    again = Client(resources)
    again.request(held=dict(first.held, gone="1"), nonce="of another stream")
    assert again.pushes() == [({"b", "c"}, {"a", "gone"})]
    up_to_date = Client(resources)
    up_to_date.request(held=versions(resources))
    assert up_to_date.pushes() == [(set(), set())]


def test_only_the_latest_state_waits_for_a_slow_client(resources: ResourceSet, client: Client) -> None:
    client.request()
    client.pushes()
    for number in range(1000):
        resources.update({"a": workload("a", f"{number}")})
    resources.update({"b": workload("b", "x")})
    resources.update({"b": None})
    message = client.receive()
    assert message is not None
    assert [resource.name for resource in message.resources] == ["a"]
    assert list(message.removed_resources) == ["b"]
    assert client.held == versions(resources)
    assert client.receive() is None


def test_a_client_that_does_not_acknowledge_gets_no_more(resources: ResourceSet, client: Client) -> None:
    client.request()
    for number in range(MAX_UNACKNOWLEDGED):
        assert client.receive(acknowledge=False) is not None
        resources.update({"a": workload("a", f"{number}")})
    assert client.receive() is None
    resources.update({"b": workload("b", "new")})
    # Reading the last means having read those before it.
    client.request(nonce=client.unacknowledged[-1])
    assert client.pushes() == [({"a", "b"}, set())]


def test_a_rejection_names_its_resources_which_are_sent_again_when_they_change(
    resources: ResourceSet, client: Client
) -> None:
    client.request()
    message = client.receive(acknowledge=False)
    assert message is not None
    rejection = client.request(nonce=message.nonce, error="bad workload")
    assert rejection is not None
    assert (set(rejection.names), rejection.message) == ({"a", "b", "s"}, "bad workload")
    assert client.pushes() == []
    assert client.request(nonce=message.nonce, error="twice") is None
    resources.update({"a": workload("a", "2")})
    assert client.pushes() == [({"a"}, set())]


def test_large_pushes_come_in_pieces() -> None:
    resources = ResourceSet(ADDRESS_TYPE)
    resources.update({f"w{number}": workload(f"w{number}", "x" * 100) for number in range(1000)})
    client = Client(resources)
    client.request()
    messages = []
    while (message := client.receive(limit=20_000)) is not None:
        messages.append(message)
    assert len(messages) > 5
    assert max(message.ByteSize() for message in messages) < 20_200
    assert [message.system_version_info for message in messages] == ["1+"] * (len(messages) - 1) + ["1"]
    assert client.held == versions(resources)


def test_a_resource_larger_than_the_limit_goes_alone() -> None:
    resources = ResourceSet(ADDRESS_TYPE)
    resources.update({name: workload(name, "x" * 500) for name in "abc"})
    client = Client(resources)
    client.request()
    assert [sent for sent, _ in iter_pieces(client, 100)] == [{"a"}, {"b"}, {"c"}]


def iter_pieces(client: Client, limit: int) -> list[tuple[set[str], set[str]]]:
    pieces = []
    while (message := client.receive(limit=limit)) is not None:
        pieces.append(({resource.name for resource in message.resources}, set(message.removed_resources)))
    return pieces


def test_a_client_that_asks_for_nothing_gets_nothing(resources: ResourceSet, client: Client) -> None:
    client.request(["*"], ["*"])
    assert client.pushes() == [(set(), set())]
    resources.update({"a": workload("a", "2")})
    assert client.pushes() == []


@pytest.mark.parametrize(
    ("asked", "sent"),
    [
        ("a", {"a"}),
        ("/10.0.0.1", {"a"}),
        ("/10.96.0.1", {"s", "a"}),
        ("s", {"s", "a"}),
    ],
    ids=["uid", "address", "service-address", "service"],
)
def test_on_demand(resources: ResourceSet, client: Client, asked: str, sent: set[str]) -> None:
    client.request(["*"], ["*"])
    client.pushes()
    client.request([asked])
    assert client.pushes() == [(sent, set())]
    resources.update({"b": workload("b", "2", "10.0.0.2")})
    assert client.pushes() == []
    resources.update({"a": workload("a", "2", "10.0.0.1", "s")})
    assert client.pushes() == [({"a"}, set())]
    resources.update({"a": None})
    assert client.pushes() == [(set(), {"a"})]


def test_on_demand_endpoints_come_and_go_with_their_service(resources: ResourceSet, client: Client) -> None:
    client.request(["/10.96.0.1"])
    assert client.pushes() == [({"s", "a"}, set())]
    resources.update({"b": workload("b", "1", "10.0.0.2", "s")})
    assert client.pushes() == [({"b"}, set())]
    resources.update({"a": workload("a", "1", "10.0.0.1")})
    assert client.pushes() == [(set(), {"a"})]
    resources.update({"s": None})
    assert client.pushes() == [(set(), {"s", "b"})]


def test_on_demand_absence_is_said_and_later_presence_too(resources: ResourceSet, client: Client) -> None:
    client.request(["*"], ["*"])
    client.pushes()
    client.request(["/10.0.0.9"])
    assert client.pushes() == [(set(), {"/10.0.0.9"})]
    resources.update({"n": workload("n", "", "10.0.0.9")})
    assert client.pushes() == [({"n"}, set())]


def test_on_demand_names_asked_in_the_first_request(client: Client) -> None:
    client.request(["a", "nothing"])
    assert client.pushes() == [({"a"}, {"nothing"})]


def test_on_demand_reconnect_resumes_what_is_held(resources: ResourceSet, client: Client) -> None:
    client.request(["a", "s"])
    client.pushes()
    resources.update({"s": service("s", "10.96.0.2"), "a": None})
    again = Client(resources)
    again.request(["*"], ["*"], held=client.held)
    assert again.pushes() == [({"s"}, {"a"})]
    resources.update({"a": workload("a", "back")})
    assert again.pushes() == [({"a"}, set())]


def test_unsubscribing_ends_updates(resources: ResourceSet, client: Client) -> None:
    client.request(["a", "b"])
    client.pushes()
    resources.update({"b": workload("b", "2")})
    client.request(unsubscribe=["b"])
    assert client.pushes() == []
    resources.update({"a": workload("a", "2"), "b": workload("b", "3")})
    assert client.pushes() == [({"a"}, set())]


def test_asking_again_sends_again(client: Client) -> None:
    client.request(["a"])
    client.pushes()
    client.request(["a"])
    assert client.pushes() == [({"a"}, set())]


def test_from_wildcard_to_names_and_back(resources: ResourceSet, client: Client) -> None:
    client.request(["*", "a"])
    assert client.pushes() == [({"a", "b", "s"}, set())]
    client.request(unsubscribe=["a"])
    assert client.pushes() == [({"a"}, set())]
    client.request(["b"], ["*"])
    assert client.pushes() == [({"b"}, set())]
    resources.update({"a": workload("a", "2"), "b": workload("b", "2")})
    assert client.pushes() == [({"b"}, set())]
    client.request(["*"])
    assert client.pushes() == [({"a", "b", "s"}, set())]


@settings(max_examples=300)
@given(
    st.lists(
        st.one_of(
            st.tuples(st.just("put"), st.sampled_from("abcdef"), st.sampled_from("123")),
            st.tuples(st.just("del"), st.sampled_from("abcdef"), st.just("")),
            st.tuples(st.just("receive"), st.sampled_from(["", "ack"]), st.just("")),
            st.tuples(st.just("reconnect"), st.just(""), st.just("")),
        ),
        max_size=60,
    )
)
def test_whatever_happens_a_wildcard_client_ends_with_the_truth(steps: list[tuple[str, str, str]]) -> None:
    resources = ResourceSet(ADDRESS_TYPE)
    client = Client(resources)
    client.request()
    for kind, name, content in steps:
        if kind == "put":
            resources.update({name: workload(name, content)})
        elif kind == "del":
            resources.update({name: None})
        elif kind == "receive":
            client.receive(acknowledge=bool(name), limit=200)
        else:
            held = client.held
            client.stop()
            client = Client(resources)
            client.held = held
            client.request(held=held)
    client.acknowledge()
    while client.receive(limit=200) is not None:
        pass
    assert client.held == versions(resources)


@settings(max_examples=300)
@given(
    st.lists(
        st.tuples(
            st.sampled_from(["put", "del", "subscribe", "unsubscribe", "receive", "reconnect"]),
            st.sampled_from(["a", "b", "c", "/x", "/y", "g", "h"]),
            st.sampled_from(["", "/x", "/y"]),
            st.sampled_from(["", "g", "h"]),
        ),
        max_size=60,
    )
)
def test_whatever_happens_a_client_of_names_ends_with_the_truth(
    steps: list[tuple[str, str, str, str]],
) -> None:
    resources = ResourceSet(ADDRESS_TYPE)
    client = Client(resources)
    client.request(["*"], ["*"])
    asked: set[str] = set()
    for number, (kind, name, alias, group) in enumerate(steps):
        if kind == "put" and not name.startswith("/"):
            resources.update({name: workload(name, str(number), alias[1:], *([group] if group else []))})
        elif kind == "del":
            resources.update({name: None})
        elif kind == "subscribe":
            asked.add(name)
            client.request([name])
        elif kind == "unsubscribe" and name in asked:
            asked.discard(name)
            client.request(unsubscribe=[name])
            still = set().union(*(resources.find(name) for name in asked))
            client.held = {name: version for name, version in client.held.items() if name in still}
        elif kind == "receive":
            client.receive(limit=200)
        elif kind == "reconnect":
            held = client.held
            client.stop()
            client = Client(resources)
            client.held = held
            # What it held counts as asked for from now on.
            client.request([*asked] or ["*"], [] if asked else ["*"], held=held)
            asked |= held.keys()
    client.acknowledge()
    while client.receive(limit=200) is not None:
        pass
    wanted = set().union(*(resources.find(name) for name in asked))
    truth = versions(resources)
    assert {name: client.held.get(name) for name in wanted} == {name: truth[name] for name in wanted}
    assert not set(client.held) - set(truth)


def test_how_far_a_client_is() -> None:
    resources = ResourceSet(ADDRESS_TYPE)
    resources.update({"a": workload("a")})
    client = Client(resources)
    assert client.subscription.standing.word == "NOT SENT"
    client.request(["*"])
    assert client.subscription.standing[:4] == ("", "", 1, 0)
    assert client.subscription.standing.word == "STALE"
    client.receive(acknowledge=False)
    assert client.subscription.standing[:4] == ("1", "", 0, 1)
    assert client.subscription.standing.word == "STALE"
    client.request(nonce="1")
    assert tuple(client.subscription.standing) == ("1", "1", 0, 0, None)
    assert client.subscription.standing.word == "SYNCED"
    resources.update({"a": workload("a", "other")})
    client.receive(acknowledge=False)
    client.request(nonce="2", error="will not do")
    standing = client.subscription.standing
    assert (standing.sent, standing.acknowledged, standing.word) == ("2", "1", "REJECTED")
    assert standing.rejected == Rejection("2", ("a",), "will not do")
    resources.update({"a": workload("a", "third")})
    client.receive(acknowledge=False)
    client.request(nonce="3")
    assert tuple(client.subscription.standing) == ("3", "3", 0, 0, None)
