"""What is wrong with an object is said with the field, what is there, and what would be right."""

from pathlib import Path
from typing import Any

import pytest
import yaml

from ztunnel.store.decode import Decoded, decode, decode_json
from ztunnel.store.gateways import Gateway
from ztunnel.store.kinds import KINDS
from ztunnel.store.manifest import read_manifest
from ztunnel.store.models import Deployment, Key, Service, to_dict, to_json
from ztunnel.store.names import label_key_fault, label_value_fault


def decoded(text: str) -> Decoded:
    return decode(yaml.safe_load(text))


def service(spec: str, metadata: str = "name: web") -> Decoded:
    return decoded(f"{{apiVersion: v1, kind: Service, metadata: {{{metadata}}}, spec: {spec}}}")


def pod(spec: str) -> Decoded:
    return decoded(f"{{apiVersion: v1, kind: Pod, metadata: {{name: p}}, spec: {spec}}}")


def deployment(spec: str) -> Decoded:
    return decoded(f"{{apiVersion: apps/v1, kind: Deployment, metadata: {{name: d}}, spec: {spec}}}")


def said(result: Decoded) -> list[str]:
    return [f"{fault}; {fault.remedy}" for fault in result.faults]


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("{ports: [{port: http}]}", 'spec.ports[0].port: expected int, got str ("http"); give a number 1-65535'),
        ("{ports: [{port: 0}]}", "spec.ports[0].port: expected int >= 1, got 0; give a number 1-65535"),
        ("{ports: [{port: 65536}]}", "spec.ports[0].port: expected int <= 65535, got 65536; give a number 1-65535"),
        ("{ports: [{port: true}]}", "spec.ports[0].port: expected int, got bool (true); give a number 1-65535"),
        ("{ports: [{name: x}]}", "spec.ports[0].port: is missing; add it"),
        ("{ports: {port: 80}}", "spec.ports: expected list, got mapping; give a list: lines that begin with '- '"),
        ("[]", "spec: expected mapping, got list; give 'key: value' lines below it"),
        ("{ports: [{port: 80, targetPort: [1]}]}",
         "spec.ports[0].targetPort: expected int or str, got list; "
         "give a number 1-65535 or the name of a container's port"),
        ("{ports: [{port: 80, protocol: tcp}]}",
         'spec.ports[0].protocol: "tcp" is not possible; use one of SCTP, TCP, UDP'),
        ("{type: Internal, ports: [{port: 80}]}",
         'spec.type: "Internal" is not possible; use one of ClusterIP, ExternalName, LoadBalancer, NodePort'),
        ("{ports: [{port: 80}], selector: {app: 1}}",
         'spec.selector.app: expected str, got int (1); put it in quotes: "1"'),
        ("{ports: [{port: 80}], selector: {app: web, canary: true}}",
         'spec.selector.canary: expected str, got bool (true); put it in quotes: "true"'),
        ('{ports: [{port: 80}], publishNotReadyAddresses: "true"}',
         'spec.publishNotReadyAddresses: expected bool, got str ("true"); give true or false, without quotes'),
        ("{}", "spec.ports: is missing; list at least one port"),
        ("{ports: [{port: 80}, {port: 81, name: x}]}",
         "spec.ports[0].name: is missing; name each port of a Service with several"),
        ("{ports: [{port: 80, name: x}, {port: 81, name: x}]}",
         'spec.ports[1].name: "x" is used twice; name it differently'),
        ("{ports: [{port: 80, name: x}, {port: 80, name: y}]}",
         "spec.ports[1]: port 80/TCP is listed twice; remove one of them"),
        ("{ports: [{port: 80, targetPort: Not_A_Name}]}",
         'spec.ports[0].targetPort: "Not_A_Name" is not a valid port name; '
         "use at most 15 lower case letters, digits and '-', with at least one letter"),
        ("{ports: [{port: 80}], clusterIP: 10.96.0}",
         'spec.clusterIP: "10.96.0" is not an IP address; give an address, "None", or leave it out'),
        ("{ports: [{port: 80}], clusterIP: 127.0.0.1}",
         'spec.clusterIP: "127.0.0.1" cannot be a Service\'s address; give a unicast address, or leave it out'),
        ("{ports: [{port: 80}], clusterIPs: [10.96.0.3, 10.96.0.4]}",
         "spec.clusterIPs: two addresses of one family; give at most one IPv4 and one IPv6"),
        ("{ports: [{port: 80}], clusterIP: 10.96.0.3, clusterIPs: [10.96.0.4]}",
         "spec.clusterIPs: its first is not clusterIP; make them the same, or give only one"),
        ("{ports: [{port: 80}], clusterIPs: [None, 10.96.0.4]}",
         'spec.clusterIPs: "None" stands with addresses; keep either "None" or addresses'),
        ("{ports: [{port: 80}], ipFamilies: [IPv4, IPv4]}",
         "spec.ipFamilies: names a family twice; name each family once"),
        ("{type: ExternalName}", "spec.externalName: is missing; give the DNS name that the Service stands for"),
    ],
)  # fmt: skip
def test_services(spec: str, message: str) -> None:
    result = service(spec)
    assert result.obj is None
    assert result.key == Key("", "Service", "default", "web")
    assert said(result) == [message]


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("{}", "spec.containers: is missing; list at least one container with name and command"),
        ("{containers: [{name: c, command: sleep 1}]}",
         "spec.containers[0].command: expected list, got str (\"sleep 1\"); give a list: lines that begin with '- '"),
        ("{containers: [{name: c, args: [1]}]}",
         'spec.containers[0].args[0]: expected str, got int (1); put it in quotes: "1"'),
        ("{containers: [{name: c, env: [{name: A, value: 1.5}]}]}",
         'spec.containers[0].env[0].value: expected str, got float (1.5); put it in quotes: "1.5"'),
        ("{containers: [{name: c, env: [{name: 1A, value: x}]}]}",
         "spec.containers[0].env[0].name: \"1A\" is not a valid name of a variable; "
         "use letters, digits, '-', '_' and '.', not beginning with a digit"),
        ("{containers: [{image: x}]}", "spec.containers[0].name: is missing; add it"),
        ("{containers: [{name: c}, {name: c}]}",
         'spec.containers: two containers are named "c"; name each container differently'),
        ("{containers: [{name: c, ports: [{name: http, containerPort: 80}, {name: http, containerPort: 81}]}]}",
         'spec.containers[0].ports[1].name: "http" is used twice; name it differently'),
    ],
)  # fmt: skip
def test_pods(spec: str, message: str) -> None:
    assert said(pod(spec)) == [message]


