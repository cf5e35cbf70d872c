"""The life cycle of an installation against a real API server: what is applied, kept, refused, told, and removed.

A Kubernetes of this module's own, since `--purge` takes the definitions away that others may use. It has no nodes:
workloads are made and never ready, so nothing waits for them unless a test is about that.
"""

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.kube.lab import Lab, LabError
from ztunnel.cli.install import survey

pytestmark = pytest.mark.kube

FOREIGN_DEFINITION = {
    "apiVersion": "apiextensions.k8s.io/v1",
    "kind": "CustomResourceDefinition",
    "metadata": {
        "name": "virtualservices.networking.istio.io",
        "labels": {"chart": "istio", "release": "istio-base"},
    },
    "spec": {
        "group": "networking.istio.io",
        "names": {"kind": "VirtualService", "plural": "virtualservices", "shortNames": ["vs"]},
        "scope": "Namespaced",
        "versions": [
            {
                "name": "v1beta1",
                "served": True,
                "storage": True,
                "schema": {
                    "openAPIV3Schema": {"type": "object", "x-kubernetes-preserve-unknown-fields": True}
                },
            }
        ],
    },
}


class Ambient:
    """`ambient` on the cluster."""

    def __init__(self, lab: Lab) -> None:
        self.lab = lab

    def run(self, *arguments: str, kubeconfig: Path | None = None) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-P", "-m", "ztunnel.cli.main", *arguments]
        given = str(kubeconfig or self.lab.kubeconfig)
        environment = {**os.environ, "KUBECONFIG": given, "AMBIENT_STATE": ""}
        return subprocess.run(
            [*command, "--kubeconfig", given],
            capture_output=True,
            text=True,
            timeout=240,
            env=environment,
            check=False,
        )

    def ok(self, *arguments: str) -> str:
        """It must succeed; what it writes for scripts."""
        done = self.run(*arguments)
        assert done.returncode == 0, done
        assert "Traceback" not in done.stderr
        return done.stdout

    def fails(self, *arguments: str, code: int = 1, kubeconfig: Path | None = None) -> str:
        """It must fail; what it says."""
        done = self.run(*arguments, kubeconfig=kubeconfig)
        assert done.returncode == code, done
        assert "Traceback" not in done.stderr
        return done.stderr

    def changes(self, *arguments: str) -> dict[str, str]:
        """What became of each object, by "Kind name"."""
        listed = json.loads(self.ok(*arguments, "-o", "json"))["objects"]
        return {f"{each['kind']} {each['name']}": each["change"] for each in listed}

    def get(self, *arguments: str) -> Any:
        return json.loads(self.lab.kubectl("get", *arguments, "-o", "json"))


@pytest.fixture(scope="module")
def own() -> Iterator[Lab]:
    """An API server with its controllers, for this module only."""
    with Lab.up(f"test-install-{os.getpid()}", 0) as lab:
        lab.start_controllers()
        yield lab


@pytest.fixture
def ambient(own: Lab) -> Iterator[Ambient]:
    """A cluster without the mesh, before and after."""
    command = Ambient(own)
    yield command
    command.ok("uninstall", "--purge", "-y")


def everything(lab: Lab) -> set[str]:
    """All objects but those that come and go by themselves."""
    kinds = lab.kubectl("api-resources", "--verbs=list", "-o", "name").split()
    listed = lab.kubectl(
        "get", ",".join(kind for kind in kinds if not kind.startswith(("events", "leases", "componentstatuses"))),
        "-A", "-o", "jsonpath={range .items[*]}{.kind} {.metadata.namespace}/{.metadata.name}{\"\\n\"}{end}",
        "--ignore-not-found",
    )  # fmt: skip
    return set(listed.splitlines())


