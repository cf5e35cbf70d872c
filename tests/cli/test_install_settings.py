"""What is to be installed: profiles, IstioOperator files, --set, and what is told of fields that are not known."""

import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from ztunnel import __version__
from ztunnel.cli.errors import UserError
from ztunnel.cli.install import assets, fields, settings
from ztunnel.config import SettingError
from ztunnel.config import Settings as ProxySettings

GUIDE = """
apiVersion: install.istio.io/v1alpha1
kind: IstioOperator
spec:
  meshConfig:
    defaultConfig:
      certificates: []
  values:
    pilot:
      env:
        MAX_WORKLOAD_CERT_TTL: "48h"
        DEFAULT_WORKLOAD_CERT_TTL: "24h"
---
apiVersion: install.istio.io/v1alpha1
kind: IstioOperator
spec:
  meshConfig:
    extensionProviders:
    - name: "opa-ext-authz"
      envoyExtAuthzGrpc:
        service: "opa.opa-system.svc.cluster.local"
        port: 9191
        includeRequestBodyInCheck:
          maxRequestBytes: 1024
---
apiVersion: install.istio.io/v1alpha1
kind: IstioOperator
spec:
  meshConfig:
    defaultConfig:
      concurrency: 2
  values:
    global:
      proxy:
        resources:
          requests:
            cpu: 100m
            memory: 128Mi
          limits:
            cpu: 500m
            memory: 256Mi
"""
DOCS = Path(__file__).parents[2] / "docs" / "install.md"


def operator(spec: dict[str, Any]) -> str:
    """An IstioOperator's text."""
    return yaml.safe_dump({"apiVersion": "install.istio.io/v1alpha1", "kind": "IstioOperator", "spec": spec})


@pytest.fixture
def guide(tmp_path: Path) -> str:
    path = tmp_path / "guide.yaml"
    path.write_text(GUIDE)
    return str(path)


def test_nothing_said_is_the_ambient_profile() -> None:
    found = settings.read()
    assert (found.profile, found.revision, found.node_revision) == ("ambient", "default", "default")
    assert found.image("pilot") == f"ambient-mesh/ambient:{__version__}"
    assert all(found.enabled(component) for component in ("base", "pilot", "cni", "ztunnel"))
    assert found.warnings == []


def test_documents_of_a_file_are_put_together(guide: str) -> None:
    found = settings.read([guide])
    assert found.get("values.pilot.env") == {
        "MAX_WORKLOAD_CERT_TTL": "48h",
        "DEFAULT_WORKLOAD_CERT_TTL": "24h",
    }
    assert found.get("meshConfig.defaultConfig.concurrency") == 2
    assert found.get("values.global.proxy.resources")["limits"] == {"cpu": "500m", "memory": "256Mi"}
    assert found.mesh_config["extensionProviders"][0]["envoyExtAuthzGrpc"]["port"] == 9191
    assert found.mesh_config["defaultConfig"] == {"certificates": [], "concurrency": 2}


def test_what_is_not_acted_on_is_told_by_name(guide: str) -> None:
    warned = {warning.field: warning.message for warning in settings.read([guide]).warnings}
    assert "does not act on it" in warned["spec.meshConfig.defaultConfig.certificates"]
    assert "opa-ext-authz" in warned["spec.meshConfig.extensionProviders"]
    assert len(warned) == 2


def test_unknown_fields_are_told_with_the_field_that_was_meant() -> None:
    found = settings.read(
        sets=["values.pilot.replicacount=2", "components.egressGateways=[{name: out}]", "values.x=1"]
    )
    warned = {warning.field: warning.message for warning in found.warnings}
    assert "did you mean values.pilot.replicaCount?" in warned["spec.values.pilot.replicacount"]
    assert "has no effect" in warned["spec.components.egressGateways"]
    assert "has no effect" in warned["spec.values.x"]