TEMPLATE = "template: {metadata: {labels: {app: d}}, spec: {containers: [{name: c, command: [x]}]}}"


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        (f"{{replicas: -1, selector: {{matchLabels: {{app: d}}}}, {TEMPLATE}}}",
         "spec.replicas: expected int >= 0, got -1; give a whole number, 0 or more"),
        (f'{{replicas: "3", selector: {{matchLabels: {{app: d}}}}, {TEMPLATE}}}',
         'spec.replicas: expected int, got str ("3"); give a whole number, 0 or more'),
        (f"{{selector: {{matchLabels: {{app: e}}}}, {TEMPLATE}}}",
         "spec.selector: does not match the labels of spec.template; "
         "make spec.selector.matchLabels and spec.template.metadata.labels agree"),
        (f"{{selector: {{}}, {TEMPLATE}}}",
         "spec.selector: is empty; select the template's labels: matchLabels with at least one of them"),
        ("{selector: {matchLabels: {app: d}}}", "spec.template: is missing; add it"),
    ],
)  # fmt: skip
def test_deployments(spec: str, message: str) -> None:
    assert said(deployment(spec)) == [message]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{kind: Pod}", "apiVersion: is missing; add it, for example apiVersion: v1"),
        ("{apiVersion: v1}", "kind: is missing; add it, for example kind: Service"),
        ("{apiVersion: 1, kind: Pod}", "apiVersion: expected a name, got 1; add it, for example apiVersion: v1"),
        ("{apiVersion: v1, kind: Pod}", "metadata.name: is missing; give the object a name"),
        ("{apiVersion: v1, kind: Pod, metadata: []}", "metadata.name: is missing; give the object a name"),
        ("{apiVersion: v1, kind: Pod, metadata: {name: 1}}",
         'metadata.name: expected a name, got 1; put it in quotes: "1"'),
        ("{apiVersion: v1, kind: Deployment, metadata: {name: d}}",
         'apiVersion: "v1" has no Deployment; use apps/v1'),
        ("{apiVersion: apps/v1, kind: Deploymant, metadata: {name: d}}",
         'kind: "Deploymant" (apps/v1) is not known; did you mean "Deployment"?'),
        ("{apiVersion: v1, kind: Frobnicator, metadata: {name: d}}",
         f'kind: "Frobnicator" (v1) is not known; known kinds are {", ".join(KINDS)}'),
        ("{apiVersion: security.istio.io/v7, kind: AuthorizationPolicy, metadata: {name: d}}",
         'apiVersion: "security.istio.io/v7" has no AuthorizationPolicy; use security.istio.io/v1 or '
         "security.istio.io/v1beta1 or policy.linkerd.io/v1alpha1 or policy.linkerd.io/v1beta1 or "
         "policy.linkerd.io/v1beta2 or policy.linkerd.io/v1beta3"),
    ],
)  # fmt: skip
def test_objects_that_say_not_what_they_are(text: str, message: str) -> None:
    result = decoded(text)
    assert (result.key, result.obj, result.accepted) == (None, None, False)
    assert said(result) == [message]