def test_installed_again_unchanged_and_purged_without_a_trace(ambient: Ambient, own: Lab) -> None:
    own.api.apply({"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": "apps"}})
    own.kubectl("wait", "--for=create", "serviceaccount/default", "-n", "apps", "--timeout=60s")
    before = everything(own)

    made = ambient.changes("install", "-y", "--no-wait")
    assert set(made.values()) == {"created"}
    assert {
        "Deployment istiod",
        "DaemonSet istio-cni-node",
        "DaemonSet ztunnel",
        "Namespace istio-system",
    } <= set(made)
    assert set(ambient.changes("install", "-y", "--no-wait").values()) == {"unchanged"}

    changed = ambient.changes(
        "install", "-y", "--no-wait", "--set", "values.pilot.env.DEFAULT_WORKLOAD_CERT_TTL=12h"
    )
    assert {name: how for name, how in changed.items() if how != "unchanged"} == {
        "Deployment istiod": "configured",
        "ConfigMap ambient-installation": "configured",
    }
    # What the control plane writes, policies, and a pod that its agent did not take out.
    own.apply("""
apiVersion: v1
kind: Secret
metadata: {name: istio-ca-secret, namespace: istio-system}
---
apiVersion: v1
kind: ConfigMap
metadata: {name: istio-ca-root-cert, namespace: apps}
---
apiVersion: coordination.k8s.io/v1
kind: Lease
metadata: {name: istio-leader, namespace: istio-system}
---
apiVersion: security.istio.io/v1beta1
kind: PeerAuthentication
metadata: {name: default, namespace: apps}
spec: {mtls: {mode: STRICT}}
---
apiVersion: gateway.networking.k8s.io/v1
kind: Gateway
metadata: {name: waypoint, namespace: apps}
spec: {gatewayClassName: istio-waypoint, listeners: [{name: mesh, port: 15008, protocol: HBONE}]}
---
apiVersion: v1
kind: Pod
metadata: {name: stays, namespace: apps, annotations: {ambient.istio.io/redirection: enabled}}
spec: {containers: [{name: c, image: none}]}
""")
    done = ambient.run("uninstall", "--purge", "-y")
    assert done.returncode == 1
    assert "Pod apps/stays" in done.stderr, done
    assert "annotations" not in own.api.get("v1", "Pod", "apps", "stays")["metadata"]  # type: ignore[index]
    own.api.delete("v1", "Pod", "apps", "stays")
    assert everything(own) - {"Pod apps/stays"} == before
    assert "Lease" not in own.kubectl("get", "lease", "-A", "-o", "name").replace("kube-", "")
    assert "Nothing was installed" in ambient.run("uninstall", "--purge", "-y").stderr


def test_kustomization_and_installation_are_one(ambient: Ambient, own: Lab) -> None:
    own.kubectl("apply", "-k", str(Path(__file__).parents[2] / "manifests"))
    made = ambient.changes("install", "-y", "--no-wait")
    assert "created" in made["ConfigMap ambient-installation"]
    others = {name for name, how in made.items() if how == "created"} - {"ConfigMap ambient-installation"}
    assert all("gateway.networking.k8s.io" in name for name in others)


def test_definitions_of_others_are_used_and_never_changed(ambient: Ambient, own: Lab) -> None:
    own.api.apply(FOREIGN_DEFINITION, field_manager="helm")
    name = FOREIGN_DEFINITION["metadata"]["name"]  # type: ignore[index]
    kind = ("apiextensions.k8s.io/v1", "CustomResourceDefinition", "", name)
    try:
        own.kubectl("wait", f"crd/{name}", "--for=condition=Established", "--timeout=60s")
        before = own.api.get(*kind)
        made = ambient.changes("install", "-y", "--no-wait")
        assert made[f"CustomResourceDefinition {name}"] == "kept"
        ambient.ok("uninstall", "--purge", "-y")
        after = own.api.get(*kind)
        assert before is not None
        assert after is not None
        assert after["metadata"]["resourceVersion"] == before["metadata"]["resourceVersion"]
    finally:
        own.api.delete(*kind)


def test_definitions_refuse_what_the_readers_refuse_and_keep_what_they_report(
    ambient: Ambient, own: Lab
) -> None:
    ambient.ok("install", "-y", "--no-wait", "--set", "values.global.configValidation=false")
    own.kubectl("wait", "crd", "-l", survey.OURS, "--for=condition=Established", "--timeout=60s")
    policy = "apiVersion: security.istio.io/v1beta1\nkind: AuthorizationPolicy\n"
    policy += "metadata: {name: x, namespace: default}\n"
    for spec in ("{action: PERMIT}", "{rules: {}}", "{rules: [{from: [{source: {principals: x}}]}]}",
                 "{rules: [{to: [{operation: {ports: [80]}}]}]}"):  # fmt: skip
        with pytest.raises(LabError, match="AuthorizationPolicy"):
            own.apply(f"{policy}spec: {spec}\n")
    own.apply(f"{policy}spec: {{action: DENY, rule: [{{from: []}}]}}\n")
    found = ambient.get("authorizationpolicies.v1.security.istio.io", "x", "-n", "default")
    assert found["spec"] == {"action": "DENY", "rule": [{"from": []}]}
    assert "DENY" in own.kubectl("get", "ap", "x", "-n", "default")


