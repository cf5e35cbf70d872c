"""What is judged of a cluster before anything is installed, from what it tells of itself."""

from typing import Any

import pytest

from ztunnel.cli.checks.outcome import Result
from ztunnel.cli.hints import sidecars
from ztunnel.cli.install import preflight
from ztunnel.store.models import Container, ObjectMeta, Pod, PodSpec


def node(
    name: str, *, kernel: str = "6.1.0-18-amd64", system: str = "linux", ready: str = "True"
) -> dict[str, Any]:
    """A Node as the API server shows it."""
    return {
        "metadata": {"name": name},
        "status": {
            "nodeInfo": {"kernelVersion": kernel, "operatingSystem": system},
            "conditions": [{"type": "Ready", "status": ready, "message": "the network is not ready"}],
        },
    }


@pytest.mark.parametrize(
    ("version", "result"),
    [
        ({"major": "1", "minor": "34", "gitVersion": "v1.34.4"}, Result.OK),
        ({"major": "1", "minor": "28+", "gitVersion": "v1.28.3-gke.1"}, Result.OK),
        ({"major": "1", "minor": "27", "gitVersion": "v1.27.0"}, Result.FAILED),
        ({}, Result.FAILED),
    ],
)
def test_versions(version: dict[str, Any], result: Result) -> None:
    assert preflight.judge_version(version).result is result


def test_nodes_that_can_run_the_mesh() -> None:
    assert preflight.judge_nodes([node("a"), node("b", kernel="5.4.0-rc1")]).result is Result.OK


def test_an_old_kernel_is_named_with_its_node() -> None:
    outcome = preflight.judge_nodes([node("new"), node("old", kernel="4.18.0-553.el8")])
    assert outcome.result is Result.FAILED
    assert outcome.details == ["old: kernel 4.18.0-553.el8 is older than 5.4"]


def test_nodes_that_are_not_ready_or_not_linux_are_warned_of() -> None:
    outcome = preflight.judge_nodes([node("w", system="windows"), node("n", ready="False")])
    assert outcome.result is Result.WARNING
    assert outcome.details == [
        "w: windows nodes stay outside the mesh",
        "n: is not ready: the network is not ready",
    ]
    assert preflight.judge_nodes([]).result is Result.WARNING


def test_a_proxy_alone_is_no_sidecar() -> None:
    alone = PodSpec(containers=[Container(name="istio-proxy")])
    beside = PodSpec(containers=[Container(name="app"), Container(name="istio-proxy")])
    pods = [
        Pod(metadata=ObjectMeta(name=name), spec=spec) for name, spec in (("one", alone), ("two", beside))
    ]
    assert [hint.object for hint in sidecars((), pods)] == ["Pod default/two"]