@pytest.mark.parametrize(
    ("kind", "name", "valid"),
    [
        ("Namespace", "a" * 63, True),
        ("Namespace", "a" * 64, False),
        ("Namespace", "a.b", False),
        ("Namespace", "1a", True),
        ("Pod", "a.b-1", True),
        ("Pod", "a" * 253, True),
        ("Pod", "a" * 254, False),
        ("Pod", "-a", False),
        ("Pod", "A", False),
        ("Pod", "a..b", False),
        ("ServiceAccount", "../../etc", False),
        ("Service", "web", True),
        ("Service", "1web", False),
        ("Service", "a" * 64, False),
    ],
)
def test_names_are_what_kubernetes_allows(kind: str, name: str, valid: bool) -> None:
    data: dict[str, Any] = {"apiVersion": "v1", "kind": kind, "metadata": {"name": name}}
    if kind == "Pod":
        data["spec"] = {"containers": [{"name": "c"}]}
    if kind == "Service":
        data["spec"] = {"ports": [{"port": 1}]}
    result = decode(data)
    assert result.accepted is valid, said(result)
    if not valid:
        assert said(result)[0].startswith(f'metadata.name: "{name}" is not a valid name; use at most ')


@pytest.mark.parametrize(
    "key", ["app", "a.b_c-D", "istio.io/dataplane-mode", "a" * 63, f"{'a' * 63}.example/x", "1", "x/1"]
)
def test_label_keys(key: str) -> None:
    assert label_key_fault(key) == ""


@pytest.mark.parametrize(
    "key", ["", "/", "a/", "/a", "a/b/c", "-a", "a-", "a" * 64, "Upper.io/a", "a b", "ä"]
)
def test_not_label_keys(key: str) -> None:
    assert label_key_fault(key)


@pytest.mark.parametrize("value", ["", "a", "A.b_c-1", "a" * 63])
def test_label_values(value: str) -> None:
    assert label_value_fault(value) == ""


