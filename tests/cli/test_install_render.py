"""The objects that an installation has: as manifests/ says, changed only as the settings say."""

import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import yaml

from ztunnel import __version__
from ztunnel.cli.install import assets, render, settings
from ztunnel.config import Settings as ProxySettings
from ztunnel.config import WorkerSettings
from ztunnel.store import crds

Object = dict[str, Any]


def objects(*sets: str, **given: Any) -> dict[tuple[str, str], Object]:
    """What is rendered, by kind and name."""
    return {
        (obj["kind"], obj["metadata"]["name"]): obj
        for obj in render.render(settings.read(sets=sets, **given))
    }


def variables(workload: Object) -> dict[str, str]:
    """The environment of a workload's main container."""
    return {each["name"]: each.get("value", "") for each in render.container_of(workload)["env"]}


def test_nothing_said_is_the_kustomization() -> None:
    plain = assets.documents("base")
    made = render.render(settings.read())
    for obj in made:
        assert obj["metadata"]["labels"].pop(render.VERSION) == __version__
        for part in ("Cni", "Ztunnel"):
            if obj["kind"] == "DaemonSet" and obj["metadata"]["labels"][render.COMPONENT] == part:
                assert obj["metadata"]["labels"].pop(render.REVISION) == "default"
    for obj in (*plain, *made):
        if obj["kind"] == "ConfigMap":
            obj["data"]["mesh"] = yaml.safe_load(obj["data"]["mesh"])
    assert made == plain


def test_every_object_says_what_it_is_part_of() -> None:
    for obj in (*render.render(settings.read()), *render.gateway_api()):
        labels = obj["metadata"]["labels"]
        assert labels[render.PART_OF] == render.PART, render.reference(obj)
        assert labels[render.COMPONENT] in ("Base", "Pilot", "Cni", "Ztunnel"), render.reference(obj)


def test_every_name_is_there_once() -> None:
    counted = Counter(render.reference(obj) for obj in render.render(settings.read()))
    assert max(counted.values()) == 1


def test_the_image_is_one_for_all() -> None:
    made = objects("hub=registry.example/mesh", "tag=2.0", "values.global.imagePullPolicy=Always")
    images = {
        (container["image"], container["imagePullPolicy"])
        for obj in made.values()
        if obj["kind"] in ("Deployment", "DaemonSet")
        for container in (*render.pod_of(obj)["containers"], *render.pod_of(obj).get("initContainers", ()))
    }
    assert images == {("registry.example/mesh/ambient:2.0", "Always")}


def test_the_version_of_the_files_is_that_of_the_package() -> None:
    for file in ("istiod.yaml", "istio-cni.yaml", "ztunnel.yaml"):
        for obj in assets.documents(f"base/{file}"):
            if obj["kind"] in ("Deployment", "DaemonSet"):
                assert render.container_of(obj)["image"] == f"ambient-mesh/ambient:{__version__}"


def test_settings_of_the_guide_reach_the_processes() -> None:
    resources = {"requests": {"cpu": "100m", "memory": "128Mi"}, "limits": {"cpu": "500m", "memory": "256Mi"}}
    made = objects(
        "values.pilot.env.MAX_WORKLOAD_CERT_TTL=48h",
        "meshConfig.defaultConfig.concurrency=4",
        f"values.global.proxy.resources={json.dumps(resources)}",
        "meshConfig.extensionProviders=[{name: opa, envoyExtAuthzGrpc: {service: opa.svc, port: 9191}}]",
    )
    plane, proxy = made["Deployment", "istiod"], made["DaemonSet", "ztunnel"]
    assert variables(plane)["MAX_WORKLOAD_CERT_TTL"] == "48h"
    assert json.loads(variables(plane)["WAYPOINT_RESOURCES"]) == resources
    assert variables(proxy)["ZTUNNEL_WORKER_THREADS"] == "4"
    assert render.container_of(proxy)["resources"] == resources
    mesh = yaml.safe_load(made["ConfigMap", "istio"]["data"]["mesh"])
    assert mesh["extensionProviders"][0]["name"] == "opa"
    assert mesh["trustDomain"] == "cluster.local"


def test_the_trust_domain_is_one_for_all() -> None:
    made = objects("meshConfig.trustDomain=example.org")
    arguments = render.container_of(made["Deployment", "istiod"])["args"]
    assert arguments[arguments.index("--trust-domain") + 1] == "example.org"
    assert variables(made["DaemonSet", "ztunnel"])["TRUST_DOMAIN"] == "example.org"
    assert yaml.safe_load(made["ConfigMap", "istio"]["data"]["mesh"])["trustDomain"] == "example.org"


