"""The user's objects become a cluster, and what does not fit together is named."""

import itertools

import msgspec

from ztunnel.embedded.plan import Given, Plan, plan
from ztunnel.store.manifest import read_manifest
from ztunnel.store.models import Deployment, K, Key, Namespace, Node, Object, Pod, Service, ServiceAccount

POD = "apiVersion: v1\nkind: Pod\n"
RUNS = "spec: {containers: [{name: c, command: [x], ports: [{name: http, containerPort: 8080}]}]}\n"


def source(text: str) -> dict[Key, Object]:
    manifest = read_manifest(text)
    assert not manifest.problems
    return {entry.decoded.key: entry.decoded.obj for entry in manifest.entries}  # type: ignore[misc]


def planned(text: str, before: Plan | None = None, nodes: int = 2) -> Plan:
    numbers = itertools.count(len(before.objects) if before else 0)
    return plan(
        Given(source(text), before.objects if before else {}, nodes),
        now="now",
        new_uid=lambda: f"uid-{next(numbers)}",
        last=before.last if before else {},
    )


def of(kind: type[K], found: Plan) -> list[K]:
    return [obj for obj in found.objects.values() if isinstance(obj, kind)]


def said(found: Plan) -> list[str]:
    return [
        f"{finding.severity}: {finding.key}: {finding.message}; {finding.remedy}"
        for finding in found.findings
    ]


def test_what_exists_by_itself() -> None:
    found = planned("")
    assert found.findings == []
    assert [namespace.name for namespace in of(Namespace, found)] == [
        "default",
        "istio-system",
        "kube-system",
    ]
    assert [account.ref for account in of(ServiceAccount, found)] == [
        "ServiceAccount default/default",
        "ServiceAccount istio-system/default",
        "ServiceAccount kube-system/default",
    ]
    assert [node.name for node in of(Node, found)] == ["node-1", "node-2"]
    assert of(Service, found) == []
    node = of(Node, found)[1]
    assert node.spec.pod_cidrs == ["10.244.2.0/24", "fd00:10:244:2::/64"]
    assert [address.address for address in node.status.addresses] == [
        "10.99.0.12",
        "fd00:10:99::12",
        "node-2",
    ]
    assert node.metadata.labels["kubernetes.io/hostname"] == "node-2"


def test_the_users_word_on_namespaces_and_nodes() -> None:
    found = planned(
        "apiVersion: v1\nkind: Namespace\nmetadata: {name: default, labels: {istio.io/dataplane-mode: ambient}}\n"
        "---\napiVersion: v1\nkind: Namespace\nmetadata: {name: shop, uid: mine}\n"
        "---\napiVersion: v1\nkind: Node\nmetadata: {name: node-2, labels: {topology.kubernetes.io/zone: b}}\n"
        "---\napiVersion: v1\nkind: Node\nmetadata: {name: node-3}\n"
    )
    namespaces = {namespace.name: namespace for namespace in of(Namespace, found)}
    assert namespaces["default"].metadata.labels == {"istio.io/dataplane-mode": "ambient"}
    assert namespaces["shop"].metadata.uid.startswith("uid-")
    assert of(Node, found)[1].metadata.labels["topology.kubernetes.io/zone"] == "b"
    assert len(of(Node, found)) == 2
    assert said(found) == [
        "error: Node node-3: there is no such node; start with --nodes 3 or more, or remove it"
    ]


def test_identities_stay() -> None:
    text = (
        "apiVersion: v1\nkind: Namespace\nmetadata: {name: shop}\n---\n"
        "apiVersion: v1\nkind: Service\nmetadata: {name: web}\n"
        "spec: {selector: {app: web}, ports: [{port: 80}]}\n---\n"
        f"{POD}metadata: {{name: a, labels: {{app: web}}}}\n{RUNS}"
    )
    first = planned(text)
    assert first.findings == []
    assert all(
        obj.metadata.uid and obj.metadata.creation_timestamp == "now" for obj in first.objects.values()
    )
    uids = [obj.metadata.uid for obj in first.objects.values()]
    assert len(set(uids)) == len(uids)
    assert planned(text, first) == first