def test_later_goes_over_earlier_and_set_over_files(tmp_path: Path) -> None:
    first, second = tmp_path / "1.yaml", tmp_path / "2.yaml"
    first.write_text(operator({"hub": "one", "tag": "1", "values": {"pilot": {"env": {"A": "1", "B": "1"}}}}))
    second.write_text(operator({"hub": "two", "values": {"pilot": {"env": {"B": "2"}}}}))
    found = settings.read([str(first), str(second)], ["values.pilot.env.A=3", "tag=1.10"], profile="demo")
    assert found.image("cni") == "two/ambient:1.10"
    assert found.get("values.pilot.env") == {"A": "3", "B": "2"}
    assert found.get("values.pilot.autoscaleEnabled") is False


def test_a_profile_in_a_file_or_set_is_one_too(tmp_path: Path) -> None:
    path = tmp_path / "minimal.yaml"
    path.write_text(operator({"profile": "minimal"}))
    assert not settings.read([str(path)]).enabled("ztunnel")
    assert settings.read([str(path)], ["profile=demo"]).enabled("ztunnel")
    assert settings.read([str(path)], profile="ambient").enabled("ztunnel")


@pytest.mark.parametrize(
    ("text", "path", "value"),
    [
        ("values.pilot.env.A=b=c", ("values", "pilot", "env", "A"), "b=c"),
        ("values.pilot.nodeSelector.a\\.b/c=d", ("values", "pilot", "nodeSelector", "a.b/c"), "d"),
        ("values.cni.enabled=false", ("values", "cni", "enabled"), False),
        ("values.pilot.replicaCount=3", ("values", "pilot", "replicaCount"), 3),
        ("tag=007", ("tag",), "007"),
        ("tag=1.10", ("tag",), "1.10"),
        ("hub=registry.example:5000/mesh", ("hub",), "registry.example:5000/mesh"),
        ("values.global.imagePullSecrets[0]=one", ("values", "global", "imagePullSecrets"), ["one"]),
        (
            "values.cni.tolerations=[{operator: Exists}]",
            ("values", "cni", "tolerations"),
            [{"operator": "Exists"}],
        ),
        ("values.pilot.env.EMPTY=", ("values", "pilot", "env", "EMPTY"), ""),
    ],
)
def test_paths_and_values_of_set(text: str, path: tuple[str, ...], value: object) -> None:
    data: Any = settings.read(sets=[text]).spec
    for step in path:
        data = data[step]
    assert data == value


@pytest.mark.parametrize("text", ["hub", "=x", ".a=1", "a..b=1", "a.=1", "a[1]=x", "a=[", "a[x]=1"])
def test_set_that_is_none_is_refused(text: str) -> None:
    with pytest.raises(UserError, match=f"--set {re.escape(text)}"):
        settings.read(sets=[text])


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ({"profile": "sidecar"}, "there is no profile 'sidecar'; choose one of: ambient, demo, minimal"),
        ({"revision": "1.24"}, r"spec.revision: '1.24' cannot be part of a name"),
        ({"meshConfig": {"defaultConfig": {"concurrency": 0}}}, "concurrency: expected a number from 1"),
        ({"meshConfig": {"trustDomain": "Not Valid"}}, "spec.meshConfig.trustDomain: "),
        (
            {"meshConfig": {"extensionProviders": [{"service": "x"}]}},
            r"extensionProviders: \[0\].name: is missing",
        ),
        ({"values": {"global": {"istioNamespace": "mesh"}}}, "istioNamespace: expected one of istio-system"),
        (
            {"values": {"global": {"proxy": {"resources": {"limits": {"memory": "lots"}}}}}},
            "limits.memory: 'lots'",
        ),
        ({"values": {"global": {"proxy": {"resources": {"memory": "1Gi"}}}}}, "expected requests and limits"),
        ({"values": {"pilot": {"env": {"MAX_WORKLOAD_CERT_TTL": "soon"}}}}, "MAX_WORKLOAD_CERT_TTL: 'soon'"),
        (
            {"values": {"pilot": {"env": {"DEFAULT_WORKLOAD_CERT_TTL": "96h"}}}},
            "env.DEFAULT_WORKLOAD_CERT_TTL",
        ),
        ({"values": {"pilot": {"autoscaleMin": 9, "autoscaleMax": 3}}}, "9 is more than autoscaleMax, 3"),
        ({"values": {"cni": {"enabled": "perhaps"}}}, "expected true or false, got 'perhaps'"),
        ({"components": {"pilot": {"k8s": {"env": [{"value": "x"}]}}}}, "expected name and value"),
    ],
)
def test_values_that_cannot_be_are_refused(tmp_path: Path, spec: dict[str, Any], message: str) -> None:
    path = tmp_path / "mesh.yaml"
    path.write_text(operator(spec))
    with pytest.raises(UserError, match=message):
        settings.read([str(path)])