def test_the_proxy_can_read_its_environment() -> None:
    made = objects("values.ztunnel.terminationGracePeriodSeconds=90", "values.global.network=here")
    proxy = made["DaemonSet", "ztunnel"]
    # What kubelet fills in is not known here.
    environment = {name: value for name, value in variables(proxy).items() if value}
    read = ProxySettings.from_environment(environment)
    assert read.xds_address == read.ca_address == "https://istiod.istio-system.svc:15012"
    assert (read.termination_grace, read.network) == (90.0, "here")
    assert render.pod_of(proxy)["terminationGracePeriodSeconds"] > 90
    assert WorkerSettings.from_environment(environment).trust_domain == "cluster.local"


def test_components_can_be_left_out() -> None:
    kinds = {obj["metadata"]["labels"][render.COMPONENT] for obj in objects(profile="minimal").values()}
    assert kinds == {"Base", "Pilot"}
    without = ("components.base.enabled=false", "components.pilot.enabled=false", "values.cni.enabled=false")
    made = objects(*without, "values.ztunnel.revision=default")
    assert {obj["metadata"]["labels"][render.COMPONENT] for obj in made.values()} == {"Ztunnel"}


def test_how_many_control_planes() -> None:
    made = objects("values.pilot.autoscaleMin=7")
    scaler = made["HorizontalPodAutoscaler", "istiod"]["spec"]
    assert (scaler["minReplicas"], scaler["maxReplicas"]) == (7, 7)
    assert "replicas" not in made["Deployment", "istiod"]["spec"]
    fixed = objects("values.pilot.autoscaleEnabled=false", "values.pilot.replicaCount=2")
    assert ("HorizontalPodAutoscaler", "istiod") not in fixed
    assert fixed["Deployment", "istiod"]["spec"]["replicas"] == 2


def test_pods_take_what_is_set_for_them() -> None:
    made = objects(
        "values.cni.nodeSelector.pool=mesh", "values.cni.tolerations=[]", "values.cni.podAnnotations.note=true",
        "values.cni.podLabels.team=net", "values.cni.cniBinDir=/home/kubernetes/bin", "values.cni.env.A=1",
        "values.global.imagePullSecrets=[pull]", "values.cni.resources={requests: {cpu: 5m}}",
    )  # fmt: skip
    agents = made["DaemonSet", "istio-cni-node"]
    pod, metadata = render.pod_of(agents), agents["spec"]["template"]["metadata"]
    assert pod["nodeSelector"] == {"kubernetes.io/os": "linux", "pool": "mesh"}
    assert pod["tolerations"] == []
    assert metadata["annotations"]["note"] == "true"
    assert metadata["labels"]["team"] == "net"
    assert {"path": "/home/kubernetes/bin"}.items() <= next(
        volume["hostPath"] for volume in pod["volumes"] if volume["name"] == "cni-bin"
    ).items()
    assert pod["imagePullSecrets"] == [{"name": "pull"}]
    assert render.container_of(agents)["resources"] == {"requests": {"cpu": "5m"}}
    assert variables(agents)["A"] == "1"


def test_labels_that_pods_are_found_by_cannot_be_changed() -> None:
    for kind, name, component in (("Deployment", "istiod", "pilot"), ("DaemonSet", "ztunnel", "ztunnel")):
        workload = objects(f"values.{component}.podLabels.app=mine")[kind, name]
        selector = workload["spec"]["selector"]["matchLabels"]
        assert selector.items() <= workload["spec"]["template"]["metadata"]["labels"].items()


def test_validation_can_be_left_out() -> None:
    assert not [
        kind for kind, _ in objects("values.global.configValidation=false") if kind.startswith("Validating")
    ]


# Revisions.


def test_a_revision_shares_no_name_with_the_default_one() -> None:
    plain = {key for key, obj in objects().items() if obj["metadata"]["labels"][render.COMPONENT] == "Pilot"}
    made = objects(revision="1-24-0")
    own = {key for key, obj in made.items() if obj["metadata"]["labels"][render.COMPONENT] == "Pilot"}
    assert not plain & own
    assert len(plain) == len(own)
    assert ("Deployment", "istiod-1-24-0") in own
    assert ("Service", "istiod-1-24-0") in own


def test_a_revisions_objects_name_one_another() -> None:
    made = objects(revision="canary")
    plane, service = made["Deployment", "istiod-canary"], made["Service", "istiod-canary"]
    labels = plane["spec"]["template"]["metadata"]["labels"]
    assert labels[render.REVISION] == "canary"
    assert labels["app"] == "istiod"
    assert service["spec"]["selector"].items() <= labels.items()
    assert plane["spec"]["selector"]["matchLabels"].items() <= labels.items()
    pod = render.pod_of(plane)
    assert ("ServiceAccount", pod["serviceAccountName"]) in made
    for volume in pod["volumes"]:
        if "configMap" in volume:
            assert ("ConfigMap", volume["configMap"]["name"]) in made
    for (kind, _), obj in made.items():
        if kind.endswith("Binding") and obj["metadata"]["labels"][render.COMPONENT] == "Pilot":
            assert (obj["roleRef"]["kind"], obj["roleRef"]["name"]) in made
            assert ("ServiceAccount", obj["subjects"][0]["name"]) in made
    webhook = next(obj for (kind, _), obj in made.items() if kind == "ValidatingWebhookConfiguration")
    assert {each["clientConfig"]["service"]["name"] for each in webhook["webhooks"]} == {"istiod-canary"}
    arguments = render.container_of(plane)["args"]
    assert arguments[arguments.index("--revision") + 1] == "canary"
    assert (
        variables(made["DaemonSet", "ztunnel"])["XDS_ADDRESS"]
        == "https://istiod-canary.istio-system.svc:15012"
    )