def test_objects_of_a_namespace_that_nobody_made() -> None:
    found = planned(f"{POD}metadata: {{name: a, namespace: shop}}\n{RUNS}")
    assert of(Pod, found) == []
    assert said(found) == [
        'error: Pod shop/a: namespace "shop" not found; add a Namespace object of this name'
    ]


def test_a_namespace_that_goes_takes_everything_in_it() -> None:
    pod = f"{POD}metadata: {{name: a, namespace: shop}}\n{RUNS}"
    first = planned(f"apiVersion: v1\nkind: Namespace\nmetadata: {{name: shop}}\n---\n{pod}")
    assert len(of(Pod, first)) == 1
    assert of(Pod, planned(pod, first)) == []


DEPLOYMENT = (
    "apiVersion: apps/v1\nkind: Deployment\nmetadata: {name: web}\nspec:\n  replicas: 2\n"
    "  selector: {matchLabels: {app: web}}\n"
    "  template:\n    metadata: {labels: {app: web}}\n    " + RUNS
)


def test_a_deployment_tells_how_many_are_ready() -> None:
    first = planned(DEPLOYMENT)
    (deployment,) = of(Deployment, first)
    assert (deployment.status.replicas, deployment.status.ready_replicas) == (2, 0)
    pod = of(Pod, first)[0]
    ready = msgspec.structs.replace(
        pod, status=msgspec.convert({"podIPs": [{"ip": ip} for ip in pod.addresses], "phase": "Running",
                                     "conditions": [{"type": "Ready", "status": "True"}]}, type(pod.status)),
    )  # fmt: skip
    second = planned(DEPLOYMENT, first._replace(objects={**first.objects, pod.key: ready}))
    (deployment,) = of(Deployment, second)
    assert (deployment.status.replicas, deployment.status.ready_replicas) == (2, 1)


def service(spec: str) -> str:
    return f"---\napiVersion: v1\nkind: Service\nmetadata: {{name: web}}\nspec: {spec}\n"


def test_services_that_lead_nowhere() -> None:
    found = planned(service("{selector: {app: web, tier: x}, ports: [{port: 80}]}"))
    assert said(found) == [
        "warning: Service default/web: spec.selector (app=web,tier=x) selects no pod of namespace default; "
        "make it match the labels of the pods meant"
    ]
    assert of(Service, found)[0].addresses
    assert said(planned(service("{ports: [{port: 80}]}"))) == [
        "warning: Service default/web: has no selector, so it leads nowhere; add spec.selector with labels of pods"
    ]
    assert said(planned(service("{type: ExternalName, externalName: example.org}"))) == []


def test_ports_that_no_pod_has() -> None:
    ports = (
        "[{port: 80, name: a, targetPort: http}, {port: 81, name: b, targetPort: grpc}, {port: 82, name: c}]"
    )
    found = planned(DEPLOYMENT + service(f"{{selector: {{app: web}}, ports: {ports}}}"))
    assert said(found) == [
        'warning: Service default/web: targetPort "grpc": no selected pod has a TCP port of this name; '
        "name a container's port so, or give a number"
    ]


def test_two_services_with_one_address() -> None:
    found = planned(
        DEPLOYMENT
        + service("{clusterIP: 10.96.5.5, selector: {app: web}, ports: [{port: 80}]}")
        + service("{clusterIP: 10.96.5.5, selector: {app: web}, ports: [{port: 80}]}").replace(
            "web}", "zeb}", 1
        )
    )
    assert [other.name for other in of(Service, found)] == ["web"]
    assert said(found) == [
        "error: Service default/zeb: clusterIP 10.96.5.5 is the address of Service default/web; "
        "choose another clusterIP, or leave it out to be given one"
    ]