def test_objects_of_another_installation_stop_it_before_anything_is_changed(
    ambient: Ambient, own: Lab
) -> None:
    own.apply("""
apiVersion: v1
kind: Namespace
metadata: {name: istio-system}
---
apiVersion: v1
kind: ConfigMap
metadata: {name: istio, namespace: istio-system}
data: {mesh: "of another Istio"}
""")
    try:
        said = ambient.fails("install", "-y", "--no-wait")
        assert "ConfigMap istio-system/istio: is there already, and not of this mesh" in said
        assert "istioctl uninstall --purge" in said
        assert own.kubectl("get", "crd", "-l", survey.OURS, "-o", "name") == ""
        # A namespace that was there before stays, and so does what others have in it.
        ambient.ok("uninstall", "--purge", "-y")
        assert ambient.get("cm", "istio", "-n", "istio-system")["data"] == {"mesh": "of another Istio"}
    finally:
        own.kubectl("delete", "namespace", "istio-system")


def test_a_users_authority_keeps_its_namespace(ambient: Ambient, own: Lab) -> None:
    ambient.ok("install", "-y", "--no-wait", "--profile", "minimal")
    own.kubectl(
        "create", "secret", "generic", "cacerts", "-n", "istio-system", "--from-literal=ca-key.pem=secret"
    )
    try:
        done = ambient.run("uninstall", "--purge", "-y")
        assert done.returncode == 0
        assert "Secret istio-system/cacerts in it is not ours" in done.stderr
        assert ambient.get("secret", "cacerts", "-n", "istio-system")["data"]
    finally:
        own.kubectl("delete", "namespace", "istio-system")


def test_what_is_no_longer_wanted_is_removed(ambient: Ambient, own: Lab) -> None:
    ambient.ok("install", "-y", "--no-wait")
    made = ambient.changes("install", "-y", "--no-wait", "--profile", "minimal")
    deleted = {name for name, how in made.items() if how == "deleted"}
    assert {"DaemonSet istio-cni-node", "DaemonSet ztunnel", "ClusterRole istio-cni"} <= deleted
    assert ambient.get("daemonset", "-n", "istio-system")["items"] == []
    assert ambient.get("deployment", "istiod", "-n", "istio-system")


def test_a_dry_run_changes_nothing_and_is_checked_by_the_server(ambient: Ambient, own: Lab) -> None:
    before = everything(own)
    told = ambient.ok("install", "--dry-run")
    assert "Deployment istio-system/istiod" in told
    assert everything(own) == before
    ambient.ok("install", "-y", "--no-wait")
    again = ambient.ok(
        "install",
        "--dry-run",
        "--set",
        "values.pilot.replicaCount=2",
        "--set",
        "values.pilot.autoscaleEnabled=false",
    )
    rows = {line.rpartition("   ")[0].strip(): line.split()[-1] for line in again.splitlines()[1:]}
    assert rows["Deployment istio-system/istiod"] == "configured"
    assert rows["HorizontalPodAutoscaler istio-system/istiod"] == "deleted"
    assert ambient.get("hpa", "istiod", "-n", "istio-system")
    wrong = ambient.fails("install", "--dry-run", "--set", "values.cni.tolerations=[{operator: Sometimes}]")
    assert "DaemonSet istio-system/istio-cni-node" in wrong
    assert "tolerations" in wrong


def test_a_workload_that_does_not_get_ready_is_named_with_the_reason(ambient: Ambient) -> None:
    said = ambient.fails("install", "-y", "--timeout", "5s", "--set", "values.pilot.nodeSelector.pool=none")
    assert "Deployment istio-system/istiod: " in said
    assert "after 5s" in said


