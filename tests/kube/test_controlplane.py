"""The control plane on a real API server: who gets which certificate, who writes, and what happens when parts go."""

import base64
import signal
import time
import urllib.error
import urllib.request
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import pytest
import trio
import trio_asyncio
from cryptography import x509
from grpclib import GRPCError
from grpclib.const import Status
from grpclib.exceptions import StreamTerminatedError

from tests.kube.lab import Lab, LabError
from tests.kube.replicas import Mesh, Replica, until
from ztunnel.identity import chain, keys
from ztunnel.identity.ca import Authority, pem
from ztunnel.store.kube.api import ApiError

pytestmark = [pytest.mark.kube, pytest.mark.timeout(300)]

CA_FILES = ("ca-cert.pem", "ca-key.pem", "root-cert.pem")


@pytest.fixture
def mesh(apiserver: Lab, tmp_path: Path) -> Iterator[Mesh]:
    with Mesh.made(apiserver, tmp_path) as made:
        yield made


@pytest.fixture
async def asyncio_loop() -> AsyncIterator[None]:
    async with trio_asyncio.open_loop():
        yield


def identity(mesh: Mesh, account: str) -> str:
    return f"spiffe://cluster.local/ns/{mesh.namespace}/sa/{account}"


def request() -> bytes:
    return keys.csr(keys.generate(), "spiffe://cluster.local/ns/any/sa/any")


async def refusal(replica: Replica, token: str, asked: str | None) -> GRPCError:
    with pytest.raises(GRPCError) as refused:
        await replica.sign(token, request(), asked)
    assert len(token) < 40 or token[-20:] not in replica.log
    return refused.value


def san(chain_: list[bytes]) -> list[str]:
    leaf = x509.load_pem_x509_certificate(chain_[0])
    names = leaf.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    return names.get_values_for_type(x509.UniformResourceIdentifier)


def get(address: str, page: str) -> tuple[int, str]:
    try:
        with urllib.request.urlopen(f"http://{address}{page}", timeout=30) as answer:
            return answer.status, answer.read().decode()
    except urllib.error.HTTPError as error:
        return error.code, error.read().decode()


async def test_real_tokens_get_what_is_theirs(mesh: Mesh, asyncio_loop: None) -> None:
    for name, account, node in (
        ("ztunnel-1", "ztunnel", "node-1"),
        ("web", "web", "node-1"),
        ("db", "db", "node-2"),
        ("waypoint", "waypoint", "node-2"),
    ):
        mesh.pod(name, account, node)
    replica = mesh.replica("istiod")
    await replica.start()
    await until(lambda: mesh.roots(), "the roots are in the namespace")
    csr = request()
    proxy = mesh.token("ztunnel", "ztunnel-1")
    # A node proxy: the pods of its own node, and nobody else's.
    assert san(await replica.sign(proxy, csr, identity(mesh, "web"))) == [identity(mesh, "web")]
    error = await refusal(replica, proxy, identity(mesh, "db"))
    assert error.status is Status.PERMISSION_DENIED
    assert "node-1" in str(error.message)
    # A waypoint: its own identity, named or not.
    waypoint = mesh.token("waypoint", "waypoint")
    assert san(await replica.sign(waypoint, csr, None)) == [identity(mesh, "waypoint")]
    error = await refusal(replica, waypoint, identity(mesh, "db"))
    assert error.status is Status.PERMISSION_DENIED
    # What does not prove who one is.
    mesh.pod("gone", "web", "node-1")
    of_gone = mesh.token("web", "gone")
    mesh.remove_pod("gone")
    for token, words in (
        (mesh.token("ztunnel", "ztunnel-1", audience="other"), "not for the audience 'istio-ca'"),
        (mesh.token("ztunnel"), "is not bound to a node"),
        (of_gone, "does not accept the token"),
        (proxy[:-8] + "AAAAAAAA", "does not accept the token"),
        ("token", "not a bound service account token"),
    ):
        error = await refusal(replica, token, identity(mesh, "web"))
        assert error.status is Status.UNAUTHENTICATED, error
        assert words in str(error.message)
    status, page = get(replica.address("/metrics"), "/metrics")
    assert status == 200
    assert "citadel_server_success_cert_issuance_count_total 2.0" in page
    assert "citadel_server_authentication_failure_count_total 5.0" in page