@pytest.mark.parametrize("value", ["-", "a-", ".a", "a" * 64, "a b", "a/b", "ä", "\n"])
def test_not_label_values(value: str) -> None:
    assert label_value_fault(value)


def test_wrong_labels_are_named() -> None:
    result = service("{ports: [{port: 80}]}", "name: web, labels: {'a b': x, tier: 'back end'}")
    assert [str(fault) for fault in result.faults] == [
        "metadata.labels[a b]: not a valid label key",
        'metadata.labels.tier: "back end" is not a valid label value',
    ]


def test_fields_that_are_null_are_not_there() -> None:
    result = service("{ports: [{port: 80, name: null}], selector: null}", "name: web, labels: null")
    assert result.accepted
    assert isinstance(result.obj, Service)
    assert result.obj.spec.selector == {}


def test_fields_that_are_not_used_are_ignored_silently() -> None:
    result = pod(
        "{containers: [{name: c, resources: {limits: {cpu: 1}}, livenessProbe: {}}], tolerations: []}"
    )
    assert result.accepted
    assert not result.faults


@pytest.mark.parametrize(
    ("field", "meant"),
    [("targetport", "targetPort"), ("targetPorts", "targetPort"), ("protocl", "protocol")],
)
def test_slips_of_the_pen_are_warned_of(field: str, meant: str) -> None:
    result = service(f"{{ports: [{{port: 80, {field}: 81}}]}}")
    assert result.accepted
    assert said(result) == [f'spec.ports[0].{field}: unknown field; did you mean "{meant}"?']
    assert result.faults[0].severity == "warning"


def test_the_fast_path_agrees_with_the_other() -> None:
    good = service("{ports: [{port: 80}]}", "name: web, namespace: shop").obj
    assert good is not None
    assert decode_json(to_json(good)) == good == decode(to_dict(good)).obj
    assert decode_json(b'{"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": "Wrong"}}') is None
    assert decode_json(b'{"apiVersion": "v1", "kind": "Namespace"}') is None
    assert decode_json(b'{"apiVersion": "v1", "kind": "List", "items": []}') is None
    assert decode_json(b"{") is None
    assert decode_json(b'"\xff"') is None


SEED = {
    "VirtualService": "networking.istio.io/v1beta1",
    "DestinationRule": "networking.istio.io/v1beta1",
    "RequestAuthentication": "security.istio.io/v1beta1",
    "HTTPRoute": "gateway.networking.k8s.io/v1",
    "ServiceProfile": "linkerd.io/v1alpha2",
    "TrafficSplit": "split.smi-spec.io/v1alpha4",
    "Canary": "flagger.app/v1beta1",
    "Telemetry": "telemetry.istio.io/v1alpha1",
    "ConfigMap": "v1",
    "HorizontalPodAutoscaler": "autoscaling/v2",
    "NetworkPolicy": "networking.k8s.io/v1",
    "StatefulSet": "apps/v1",
}


@pytest.mark.parametrize(("kind", "api_version"), SEED.items())
def test_kinds_that_are_not_acted_on_are_said_to_be(kind: str, api_version: str) -> None:
    result = decode({"apiVersion": api_version, "kind": kind, "metadata": {"name": "x"}, "spec": {"any": 1}})
    assert result.accepted
    assert result.obj is None
    assert [fault.severity for fault in result.faults] == ["warning"]
    assert result.faults[0].message.endswith("by this version")


def test_gateways_that_are_no_waypoints_are_said_not_to_be_acted_on() -> None:
    made = {"apiVersion": "gateway.networking.k8s.io/v1", "kind": "Gateway", "metadata": {"name": "x"}}
    other = decode({**made, "spec": {"gatewayClassName": "istio", "listeners": []}})
    (fault,) = other.faults
    assert (other.accepted, fault.severity) == (True, "warning")
    assert "spec.gatewayClassName" in str(fault)
    assert "'istio' is not acted on by this version" in fault.message
    waypoint = decode({**made, "spec": {"gatewayClassName": "istio-waypoint", "listeners": []}})
    assert waypoint.faults == []
    assert isinstance(waypoint.obj, Gateway)
    assert waypoint.obj.waypoint