def test_whoever_may_not_is_told_what_is_missing(ambient: Ambient, own: Lab, tmp_path: Path) -> None:
    own.apply("""
apiVersion: v1
kind: ServiceAccount
metadata: {name: installer, namespace: default}
---
apiVersion: rbac.authorization.k8s.io/v1
kind: ClusterRoleBinding
metadata: {name: installer}
roleRef: {apiGroup: rbac.authorization.k8s.io, kind: ClusterRole, name: view}
subjects: [{kind: ServiceAccount, name: installer, namespace: default}]
---
apiVersion: rbac.authorization.k8s.io/v1
kind: ClusterRole
metadata: {name: installer-reads}
rules: [{apiGroups: ["*"], resources: ["*"], verbs: [get, list]}]
---
apiVersion: rbac.authorization.k8s.io/v1
kind: ClusterRoleBinding
metadata: {name: installer-reads}
roleRef: {apiGroup: rbac.authorization.k8s.io, kind: ClusterRole, name: installer-reads}
subjects: [{kind: ServiceAccount, name: installer, namespace: default}]
""")
    try:
        token = own.kubectl("create", "token", "installer", "-n", "default").strip()
        config = yaml.safe_load(own.kubeconfig.read_text())
        config["users"] = [{"name": config["users"][0]["name"], "user": {"token": token}}]
        mine = tmp_path / "kubeconfig"
        mine.write_text(yaml.safe_dump(config))
        said = ambient.fails("install", "-y", "--no-wait", kubeconfig=mine)
        assert "Namespace istio-system" in said
        assert "cannot patch resource" in said
        assert token not in said
        checked = ambient.run("check", "--pre", "-o", "json", kubeconfig=mine)
        assert checked.returncode == 1
        assert "create, patch, delete: customresourcedefinitions.apiextensions.k8s.io" in checked.stdout
    finally:
        own.kubectl("delete", "clusterrolebinding/installer", "clusterrolebinding/installer-reads")
        own.kubectl("delete", "clusterrole/installer-reads", "serviceaccount/installer")


def test_no_api_server_is_told_with_its_address(ambient: Ambient, own: Lab, tmp_path: Path) -> None:
    config = yaml.safe_load(own.kubeconfig.read_text())
    config["clusters"][0]["cluster"]["server"] = "https://127.0.0.1:1"
    lost = tmp_path / "kubeconfig"
    lost.write_text(yaml.safe_dump(config))
    for verb in (["install", "-y"], ["uninstall", "--purge", "-y"], ["upgrade", "-y"], ["check", "--pre"]):
        assert "https://127.0.0.1:1" in ambient.fails(*verb, kubeconfig=lost)


# Revisions.


def test_control_planes_side_by_side(ambient: Ambient, own: Lab) -> None:
    ambient.ok("install", "-y", "--no-wait")
    made = ambient.changes("install", "-y", "--no-wait", "--revision", "1-24-0")
    assert made["Deployment istiod-1-24-0"] == "created"
    assert made["DaemonSet ztunnel"] == "configured"  # the nodes follow the newest
    assert _follows(ambient) == "https://istiod-1-24-0.istio-system.svc:15012"
    validators = {
        each["metadata"]["name"]: [webhook["name"] for webhook in each["webhooks"]]
        for each in ambient.get("validatingwebhookconfigurations", "-l", survey.OURS)["items"]
    }
    assert validators["istio-validator-istio-system"] == ["rev.validation.istio.io", "validation.istio.io"]
    assert validators["istio-validator-1-24-0-istio-system"] == ["rev.validation.istio.io"]

    own.apply("apiVersion: v1\nkind: Namespace\nmetadata: {name: moved, labels: {istio.io/rev: 1-24-0}}\n")
    try:
        said = ambient.fails("uninstall", "--revision", "1-24-0", "-y")
        assert "Namespace moved is served by control plane 1-24-0" in said
        assert "kubectl label namespace moved istio.io/rev=default --overwrite" in said
    finally:
        own.kubectl("delete", "namespace", "moved")