async def test_one_of_two_replicas_writes(mesh: Mesh, asyncio_loop: None) -> None:
    one, two = (
        mesh.replica(name, uid=mesh.pod(name, "istiod", "node-1")) for name in ("istiod-a", "istiod-b")
    )
    await one.start()
    await until(lambda: mesh.holder().startswith("istiod-a_"), "the first leads")
    await two.start()
    await until(lambda: mesh.roots(), "the roots are in the namespace")
    roots = mesh.roots()
    secret = mesh.api.get("v1", "Secret", mesh.namespace, "istio-ca-secret")
    assert secret is not None
    assert base64.b64decode(secret["data"]["ca-cert.pem"]) == roots
    # Both sign with the same authority.
    mesh.pod("waypoint", "waypoint", "node-1")
    token = mesh.token("waypoint", "waypoint")
    for replica in (one, two):
        assert (await replica.sign(token, request(), None))[-1] == roots
    # What is changed or deleted is repaired, a new namespace gets its own.
    mesh.api.patch("v1", "ConfigMap", mesh.namespace, "istio-ca-root-cert", {"data": {"root-cert.pem": "x"}})
    await until(lambda: mesh.roots() == roots, "a ConfigMap that was changed is repaired")
    mesh.api.delete("v1", "ConfigMap", mesh.namespace, "istio-ca-root-cert")
    await until(lambda: mesh.roots() == roots, "a ConfigMap that was deleted is made again")
    new = f"{mesh.namespace}-new"
    mesh.api.apply({"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": new}})
    await until(lambda: mesh.roots(new) == roots, "a new namespace has it")
    # The lease is deleted: the leader makes it again, nobody else takes it.
    mesh.api.delete("coordination.k8s.io/v1", "Lease", mesh.namespace, "istio-leader")
    await until(lambda: mesh.holder().startswith("istiod-a_"), "the lease is there again")
    assert not two.lines(scope="controlplane.leader")
    # The leader is killed: the other follows, once the lease is over, and writes.
    one.kill()
    mesh.remove_pod("istiod-a")
    await until(lambda: mesh.holder().startswith("istiod-b_"), "the other leads")
    mesh.api.delete("v1", "ConfigMap", mesh.namespace, "istio-ca-root-cert")
    await until(lambda: mesh.roots() == roots, "it writes")
    # It ends in order: the lease is given back, so the next has it at once. The authority is the same.
    assert two.stop() == 0
    assert mesh.holder() == ""
    await one.start()
    assert (await one.sign(token, request(), None))[-1] == roots


async def test_an_api_server_that_is_away(mesh: Mesh, asyncio_loop: None) -> None:
    """What was read is served on: the same answers, readiness stays, nothing restarts."""
    mesh.pod("waypoint", "waypoint", "node-1")
    mesh.pod("other", "other", "node-1")
    replica = mesh.replica("istiod")
    await replica.start()
    await until(lambda: mesh.roots(), "the roots are in the namespace")
    token, other = mesh.token("waypoint", "waypoint"), mesh.token("other", "other")
    csr = request()
    roots = mesh.roots()
    before = await replica.sign(token, csr, None)
    await until(lambda: bool(mesh.holder()), "it leads")
    mesh.roots = lambda namespace="": roots  # type: ignore[method-assign]  # (the API server cannot say them)
    mesh.lab.stop_apiserver()
    try:
        await replica.logged("leading no more")
        assert get(replica.address("/ready"), "/ready") == (200, "ready\n")
        after = await replica.sign(token, csr, None)
        assert after[1:] == before[1:]
        # Whom it does not know is told to come again, not that he is nobody.
        error = await refusal(replica, other, None)
        assert error.status is Status.UNAVAILABLE
    finally:
        mesh.lab.start_apiserver()
    await until(lambda: len(replica.lines(message="leading: this replica writes")) == 2, "it leads again")
    await replica.sign(other, csr, None)
    assert replica.process is not None
    assert replica.process.poll() is None


