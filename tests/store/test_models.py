"""Objects are read and written as Kubernetes writes them."""

import msgspec
import pytest

from ztunnel.store.kinds import KINDS, api_versions_of, foreign_kind, kind_named, typed_kind
from ztunnel.store.membership import in_mesh, wants_mesh
from ztunnel.store.models import (
    Container,
    Deployment,
    Key,
    LabelSelector,
    LabelSelectorRequirement,
    Namespace,
    Object,
    ObjectMeta,
    Pod,
    PodIP,
    PodSpec,
    PodStatus,
    Service,
    ServicePort,
    ServiceSpec,
    to_dict,
    to_json,
)
from ztunnel.store.problems import Invalid, NotFound, Problem


def test_an_object_is_written_with_kubernetes_field_names_and_without_defaults() -> None:
    service = Service(
        metadata=ObjectMeta(name="web", namespace="shop"),
        spec=ServiceSpec(
            cluster_ip="10.96.0.7",
            cluster_ips=["10.96.0.7"],
            ports=[ServicePort(port=80, target_port="http")],
            publish_not_ready_addresses=True,
        ),
    )
    assert to_dict(service) == {
        "apiVersion": "v1",
        "kind": "Service",
        "metadata": {"name": "web", "namespace": "shop"},
        "spec": {
            "clusterIP": "10.96.0.7",
            "clusterIPs": ["10.96.0.7"],
            "ports": [{"port": 80, "targetPort": "http"}],
            "publishNotReadyAddresses": True,
        },
    }


def test_what_is_written_is_read_back_the_same() -> None:
    pod = Pod(
        metadata=ObjectMeta(name="a", labels={"x": "y"}),
        spec=PodSpec(containers=[Container(name="c", command=["sh"])], node_name="node-1"),
        status=PodStatus(pod_ip="10.0.0.1", pod_ips=[PodIP(ip="10.0.0.1")], host_ip="10.0.0.2"),
    )
    text = to_json(pod)
    assert msgspec.json.decode(text, type=Pod) == pod
    assert b'"podIPs"' in text
    assert b'"hostIP"' in text


def test_namespaces_are_default_where_none_is_written_and_empty_for_the_whole_cluster() -> None:
    assert Pod(metadata=ObjectMeta(name="a")).key == Key("", "Pod", "default", "a")
    assert Namespace(metadata=ObjectMeta(name="a", namespace="wrong")).key == Key("", "Namespace", "", "a")
    assert Deployment.API_VERSION == "apps/v1"


def test_references_are_what_people_read() -> None:
    assert Pod(metadata=ObjectMeta(name="a", namespace="b")).ref == "Pod b/a"
    assert Namespace(metadata=ObjectMeta(name="a")).ref == "Namespace a"


@pytest.mark.parametrize(
    ("requirement", "labels", "matches"),
    [
        (LabelSelectorRequirement(key="a", operator="In", values=["1", "2"]), {"a": "2"}, True),
        (LabelSelectorRequirement(key="a", operator="In", values=["1"]), {}, False),
        (LabelSelectorRequirement(key="a", operator="NotIn", values=["1"]), {}, True),
        (LabelSelectorRequirement(key="a", operator="NotIn", values=["1"]), {"a": "1"}, False),
        (LabelSelectorRequirement(key="a", operator="Exists"), {"a": ""}, True),
        (LabelSelectorRequirement(key="a", operator="Exists"), {"b": ""}, False),
        (LabelSelectorRequirement(key="a", operator="DoesNotExist"), {"b": ""}, True),
        (LabelSelectorRequirement(key="a", operator="DoesNotExist"), {"a": ""}, False),
    ],
)
def test_selectors_match_as_in_kubernetes(
    requirement: LabelSelectorRequirement, labels: dict[str, str], matches: bool
) -> None:
    assert LabelSelector(match_expressions=[requirement]).matches(labels) is matches
    assert not LabelSelector(match_labels={"z": "z"}, match_expressions=[requirement]).matches(labels)