def test_removing_a_control_plane_leaves_its_users_to_the_other(ambient: Ambient, own: Lab) -> None:
    ambient.ok("install", "-y", "--no-wait")
    ambient.ok("install", "-y", "--no-wait", "--revision", "next", "--set", "values.ztunnel.revision=default")
    assert _follows(ambient) == "https://istiod.istio-system.svc:15012"
    # Here nothing can run; who wants no replicas is ready.
    own.kubectl("delete", "hpa", "istiod-next", "-n", "istio-system")
    own.kubectl("scale", "deployment/istiod-next", "-n", "istio-system", "--replicas=0")
    ambient.ok("uninstall", "--revision", "default", "-y", "--timeout", "60s")
    plane = ambient.get("deployment", "istiod-next", "-n", "istio-system")["spec"]["template"]["spec"]
    assert {"name": "DEFAULT_REVISION", "value": "next"} in plane["containers"][0]["env"]
    assert [
        each["metadata"]["name"] for each in ambient.get("deployment", "-n", "istio-system")["items"]
    ] == ["istiod-next"]
    assert _follows(ambient) == "https://istiod-next.istio-system.svc:15012"
    (left,) = ambient.get("validatingwebhookconfigurations", "-l", survey.OURS)["items"]
    assert [webhook["name"] for webhook in left["webhooks"]] == [
        "rev.validation.istio.io",
        "validation.istio.io",
    ]
    again = ambient.changes("upgrade", "-y", "--no-wait")
    assert again["ValidatingWebhookConfiguration istio-validator-next-istio-system"] == "unchanged"
    assert "is the only control plane" in ambient.fails("uninstall", "--revision", "next", "-y")
    assert "there is no control plane 'gone'" in ambient.fails("uninstall", "--revision", "gone", "-y")


def _follows(ambient: Ambient) -> str:
    """The control plane that node proxies are told of."""
    container = ambient.get("daemonset", "ztunnel", "-n", "istio-system")["spec"]["template"]["spec"][
        "containers"
    ][0]
    addresses = {each["value"] for each in container["env"] if each["name"] in ("XDS_ADDRESS", "CA_ADDRESS")}
    assert len(addresses) == 1
    return str(addresses.pop())


def test_a_revision_that_nodes_shall_follow_has_to_be_there(ambient: Ambient) -> None:
    said = ambient.fails("install", "-y", "--no-wait", "--set", "values.ztunnel.revision=gone")
    assert "there is no control plane 'gone' for the node proxies to follow" in said


def test_an_upgrade_keeps_the_settings(ambient: Ambient) -> None:
    assert "nothing is installed" in ambient.fails("upgrade", "-y")
    ambient.ok("install", "-y", "--no-wait", "--profile", "demo", "--set", "values.pilot.env.A=b")
    made = ambient.changes("upgrade", "-y", "--no-wait", "--set", "tag=9.9")
    assert {name for name, how in made.items() if how != "unchanged"} == {
        "Deployment istiod", "DaemonSet istio-cni-node", "DaemonSet ztunnel", "ConfigMap ambient-installation",
    }  # fmt: skip
    pod = ambient.get("deployment", "istiod", "-n", "istio-system")["spec"]["template"]["spec"]
    assert pod["containers"][0]["image"] == "ambient-mesh/ambient:9.9"
    assert {"name": "A", "value": "b"} in pod["containers"][0]["env"]


def test_a_webhook_that_refuses_already_goes_on_to(ambient: Ambient, own: Lab) -> None:
    """istiod says when a webhook that does not answer refuses; to install again does not take that back."""
    ambient.ok("install", "-y", "--no-wait")
    name = "istio-validator-istio-system"
    kind = ("admissionregistration.k8s.io/v1", "ValidatingWebhookConfiguration", "", name)
    live = own.api.get(*kind)
    assert live is not None
    for webhook in live["webhooks"]:
        webhook["failurePolicy"] = "Fail"
        webhook["clientConfig"]["caBundle"] = "aGVsbG8="
    own.api.request("PUT", own.api.path(*kind), body=live)
    made = ambient.changes("install", "-y", "--no-wait")
    assert made[f"ValidatingWebhookConfiguration {name}"] == "unchanged"
    again = own.api.get(*kind)
    assert again is not None
    assert {webhook["failurePolicy"] for webhook in again["webhooks"]} == {"Fail"}
    assert {webhook["clientConfig"]["caBundle"] for webhook in again["webhooks"]} == {"aGVsbG8="}
