"""The certificate authority of a whole mesh: its root is replaced under load, and what it revokes is refused."""

import json
from collections.abc import Iterator
from typing import Any

import pytest
from cryptography import x509

from tests.e2e.whole import Load, WholeMesh, idle, namespace, service, workload
from ztunnel.cli.nodes import nodes
from ztunnel.identity.ca import Authority
from ztunnel.identity.testing import revoke

pytestmark = pytest.mark.e2e
LIMIT = 120.0

RESOURCES = namespace(mode="ambient") + workload("web", node="node-2") + service("web") + idle("client")


@pytest.fixture(scope="module")
def mesh() -> Iterator[WholeMesh]:
    with WholeMesh(RESOURCES) as mesh:
        mesh.wait_pods(mesh=True)
        mesh.until(lambda: mesh.curl_code("client", "http://web/") == 0, "traffic flows")
        yield mesh


def authority(mesh: WholeMesh) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(mesh.ambient("ca status", "-o", "json").stdout)
    return found


def certificates(mesh: WholeMesh) -> list[dict[str, Any]]:
    return [one for node in nodes(mesh.state.path) for one in node.dump("certificates")["certificates"]]


def test_the_root_is_replaced_under_load(mesh: WholeMesh) -> None:
    before = authority(mesh)
    assert before["phase"] == "stable"
    assert "Root CA" in mesh.ok("ca status")
    client, address = mesh.pod("client"), mesh.service("web").addresses[0]
    with (
        mesh.connect(client, mesh.pod("web").addresses[0]) as conversation,
        Load(mesh, client, address, 80, timeout=30) as load,
    ):
        load.wait(20)
        mesh.ok("ca rotate", "--no-wait")
        mesh.until(lambda: authority(mesh)["phase"] == "distributing", "both roots are told", LIMIT)
        refused = mesh.ambient("ca rotate")
        assert refused.returncode == 1
        assert "is being changed already: distributing" in refused.stderr
        mesh.until(lambda: authority(mesh)["phase"] == "stable", "the old root is gone", LIMIT)
        after = authority(mesh)
        mesh.until(
            lambda: (
                {
                    entry["sha256"]
                    for one in certificates(mesh)
                    for entry in one["chain"]
                    if entry["role"] == "root"
                }
                == {after["roots"][0]["sha256"]}
            ),
            "the proxies trust the new root alone",
            LIMIT,
        )
        load.wait(50)
        conversation.talk()
    assert load.failures == []
    assert after["signing"]["sha256"] != before["signing"]["sha256"]
    assert [one["sha256"] for one in after["roots"]] != [one["sha256"] for one in before["roots"]]
    assert len(after["roots"]) == 1
    # The control plane's own certificate went along: a proxy that knows the new root alone connects.
    for node in nodes(mesh.state.path):
        assert node.dump("xds")["xds"]["connected"]


def test_certificates_are_shown_and_keys_never(mesh: WholeMesh) -> None:
    found = certificates(mesh)
    assert {one["identity"] for one in found} == {"spiffe://cluster.local/ns/default/sa/default"}
    assert len(found) == 2, "one a node, however many pods and workers share it"
    for one in found:
        assert one["state"] == "valid"
        assert [entry["role"] for entry in one["chain"]] == ["leaf", "intermediate", "root"]
        assert one["serial"] == one["chain"][0]["serial"]
        assert one["not_after"] == one["chain"][0]["not_after"]
        assert x509.load_pem_x509_certificate(one["chain"][0]["pem"].encode())
    for node in nodes(mesh.state.path):
        assert b"PRIVATE" not in node.get("/config_dump")


def test_a_revocation_list_beside_the_authority(mesh: WholeMesh) -> None:
    client = mesh.pod("client")
    (chain,) = [one["chain"] for one in nodes(mesh.state.path)[0].dump("certificates")["certificates"]]
    leaf = x509.load_pem_x509_certificate(chain[0]["pem"].encode())
    signer = Authority.load_or_create(mesh.state.ca, create=False)
    path = mesh.state.ca / "ca-crl.pem"
    with mesh.connect(client, mesh.pod("web").addresses[0]) as conversation:
        conversation.talk()
        path.write_bytes(b"not a list")
        mesh.until(lambda: bool(authority(mesh)["problems"]), "the mistake is told", LIMIT)
        status = mesh.ambient("ca status")
        assert status.returncode == 1
        assert "no revocation list in PEM" in status.stdout
        conversation.talk()
        path.write_bytes(revoke(signer, [leaf]))
        mesh.until(lambda: not conversation.works(), "the revoked one is cut off", LIMIT)
    mesh.until(lambda: mesh.curl_code("client", "http://web/") != 0, "and gets no other connection", LIMIT)
    (listed,) = nodes(mesh.state.path)[1].dump("revocations")["revocations"]["lists"]
    assert listed["revoked"] == 1
    assert "REVOCATION LIST OF" in mesh.ok("ca status")
    path.write_bytes(b"")
    mesh.until(lambda: mesh.curl_code("client", "http://web/") == 0, "an empty list pardons", LIMIT)