def test_every_wrong_value_is_told_at_once() -> None:
    with pytest.raises(UserError) as caught:
        settings.read(sets=["values.cni.enabled=perhaps", "values.pilot.replicaCount=none"])
    assert "values.cni.enabled" in str(caught.value)
    assert "values.pilot.replicaCount" in str(caught.value)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "nothing is in it"),
        ("a: [", r"mesh.yaml:\d+: is not YAML"),
        ("kind: Service\napiVersion: v1\n", "is a Service, not an IstioOperator"),
        ("- 1\n", "is no object"),
        ("kind: IstioOperator\napiVersion: v1\n", "apiVersion 'v1' is not known"),
        ("kind: IstioOperator\napiVersion: install.istio.io/v1alpha1\nspec: 3\n", "spec: expected a mapping"),
    ],
)
def test_files_that_are_none_are_refused(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "mesh.yaml"
    path.write_text(text)
    with pytest.raises(UserError, match=message):
        settings.read([str(path)])


def test_a_file_that_is_not_there() -> None:
    with pytest.raises(UserError, match=r"none\.yaml: No such file"):
        settings.read(["none.yaml"])


def test_names_of_istioctl_and_helm_are_one() -> None:
    for text in ("values.global.hub=there", "hub=there"):
        assert settings.read(sets=[text]).image("cni").startswith("there/")
    for text in ("components.pilot.k8s.hpaSpec.minReplicas=2", "values.pilot.autoscaleMin=2"):
        assert settings.read(sets=[text]).get("values.pilot.autoscaleMin") == 2
    inner = settings.read(sets=["values.meshConfig.trustDomain=example.org"])
    assert inner.get("meshConfig.trustDomain") == "example.org"
    assert "meshConfig" not in inner.spec.get("values", {})
    given = "components.ztunnel.k8s.env=[{name: A, value: b}]"
    assert settings.read(sets=[given, "values.ztunnel.env.C=d"]).get("values.ztunnel.env") == {
        "A": "b",
        "C": "d",
    }


def test_an_upgrade_keeps_what_was_said() -> None:
    before = settings.read(sets=["tag=1", "values.pilot.replicaCount=3"], profile="demo").spec
    after = settings.read(sets=["tag=2"], before=before)
    assert (after.profile, after.get("tag"), after.get("values.pilot.replicaCount")) == ("demo", "2", 3)


def test_the_range_of_workers_is_the_proxys() -> None:
    environment = {"ZTUNNEL_WORKER_THREADS": str(fields.MOST_WORKERS)}
    assert ProxySettings.from_environment(environment).workers == fields.MOST_WORKERS
    with pytest.raises(SettingError):
        ProxySettings.from_environment({"ZTUNNEL_WORKER_THREADS": str(fields.MOST_WORKERS + 1)})


@pytest.mark.parametrize("name", sorted(assets.profiles()))
def test_profiles_say_only_what_is_known(name: str) -> None:
    assert settings.read(profile=name).warnings == []


def test_every_field_is_in_the_documentation() -> None:
    told = DOCS.read_text()
    assert [field.name for field in fields.FIELDS.values() if f"`{_in_table(field.name)}`" not in told] == []


def _in_table(name: str) -> str:
    """The table has one line for what control plane, node agent and node proxy have alike."""
    for component in fields.COMPONENTS:
        for part in ("values", "components"):
            shared = name.replace(f"{part}.{component}.", f"{part}.COMPONENT.")
            if shared != name and all(
                tuple(shared.replace("COMPONENT", other).split(".")) in fields.FIELDS
                for other in fields.COMPONENTS
            ):
                return shared
    return name
