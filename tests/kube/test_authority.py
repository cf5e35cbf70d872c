"""The authority's Secrets on a real API server: replaced, with revocation lists beside it, of older forms, damaged."""

import base64
import json
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from cryptography import x509

from tests.kube.lab import Lab
from tests.kube.replicas import Mesh, until
from ztunnel.cli.errors import UserError
from ztunnel.cli.kube import authority as renewal
from ztunnel.cli.target import Cluster
from ztunnel.identity import keys
from ztunnel.identity.ca import Authority, pem
from ztunnel.identity.testing import revoke

pytestmark = [pytest.mark.kube, pytest.mark.timeout(300)]

CRL = "ca-crl.pem"
STATE = "istio-ca-state"
NAMES = {"crl": CRL, "state": "state.json"}


@pytest.fixture
def mesh(apiserver: Lab, tmp_path: Path) -> Iterator[Mesh]:
    with Mesh.made(apiserver, tmp_path) as made:
        yield made


def put(mesh: Mesh, name: str, **content: bytes | None) -> None:
    """Change keys of a Secret; None removes one."""
    data = {
        NAMES[key]: None if value is None else base64.b64encode(value).decode()
        for key, value in content.items()
    }
    mesh.api.patch("v1", "Secret", mesh.namespace, name, {"data": data})


def got(mesh: Mesh, kind: str, name: str, key: str, namespace: str = "") -> bytes | None:
    found = mesh.api.get("v1", kind, namespace or mesh.namespace, name)
    value = (found or {}).get("data", {}).get(key)
    return None if value is None else base64.b64decode(value) if kind == "Secret" else value.encode()


async def test_revocation_lists_reach_every_namespace_and_stay_until_withdrawn(mesh: Mesh) -> None:
    own = Authority.create()
    content = {"ca-cert.pem": pem([own.certificate]), "ca-key.pem": keys.to_pem(own.key)}
    first = revoke(own, [own.certificate])
    content |= {"root-cert.pem": own.root_pem, CRL: first}
    data = {name: base64.b64encode(value).decode() for name, value in content.items()}
    metadata = {"name": "cacerts", "namespace": mesh.namespace}
    mesh.api.apply({"apiVersion": "v1", "kind": "Secret", "metadata": metadata, "data": data})
    replica = mesh.replica("istiod")
    await replica.start()

    def told(namespace: str = "") -> bytes | None:
        return got(mesh, "ConfigMap", "istio-ca-crl", CRL, namespace)

    await until(lambda: told() == first, "the list is told")
    other = f"{mesh.namespace}-other"
    mesh.api.apply({"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": other}})
    await until(lambda: told(other) == first, "a new namespace has it")
    mesh.api.patch("v1", "ConfigMap", other, "istio-ca-crl", {"data": {CRL: ""}})
    await until(lambda: told(other) == first, "one that was changed is repaired")
    # What cannot be used, and what is just gone, pardons nobody.
    put(mesh, "cacerts", crl=revoke(Authority.create(), []))
    await replica.logged("is not signed by it")
    put(mesh, "cacerts", crl=b"nonsense")
    await replica.logged("no revocation list in PEM")
    put(mesh, "cacerts", crl=None)
    await replica.logged("an empty one withdraws it")
    assert told() == first
    # Nor does another start: the list in force is kept in the cluster.
    assert replica.stop() == 0
    mesh.api.delete("v1", "ConfigMap", mesh.namespace, "istio-ca-crl")
    await replica.start()
    await until(lambda: told() == first, "it is told again")
    second = revoke(own, [])
    put(mesh, "cacerts", crl=second)
    await until(lambda: told(other) == second, "another list is told")
    put(mesh, "cacerts", crl=b"")
    await until(lambda: told() == told(other) == b"", "an empty one withdraws it")


async def test_the_mesh_own_authority_is_renewed(mesh: Mesh, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(renewal, "SYSTEM", mesh.namespace)
    cluster = Cluster(mesh.lab.kubeconfig)
    with pytest.raises(UserError, match="there is no authority to replace"):
        renewal.renew_authority(cluster, 0.0)
    replica = mesh.replica("istiod")
    await replica.start()
    await until(lambda: mesh.roots(), "the roots are in the namespace")
    (old,) = x509.load_pem_x509_certificates(mesh.roots())
    renewal.renew_authority(cluster, time.time())
    await until(lambda: len(x509.load_pem_x509_certificates(mesh.roots())) == 2, "both roots are told")
    assert old in x509.load_pem_x509_certificates(mesh.roots())
    mesh.api.apply(
        {
            "apiVersion": "v1",
            "kind": "Secret",
            "metadata": {"name": "cacerts", "namespace": mesh.namespace},
        }
    )
    with pytest.raises(UserError, match="your own authority"):
        renewal.renew_authority(cluster, 0.0)


async def test_an_older_state_is_taken_over_and_another_one_is_refused(mesh: Mesh) -> None:
    replica = mesh.replica("istiod")
    await replica.start()
    await until(lambda: mesh.roots(), "the roots are in the namespace")
    assert replica.stop() == 0
    good = got(mesh, "Secret", STATE, "state.json")
    assert good is not None
    older = json.loads(good)
    for name in ("version", "longest", "ends"):
        del older[name]
    put(mesh, STATE, state=json.dumps(older).encode(), crl=None)
    await replica.start()
    assert replica.stop() == 0
    # One of a later version, or without something: not another authority, but a word of what to do.
    for changed, complaint in (
        (json.loads(good) | {"version": 99}, "of a later control plane"),
        ({"version": 1, "authority": older["authority"]}, "the state lacks 'succession'"),
    ):
        put(mesh, STATE, state=json.dumps(changed).encode())
        replica.launch()
        await replica.logged(complaint)
        assert older["authority"]["key"].splitlines()[1] not in replica.log
        replica.kill()
    assert json.loads(got(mesh, "Secret", STATE, "state.json") or b"")["version"] == 1  # nobody wrote it anew
    put(mesh, STATE, state=good, crl=b"nonsense")
    replica.launch()
    await replica.logged("ca-crl.pem: no revocation list")
    # As it is told: once it is mended the process goes on by itself.
    put(mesh, STATE, crl=None)
    await replica.ready()