def test_policies_are_said_not_to_be_enforced() -> None:
    result = decode(
        {"apiVersion": "networking.k8s.io/v1", "kind": "NetworkPolicy", "metadata": {"name": "deny"}}
    )
    assert said(result) == ["is not enforced by this version; do not rely on it"]


def test_a_mesh_configuration_needs_no_name() -> None:
    result = decode({"apiVersion": "install.istio.io/v1alpha1", "kind": "IstioOperator"})
    assert result.accepted
    assert result.key == Key("install.istio.io", "IstioOperator", "default", "")


def test_problems_of_a_file_name_object_file_and_line() -> None:
    text = (
        "apiVersion: v1\nkind: Namespace\nmetadata: {name: shop}\n---\n"
        "apiVersion: v1\nkind: Service\nmetadata:\n  name: web\n  namespace: shop\n"
        "spec:\n  ports:\n  - name: a\n    port: http\n"
        "---\n- not\n- an object\n---\njust text\n---\nkind: Pod\nmetadata: {name: x}\n"
    )
    manifest = read_manifest(text, "shop.yaml")
    assert [str(problem) for problem in manifest.problems] == [
        'Service shop/web (shop.yaml:13): spec.ports[0].port: expected int, got str ("http"); give a number 1-65535',
        "shop.yaml:15: expected an object, got a list; begin it with apiVersion: and kind:",
        "shop.yaml:18: expected an object, got a text; begin it with apiVersion: and kind:",
        "Pod x (shop.yaml:20): apiVersion: is missing; add it, for example apiVersion: v1",
    ]
    assert [str(entry.decoded.key) for entry in manifest.entries] == ["Namespace shop", "Service shop/web"]


def test_lists_are_unfolded() -> None:
    text = (
        "apiVersion: v1\nkind: List\nitems:\n"
        "- {apiVersion: v1, kind: Namespace, metadata: {name: a}}\n"
        "- {apiVersion: v1, kind: Namespace, metadata: {name: A}}\n"
        "- 7\n"
        "- {apiVersion: v1, kind: Namespace, metadata: {name: b}}\n"
    )
    manifest = read_manifest(text, "list.yaml")
    assert [entry.item for entry in manifest.entries] == [0, 1, 3]
    assert [entry.decoded.accepted for entry in manifest.entries] == [True, False, True]
    assert [(problem.object, problem.line) for problem in manifest.problems] == [("Namespace A", 5), ("", 6)]


def test_deployments_of_real_manifests_are_read(tmp_path: Path) -> None:
    text = """
apiVersion: apps/v1
kind: Deployment
metadata:
  name: reviews-v1
  labels: {app: reviews, version: v1}
spec:
  replicas: 1
  strategy: {type: RollingUpdate}
  selector:
    matchLabels: {app: reviews, version: v1}
  template:
    metadata:
      labels: {app: reviews, version: v1}
      creationTimestamp: null
    spec:
      serviceAccountName: bookinfo-reviews
      containers:
      - name: reviews
        image: docker.io/istio/examples-bookinfo-reviews-v1:1.20.2
        imagePullPolicy: IfNotPresent
        env: [{name: LOG_DIR, value: /tmp/logs}, {name: IP, valueFrom: {fieldRef: {fieldPath: status.podIP}}}]
        ports: [{containerPort: 9080}]
        volumeMounts: [{name: tmp, mountPath: /tmp}]
      volumes: [{name: tmp, emptyDir: {}}]
"""
    (entry,) = read_manifest(text).entries
    assert isinstance(entry.decoded.obj, Deployment)
    assert entry.decoded.obj.spec.template.spec.service_account_name == "bookinfo-reviews"
    assert not entry.decoded.faults