async def test_a_start_without_an_api_server(mesh: Mesh) -> None:
    replica = mesh.replica("istiod")
    mesh.lab.stop_apiserver()
    try:
        replica.launch()
        await replica.logged("cannot read the certificate authority")
        status, text = get(replica.address("/ready"), "/ready")
        assert status == 503
        assert "the certificate authority cannot be read" in text
    finally:
        mesh.lab.start_apiserver()
    await replica.ready()
    assert get(replica.address("/ready"), "/ready")[0] == 200


async def test_a_writer_that_may_not_write(mesh: Mesh) -> None:
    """The others go on; the log names what is missing."""
    role = mesh.api.get(
        "rbac.authorization.k8s.io/v1", "ClusterRole", "", f"istiod-clusterrole-{mesh.namespace}"
    )
    assert role is not None
    rules = [rule for rule in role["rules"] if "configmaps" not in rule["resources"]]
    watched = {"apiGroups": [""], "resources": ["configmaps"], "verbs": ["list", "watch"]}
    mesh.api.patch(
        "rbac.authorization.k8s.io/v1",
        "ClusterRole",
        "",
        role["metadata"]["name"],
        {"rules": [*rules, watched]},
    )
    policy(mesh, "early", {"action": "DENY"})
    replica = mesh.replica("istiod")
    await replica.start()
    await replica.logged("cannot write ConfigMap istio-ca-")  # told once, of whichever came first
    assert "bind a Role or ClusterRole with that verb on that resource" in replica.log
    await until(lambda: condition(mesh, "early"), "the status is written all the same")
    mesh.api.patch(
        "rbac.authorization.k8s.io/v1",
        "ClusterRole",
        "",
        role["metadata"]["name"],
        {"rules": role["rules"]},
    )
    await until(lambda: mesh.roots(), "once it may, it does")


async def test_a_replica_is_killed_while_many_ask(mesh: Mesh, asyncio_loop: None) -> None:
    """Who asks again, elsewhere, gets what he asked for, of the same authority."""
    mesh.pod("ztunnel-1", "ztunnel", "node-1")
    accounts = [f"app-{number}" for number in range(30)]
    for account in accounts:
        mesh.pod(account, account, "node-1")
    replicas = [
        mesh.replica(name, uid=mesh.pod(name, "istiod", "node-1")) for name in ("istiod-a", "istiod-b")
    ]
    for replica in replicas:
        await replica.start()
    await until(lambda: mesh.roots(), "the roots are in the namespace")
    token, roots = mesh.token("ztunnel", "ztunnel-1"), mesh.roots()
    mesh.roots = lambda namespace="": roots  # type: ignore[method-assign]
    signed: dict[str, list[bytes]] = {}

    async def ask(account: str) -> None:
        turn = 0
        while account not in signed:
            try:
                signed[account] = await replicas[turn % 2].sign(token, request(), identity(mesh, account))
            except (OSError, GRPCError, StreamTerminatedError) as error:
                if isinstance(error, GRPCError) and error.status is not Status.UNAVAILABLE:
                    raise
                turn += 1

    async with trio.open_nursery() as nursery:
        for account in accounts:
            nursery.start_soon(ask, account)
        while len(signed) < 5:
            await trio.sleep(0.005)
        replicas[0].kill()
    assert {chain_[-1] for chain_ in signed.values()} == {roots}
    assert [san(signed[account]) for account in accounts] == [
        [identity(mesh, account)] for account in accounts
    ]


def policy(mesh: Mesh, name: str, spec: dict[str, Any]) -> dict[str, Any]:
    return mesh.api.apply(
        {
            "apiVersion": "security.istio.io/v1",
            "kind": "AuthorizationPolicy",
            "metadata": {"name": name, "namespace": mesh.namespace},
            "spec": spec,
        }
    )


def condition(mesh: Mesh, name: str) -> dict[str, Any]:
    found = mesh.api.get("security.istio.io/v1", "AuthorizationPolicy", mesh.namespace, name) or {}
    conditions = (found.get("status") or {}).get("conditions") or [{}]
    return dict(conditions[0])