def test_a_role_of_a_revision_is_for_its_own_webhook_lease_and_configuration() -> None:
    made = objects(revision="canary")
    named = {
        name
        for obj in made.values()
        if obj["kind"] in ("Role", "ClusterRole") and obj["metadata"]["labels"][render.COMPONENT] == "Pilot"
        for rule in obj["rules"]
        for name in rule.get("resourceNames", ())
    }
    assert {"istio-validator-canary-istio-system", "istio-leader-canary", "istio-canary"} <= named
    assert {"istio-validator-istio-system", "istio-leader", "istio"}.isdisjoint(named)
    assert {"istio-ca-root-cert", "istio-ca-secret", "cacerts"} <= named  # these are one for the whole mesh


def test_node_proxies_may_follow_another_revision() -> None:
    made = objects("values.ztunnel.revision=default", revision="canary")
    assert variables(made["DaemonSet", "ztunnel"])["XDS_ADDRESS"] == "https://istiod.istio-system.svc:15012"
    assert made["DaemonSet", "ztunnel"]["metadata"]["labels"][render.REVISION] == "default"


@pytest.mark.parametrize(("revision", "default", "serves"), [
    (None, "default", True), ("canary", "default", False), ("canary", "canary", True), (None, "canary", False),
])  # fmt: skip
def test_one_control_plane_serves_who_names_no_revision(
    revision: str | None, default: str, serves: bool
) -> None:
    made = render.render(settings.read(revision=revision), default=default)
    plane = next(obj for obj in made if obj["kind"] == "Deployment")
    assert variables(plane).get(render.SERVES_UNLABELLED, "default") == default
    webhook = next(obj for obj in made if obj["kind"] == "ValidatingWebhookConfiguration")
    assert render.serves_unlabelled(webhook) is serves
    taken_over = {"webhooks": render.with_unlabelled(webhook["webhooks"])}
    assert render.serves_unlabelled(taken_over)
    both = [
        each for each in taken_over["webhooks"] if each["objectSelector"]["matchExpressions"][0]["operator"]
    ]
    assert [each["objectSelector"]["matchExpressions"][0]["operator"] for each in both] == [
        "In",
        "DoesNotExist",
    ]


# Safety of what is rendered.


def test_workloads_are_as_unprivileged_as_they_can_be() -> None:
    for obj in objects().values():
        if obj["kind"] not in ("Deployment", "DaemonSet"):
            continue
        pod = render.pod_of(obj)
        for container in pod["containers"]:
            context = {**pod.get("securityContext", {}), **container["securityContext"]}
            assert not context.get("privileged"), render.reference(obj)
            assert context["readOnlyRootFilesystem"] is True, render.reference(obj)
            assert context["capabilities"]["drop"] == ["ALL"], render.reference(obj)
            assert context["seccompProfile"] == {"type": "RuntimeDefault"}, render.reference(obj)
            assert container["resources"]["requests"], render.reference(obj)
    assert not render.pod_of(objects()["DaemonSet", "ztunnel"]).get("hostNetwork")


def test_nobody_may_do_everything() -> None:
    for obj in objects().values():
        for rule in obj.get("rules", ()) if obj["kind"] in ("Role", "ClusterRole") else ():
            assert "*" not in rule["verbs"]
            assert "*" not in rule["apiGroups"]
            if "secrets" in rule["resources"] and rule["verbs"] != ["create"]:
                assert rule["resourceNames"], render.reference(obj)


def test_definitions_are_those_of_the_models() -> None:
    made = render.definitions(render.render(settings.read()))
    for obj in made:
        del obj["metadata"]["labels"][render.VERSION]
    assert sorted(made, key=str) == sorted(
        (definition.object() for definition in crds.definitions()), key=str
    )


def test_what_is_written_can_be_read_again() -> None:
    made = render.render(settings.read(sets=["meshConfig.extensionProviders=[{name: a}]"]))
    assert list(yaml.safe_load_all(render.to_yaml(made))) == made


def test_manifests_come_with_the_package() -> None:
    root = Path(__file__).parents[2]
    project = (root / "pyproject.toml").read_text()
    assert '"manifests*"' in project
    assert '"manifests" = ["**/*.yaml"]' in project
    assert (root / "manifests" / "__init__.py").is_file()
