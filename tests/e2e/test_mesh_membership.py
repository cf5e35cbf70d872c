"""Joining and leaving a running mesh by label: running programs and open connections go on."""

from collections.abc import Iterator
from typing import Any

import pytest

from tests.e2e.whole import (
    HTTP,
    MODE,
    Load,
    WholeMesh,
    alive,
    idle,
    namespace,
    service,
    workload,
)

pytestmark = pytest.mark.e2e

RESOURCES = (
    namespace()
    + namespace("other")
    + workload("web", node="node-2")
    + service("web")
    + service("web-headless", app="web", extra="clusterIP: None")
    + idle("client")
    + idle("apart", labels=f", {MODE}: none")
    + idle("guest", namespace="other", labels=f", {MODE}: ambient")
)


@pytest.fixture(scope="module")
def mesh() -> Iterator[WholeMesh]:
    with WholeMesh(RESOURCES) as mesh:
        mesh.wait_pods()
        yield mesh


def label(mesh: WholeMesh, value: str) -> None:
    """Join (ambient) or leave (nothing), and wait until everybody has."""
    mesh.ok("label", "namespace", "default", f"{MODE}={value}" if value else f"{MODE}-")
    mesh.wait_membership(web=bool(value), client=bool(value), apart=False, guest=True)


@pytest.mark.parametrize("family", [4, 6])
def test_programs_and_connections_go_on_while_pods_join_and_leave(mesh: WholeMesh, family: int) -> None:
    label(mesh, "")
    client, web = mesh.pod("client"), mesh.pod("web")
    address = web.addresses[0 if family == 4 else 1]
    before = mesh.programs()
    assert len(before) == 4
    with mesh.connect(client, address) as outside:
        label(mesh, "ambient")
        outside.talk()
        with mesh.connect(client, address) as inside:
            outside.talk()
            label(mesh, "")
            for _ in range(3):
                inside.talk()
                outside.talk()
            with mesh.connect(client, address) as after:
                label(mesh, "ambient")
                for connection in (outside, inside, after):
                    connection.talk()
    assert mesh.programs() == before
    assert all(map(alive, before.values()))
    assert {pod["restarts"] for pod in mesh.pods()} == {0}
    label(mesh, "")


def test_short_requests_do_not_fail_while_pods_join_and_leave(mesh: WholeMesh) -> None:
    label(mesh, "")
    client, web = mesh.pod("client"), mesh.pod("web")
    vip = mesh.service("web").addresses[0]
    with Load(mesh, client, vip, 80) as by_vip, Load(mesh, client, web.addresses[0], HTTP) as by_address:
        for value in ("ambient", "", "ambient", ""):
            for load in (by_vip, by_address):
                load.wait(20)
            label(mesh, value)
        by_vip.wait(20)
        by_address.wait(20)
    print(f"{len(by_vip.times)} and {len(by_address.times)} requests")
    assert by_vip.failures == []
    assert by_address.failures == []


def test_labels_of_pods(mesh: WholeMesh) -> None:
    label(mesh, "")
    assert mesh.membership()["guest"] is True, "a pod joins by its own label"
    label(mesh, "ambient")
    assert mesh.membership()["apart"] is False, "a pod stays out by its own label"
    web = mesh.pod("web")
    for pod, space, secure in (("guest", "other", True), ("apart", "default", False)):
        found = mesh.curl(pod, f"http://web.default:80/{pod}", "-n", space)
        own = mesh.pod(pod, space)
        assert found.split()[1:3] == [web.name, own.addresses[0]] or found.split()[2] in own.addresses
        policy = "mutual_tls" if secure else "unknown"
        mesh.until(
            lambda policy=policy, own=own: mesh.access_log(  # type: ignore[misc]
                "node-2",
                direction="inbound",
                dst_workload=web.name,
                connection_security_policy=policy,
                **({"src_workload": own.name} if policy == "mutual_tls" else {}),
            ),
            f"the access log says {policy}",
        )
    # Running pods change sides by their own label too.
    mesh.ok("label", "pod", "apart", f"{MODE}-")
    mesh.wait_membership(apart=True)
    mesh.ok("label", "pod", "guest", f"{MODE}=none", "--overwrite", "-n", "other")
    mesh.wait_membership(guest=False)
    for pod, space in (("apart", "default"), ("guest", "other")):
        assert mesh.curl(pod, "http://web.default/", "-n", space).startswith("hello web")
    mesh.ok("label", "pod", "apart", f"{MODE}=none")
    mesh.ok("label", "pod", "guest", f"{MODE}=ambient", "--overwrite", "-n", "other")
    mesh.wait_membership(apart=False, guest=True)


def names(mesh: WholeMesh) -> list[str]:
    """Every way to name the web service in a URL."""
    vips = mesh.service("web").addresses
    assert len(vips) == 2
    return [
        "web",
        "web.default",
        "web.default.svc",
        "web.default.svc.cluster.local",
        *(f"[{vip}]" if ":" in vip else vip for vip in vips),
        f"web-headless:{HTTP}",
        f"web-headless.default.svc.cluster.local:{HTTP}",
    ]


def test_services_by_every_name_and_address_before_and_after_joining(mesh: WholeMesh) -> None:
    client, web = mesh.pod("client"), mesh.pod("web")
    for value in ("", "ambient"):
        label(mesh, value)
        for number, name in enumerate(names(mesh)):
            word, pod, peer, _, _ = mesh.curl("client", f"http://{name}/{number}").split()
            assert (word, pod) == ("hello", web.name)
            assert peer in client.addresses, "the application sees the client pod's own address"
            if not name.startswith("web"):
                assert (":" in peer) == (":" in name)
        outbound = mesh.access_log(
            "node-1", direction="outbound", src_workload="client", dst_workload=web.name
        )
        if not value:
            count = len(outbound)
            continue
        wanted = len(names(mesh))

        def logged(count: int = count, wanted: int = wanted) -> list[dict[str, Any]]:
            found = mesh.access_log(
                "node-1", direction="outbound", src_workload="client", dst_workload=web.name
            )
            return found if len(found) == count + wanted else []

        outbound = mesh.until(logged, "every request is in the access log")[count:]
        assert {entry["connection_security_policy"] for entry in outbound} == {"mutual_tls"}
        assert {entry["src.identity"] for entry in outbound} == {
            "spiffe://cluster.local/ns/default/sa/default"
        }
        assert {entry.get("dst.service") for entry in outbound} >= {"web.default.svc.cluster.local"}
