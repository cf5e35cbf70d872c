"""The command line and environment of a control plane in a cluster."""

import pytest

from ztunnel.controlplane.kube.options import ClusterOptions
from ztunnel.controlplane.options import Options, parse


@pytest.fixture(autouse=True)
def bare(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("POD_NAME", "POD_NAMESPACE", "POD_UID", "REVISION", "CLUSTER_ID", "TRUST_DOMAIN", "NETWORK",
                 "ROOT_NAMESPACE", "CA_TRUSTED_NODE_ACCOUNTS", "VALIDATION_WEBHOOK_CONFIG_NAME"):  # fmt: skip
        monkeypatch.delenv(name, raising=False)


def cluster(*arguments: str) -> tuple[Options, ClusterOptions]:
    options = parse(["--kubernetes", *arguments])
    assert options.cluster is not None
    return options, options.cluster


def test_names_of_the_default_revision() -> None:
    options, own = cluster()
    assert (own.namespace, own.service, own.lease) == ("istio-system", "istiod", "istio-leader")
    assert own.webhook_config == "istio-validator-istio-system"
    assert own.node_proxies == ("istio-system/ztunnel",)
    assert "istiod.istio-system.svc" in own.server_names
    assert options.port == 15012
    assert options.settings.root_namespace == "istio-system"
    assert options.store is None


def test_names_of_another_revision_and_namespace() -> None:
    options, own = cluster("--revision", "canary", "--namespace", "mesh")
    assert (own.service, own.lease) == ("istiod-canary", "istio-leader-canary")
    assert own.webhook_config == "istio-validator-canary-mesh"
    assert own.node_proxies == ("istio-system/ztunnel", "mesh/ztunnel")
    assert {"istiod-canary.mesh.svc", "istiod.mesh.svc", "istiod-canary.mesh.svc.cluster.local"} <= set(
        own.server_names
    )
    assert options.settings.root_namespace == "mesh"


def test_the_environment_counts_where_no_flag_is_given(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in (
        ("POD_NAME", "istiod-1"),
        ("POD_UID", "u"),
        ("POD_NAMESPACE", "mesh"),
        ("REVISION", "blue"),
        ("CLUSTER_ID", "one"),
        ("TRUST_DOMAIN", "example.org"),
        ("CA_TRUSTED_NODE_ACCOUNTS", "kube-system/ztunnel, mesh/other"),
    ):
        monkeypatch.setenv(name, value)
    options, own = cluster("--cluster-id", "two")
    assert (own.replica, own.uid, own.namespace, own.revision) == ("istiod-1", "u", "mesh", "blue")
    assert own.node_proxies == ("kube-system/ztunnel", "mesh/other")
    assert (options.settings.cluster_id, options.settings.trust_domain) == ("two", "example.org")


@pytest.mark.parametrize(
    ("arguments", "environment", "complaint"),
    [
        (["--store", "x"], {}, "--store is not used with --kubernetes"),
        (["--ca-dir", "x"], {}, "--ca-dir is not used with --kubernetes"),
        (["--revision", "A/B"], {}, "--revision: 'A/B' is not a valid name"),
        (
            [],
            {"CA_TRUSTED_NODE_ACCOUNTS": "ztunnel"},
            "CA_TRUSTED_NODE_ACCOUNTS: 'ztunnel' is not NAMESPACE/NAME",
        ),
        ([], {"TRUST_DOMAIN": "A b"}, "trust domain"),
        ([], {"MAX_WORKLOAD_CERT_TTL": "x"}, "MAX_WORKLOAD_CERT_TTL"),
    ],
)
def test_what_does_not_do(
    arguments: list[str],
    environment: dict[str, str],
    complaint: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(SystemExit) as ended:
        cluster(*arguments)
    assert ended.value.code == 2
    assert complaint in capsys.readouterr().err


def test_without_a_cluster_a_directory_is_needed(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        parse(["--tokens", "x"])
    assert "--store, --ca-dir (or --kubernetes)" in capsys.readouterr().err