async def test_what_became_of_policies_is_in_their_status(mesh: Mesh) -> None:
    policy(mesh, "good", {"action": "DENY", "rules": [{"from": [{"source": {"namespaces": ["x"]}}]}]})
    policy(mesh, "http", {"rules": [{"to": [{"operation": {"methods": ["GET"]}}]}]})
    replicas = [mesh.replica(name) for name in ("istiod-a", "istiod-b")]
    for replica in replicas:
        await replica.start()
    await until(lambda: condition(mesh, "good").get("status") == "True", "the good one is accepted")
    await until(lambda: condition(mesh, "http").get("reason") == "UnsupportedValue", "the other is not")
    made = policy(mesh, "good", {"action": "DENY", "rules": []})
    generation = made["metadata"]["generation"]
    await until(
        lambda: condition(mesh, "good").get("observedGeneration") == generation,
        "it is of the last generation",
    )
    assert generation > 1
    # One that has faults is told of where people look.
    policy(mesh, "faulty", {"rules": [{"from": [{"source": {"principals": ["*a*"]}}]}]})
    await until(lambda: condition(mesh, "faulty").get("reason") == "Invalid", "its faults are in its status")
    await until(lambda: "InvalidPolicy" in events(mesh, "faulty"), "and an Event says it")
    # Only the leader writes.
    assert not replicas[1].lines(message="leading: this replica writes")


def events(mesh: Mesh, name: str) -> set[str]:
    path = f"/api/v1/namespaces/{mesh.namespace}/events"
    found = mesh.api.get_json(path, fieldSelector=f"involvedObject.name={name}")
    return {str(one["reason"]) for one in found["items"]}


async def test_two_replicas_change_their_root(mesh: Mesh, asyncio_loop: None) -> None:
    """Any two certificates that are valid at one time are verified by each other's holders, whoever signed them."""
    names = ("istiod-a", "istiod-b")
    replicas = [mesh.replica(name, uid=mesh.pod(name, "istiod", "node-1")) for name in names]
    short = {"DEFAULT_WORKLOAD_CERT_TTL": "10s", "MAX_WORKLOAD_CERT_TTL": "11s"}
    for replica in replicas:
        await replica.start(**short)
    await until(lambda: mesh.roots(), "the roots are in the namespace")
    old = mesh.roots()
    mesh.pod("waypoint", "waypoint", "node-1")
    token, csr = mesh.token("waypoint", "waypoint"), request()
    new = Authority.create()
    content = (pem([new.certificate]), keys.to_pem(new.key), new.root_pem)
    data = {name: base64.b64encode(value).decode() for name, value in zip(CA_FILES, content, strict=True)}
    metadata = {"name": "cacerts", "namespace": mesh.namespace}
    mesh.api.apply({"apiVersion": "v1", "kind": "Secret", "metadata": metadata, "data": data})
    held: list[list[bytes]] = []
    both = False
    killed = False
    with trio.fail_after(200):
        while mesh.roots() != new.root_pem:
            for replica in replicas:
                held.append(await replica.sign(token, csr, None))
            now = time.time()
            leaves = [x509.load_pem_x509_certificate(one[0]) for one in held]
            held = [
                one
                for one, leaf in zip(held, leaves, strict=True)
                if leaf.not_valid_after_utc.timestamp() > now + 1
            ]
            for mine in held:
                for other in held:
                    certificates = [x509.load_pem_x509_certificate(each) for each in mine[:-1]]
                    trusted = x509.load_pem_x509_certificates(other[-1])
                    chain.verify(certificates[0], certificates[1:], trusted, now)
            both = both or len(x509.load_pem_x509_certificates(mesh.roots())) == 2
            if both and not killed:
                # In the midst of it the leader is killed. It comes back with what is in the cluster only.
                killed = True
                leader = next(one for one in replicas if mesh.holder().startswith(f"{one.name}_"))
                leader.kill()
                await leader.start(**short)
            await trio.sleep(0.5)
    assert both
    assert old not in mesh.roots()
    for replica in replicas:
        assert (await replica.sign(token, csr, None))[-1] == new.root_pem