def test_services_without_virtual_address_have_none() -> None:
    assert Service(spec=ServiceSpec(cluster_ip="None", cluster_ips=["None"])).addresses == []
    assert Service(spec=ServiceSpec(type="ExternalName", cluster_ip="1.2.3.4")).addresses == []
    assert Service(spec=ServiceSpec(cluster_ip="1.2.3.4")).addresses == ["1.2.3.4"]


@pytest.mark.parametrize("kind", KINDS.values())
def test_kinds_are_found_by_every_word_for_them(kind: type[Object]) -> None:
    for word in (kind.KIND, kind.KIND.upper(), kind.PLURAL, *kind.SHORT):
        assert kind_named(word) is kind
    assert typed_kind(kind.API_VERSION, kind.KIND) is kind
    assert typed_kind("v9", kind.KIND) is None


def test_kinds_of_one_name_in_two_groups_are_told_apart() -> None:
    istio = foreign_kind("networking.istio.io/v1beta1", "Gateway")
    gateway_api = typed_kind("gateway.networking.k8s.io/v1", "Gateway")
    assert istio is not None
    assert gateway_api is not None
    assert typed_kind("networking.istio.io/v1beta1", "Gateway") is None
    assert foreign_kind("gateway.networking.k8s.io/v1", "Gateway") is None
    assert foreign_kind("networking.istio.io/v9", "Gateway") is None
    assert "networking.istio.io/v1" in api_versions_of("Gateway")
    assert "gateway.networking.k8s.io/v1" in api_versions_of("Gateway")


AMBIENT, NONE = {"istio.io/dataplane-mode": "ambient"}, {"istio.io/dataplane-mode": "none"}


@pytest.mark.parametrize(
    ("pod_labels", "namespace_labels", "host_network", "wants"),
    [
        ({}, {}, False, False),
        ({}, AMBIENT, False, True),
        (AMBIENT, {}, False, True),
        (NONE, AMBIENT, False, False),
        (AMBIENT, NONE, False, True),
        ({}, NONE, False, False),
        (AMBIENT, AMBIENT, True, False),
    ],
)
def test_labels_decide_who_joins(
    pod_labels: dict[str, str], namespace_labels: dict[str, str], host_network: bool, wants: bool
) -> None:
    pod = Pod(metadata=ObjectMeta(labels=pod_labels), spec=PodSpec(host_network=host_network))
    assert wants_mesh(pod, Namespace(metadata=ObjectMeta(labels=namespace_labels))) is wants


def test_a_pod_in_a_namespace_nobody_knows_joins_only_by_itself() -> None:
    assert not wants_mesh(Pod(), None)
    assert wants_mesh(Pod(metadata=ObjectMeta(labels=AMBIENT)), None)


def test_being_in_the_mesh_is_what_the_node_agent_wrote() -> None:
    enabled = ObjectMeta(annotations={"ambient.istio.io/redirection": "enabled"})
    assert in_mesh(Pod(metadata=enabled))
    assert not in_mesh(Pod(metadata=ObjectMeta(labels=AMBIENT)))


def test_problems_read_as_one_sentence() -> None:
    full = Problem("Service default/web", "web.yaml", "has no port", "add one", line=3)
    assert str(full) == "Service default/web (web.yaml:3): has no port; add one"
    assert str(Problem("", "web.yaml", "is empty", "")) == "web.yaml: is empty"
    assert str(Problem("Pod a/b", "", "is lost", "find it")) == "Pod a/b: is lost; find it"
    assert str(Problem("", "", "the disk is full", "")) == "the disk is full"
    assert msgspec.json.decode(msgspec.json.encode(full), type=Problem) == full


def test_errors_of_the_store_read_as_their_message() -> None:
    assert str(NotFound("Pod a/b: not found")) == "Pod a/b: not found"
    assert str(Invalid([Problem("Pod a/b", "", "bad", "good")])) == "Pod a/b: bad; good"