async def test_the_webhook_refuses_what_is_wrong(mesh: Mesh) -> None:
    """The API server asks; what it may refuse begins once that was tried."""
    name = f"istio-validator-{mesh.namespace}"
    replica = mesh.replica("istiod", inside=True)
    await replica.start()
    url = f"https://{replica.address('/validate')}/validate"
    configuration(mesh, name, url)
    try:
        await until(lambda: policies_of(mesh, name) == {"Fail"}, "it may refuse")
        policy(mesh, "good", {"action": "DENY", "rules": []})
        with pytest.raises(ApiError) as refused:
            policy(mesh, "bad", {"rules": [{"from": [{"source": {"principals": ["*a*"]}}]}]})
        for words in (
            f"AuthorizationPolicy {mesh.namespace}/bad",
            "spec.rules[0].from[0].source.principals[0]",
        ):
            assert words in str(refused.value)
        with pytest.raises(LabError, match="portLevelMtls: is only possible together with a selector"):
            mesh.lab.kubectl(
                "apply", "--dry-run=server", "-f", "-",
                stdin=f"""
apiVersion: security.istio.io/v1
kind: PeerAuthentication
metadata: {{name: ports, namespace: {mesh.namespace}}}
spec: {{portLevelMtls: {{"8080": {{mode: STRICT}}}}}}
""",
            )  # fmt: skip
        assert mesh.api.get("security.istio.io/v1", "PeerAuthentication", mesh.namespace, "ports") is None
        # Somebody writes another authority's certificate: it is put right.
        found = configuration(mesh, name, url)
        assert found["webhooks"][0]["failurePolicy"] == "Ignore"
        await until(lambda: policies_of(mesh, name) == {"Fail"}, "it is put right")
        # It does not answer in time: as if it had refused.
        process = replica.process
        assert process is not None
        process.send_signal(signal.SIGSTOP)
        try:
            with pytest.raises(ApiError, match="failed calling webhook"):
                policy(mesh, "unseen", {"action": "DENY", "rules": []})
        finally:
            process.send_signal(signal.SIGCONT)
        await until(lambda: written(mesh, "late"), "it answers again")
        # Nobody there: nothing is written that nobody has looked at; what is written already counts on.
        replica.kill()
        with pytest.raises(ApiError, match="failed calling webhook"):
            policy(mesh, "unseen", {"action": "DENY", "rules": []})
    finally:
        mesh.api.delete("admissionregistration.k8s.io/v1", "ValidatingWebhookConfiguration", "", name)


def written(mesh: Mesh, name: str) -> bool:
    try:
        policy(mesh, name, {"action": "DENY", "rules": []})
    except ApiError:
        return False
    return True


def configuration(mesh: Mesh, name: str, url: str) -> dict[str, Any]:
    """As the manifests have it, for this namespace only, and by address: there is no Service here."""
    space = {"matchLabels": {"kubernetes.io/metadata.name": mesh.namespace}}
    rule = {
        "apiGroups": ["security.istio.io"],
        "apiVersions": ["*"],
        "operations": ["CREATE", "UPDATE"],
        "resources": ["*"],
        "scope": "Namespaced",
    }
    return mesh.api.apply(
        {
            "apiVersion": "admissionregistration.k8s.io/v1",
            "kind": "ValidatingWebhookConfiguration",
            "metadata": {"name": name},
            "webhooks": [
                {
                    "name": "rev.validation.istio.io",
                    "admissionReviewVersions": ["v1"],
                    "clientConfig": {"url": url},
                    "failurePolicy": "Ignore",
                    "sideEffects": "None",
                    "timeoutSeconds": 5,
                    "namespaceSelector": space,
                    "rules": [rule],
                }
            ],
        }
    )


def policies_of(mesh: Mesh, name: str) -> set[str]:
    found = mesh.api.get("admissionregistration.k8s.io/v1", "ValidatingWebhookConfiguration", "", name)
    return {str(one["failurePolicy"]) for one in (found or {}).get("webhooks", [])}
