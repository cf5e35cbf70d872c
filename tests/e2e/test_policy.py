"""Connection policies, with real connections: who gets through, who does not, and what becomes of open connections."""

import os
import signal
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from ipaddress import ip_address
from typing import Any

import pytest

from tests.e2e.conftest import HTTP, Mesh, address
from tests.proxy.meshlab import identity_of
from ztunnel.embedded.testing import LabPod, until
from ztunnel.mesh.policy import (
    Action,
    Authorization,
    Cidr,
    Clause,
    Match,
    MatchKind,
    PolicyScope,
    Rule,
    ServiceAccount,
    StringMatch,
)
from ztunnel.proxy import distribution

pytestmark = pytest.mark.e2e

GENEROUS = 30.0  # seconds for what takes a moment


@pytest.fixture(autouse=True)
def no_policies_after(mesh: Mesh) -> Iterator[None]:
    yield
    mesh.lab.policies(removed=tuple(mesh.lab.nodes[2].workers.policies.store.keys()))
    mesh.lab.describe(mesh.server, hbone=True)


def answer(client: LabPod, host: str, port: int = HTTP) -> str:
    """What a request gets: the status, or "reset"."""
    try:
        with client.connect(host, port, timeout=GENEROUS) as sock:
            sock.sendall(b"GET / HTTP/1.1\r\nHost: web\r\nConnection: close\r\n\r\n")
            received = b""
            while chunk := sock.recv(65536):
                received += chunk
    except (ConnectionResetError, BrokenPipeError):
        return "reset"
    return received.split(b" ", 2)[1].decode()


@contextmanager
def connection(client: LabPod, server: LabPod) -> Iterator[tuple[socket.socket, socket.socket]]:
    """An open connection through the mesh: the client's socket and the server's."""
    with server.listen(0) as listener:
        listener.settimeout(GENEROUS)
        sock = client.connect(server.ip4, listener.getsockname()[1], timeout=GENEROUS)
        accepted, _ = listener.accept()
    with sock, accepted:
        accepted.settimeout(GENEROUS)
        sock.sendall(b"ping")
        assert accepted.recv(4) == b"ping"
        yield sock, accepted


def alive(sock: socket.socket, accepted: socket.socket) -> bool:
    sock.sendall(b"still")
    received = b""
    while len(received) < 5:
        received += accepted.recv(5 - len(received))
    return received == b"still"


def was_reset(sock: socket.socket) -> bool:
    with pytest.raises(ConnectionResetError):
        sock.recv(1)
    return True


def log_of(mesh: Mesh, node: int, **fields: Any) -> dict[str, Any]:
    """The access log's last line with these fields, waited for."""

    def find() -> dict[str, Any] | None:
        lines = [line for line in mesh.lab.nodes[node].access_log() if fields.items() <= line.items()]
        return lines[-1] if lines else None

    found: dict[str, Any] = until(find, f"a line with {fields}", GENEROUS)
    return found


def policy(action: Action, *matches: Match, **fields: Any) -> Authorization:
    """A policy of namespace default; a rule for each match."""
    values: dict[str, Any] = {"name": "p", "namespace": "default", "scope": PolicyScope.NAMESPACE}
    rules = tuple(Rule((Clause((match,)),)) for match in matches)
    return Authorization(**(values | fields), action=action, rules=rules)


def text(kind: MatchKind, value: str = "") -> tuple[StringMatch]:
    return (StringMatch(kind, value),)


PRESENCE = text(MatchKind.PRESENCE)
EVERYTHING = Match(not_destination_ports=(1,))
STRICT = policy(Action.DENY, Match(not_principals=PRESENCE), name="strict")


def blocks(*pods: LabPod) -> tuple[Cidr, ...]:
    return tuple(Cidr.of(ip_address(pod.ip4).packed, 32) for pod in pods)


# A match, and whether the mesh's client and the one outside meet it. The fields of addresses come with the mesh.
FIELDS: list[tuple[str, dict[str, Any], bool, bool]] = [
    ("principal", {"principals": text(MatchKind.EXACT, "cluster.local/ns/default/sa/client")}, True, False),
    ("other principal", {"principals": text(MatchKind.EXACT, "cluster.local/ns/default/sa/x")}, False, False),
    ("principal prefix", {"principals": text(MatchKind.PREFIX, "cluster.local/ns/default/")}, True, False),
    ("principal suffix", {"principals": text(MatchKind.SUFFIX, "/sa/client")}, True, False),
    ("principal presence", {"principals": PRESENCE}, True, False),
    ("not principal", {"not_principals": text(MatchKind.SUFFIX, "/sa/client")}, False, True),
    ("no principal", {"not_principals": PRESENCE}, False, True),
    ("namespace", {"namespaces": text(MatchKind.EXACT, "default")}, True, False),
    ("other namespace", {"namespaces": text(MatchKind.PREFIX, "x")}, False, False),
    ("not namespace", {"not_namespaces": text(MatchKind.EXACT, "default")}, False, True),
    ("service account", {"service_accounts": (ServiceAccount("default", "client"),)}, True, False),
    ("not service account", {"not_service_accounts": (ServiceAccount("default", "client"),)}, False, True),
    ("source", {"source_ips": "client"}, True, False),
    ("not source", {"not_source_ips": "client"}, False, True),
    ("destination", {"destination_ips": "server"}, True, True),
    ("not destination", {"not_destination_ips": "server"}, False, False),
    ("port", {"destination_ports": (HTTP, 9)}, True, True),
    ("other port", {"destination_ports": (9,)}, False, False),
    ("not port", {"not_destination_ports": (HTTP,)}, False, False),
    ("two fields", {"namespaces": text(MatchKind.EXACT, "default"), "destination_ports": (9,)}, False, False),
]


@pytest.mark.parametrize(
    ("fields", "client", "outsider"), [case[1:] for case in FIELDS], ids=[case[0] for case in FIELDS]
)
def test_every_field_decides(mesh: Mesh, fields: dict[str, Any], client: bool, outsider: bool) -> None:
    pods = {"client": mesh.client, "server": mesh.server}
    values: dict[str, Any] = {
        name: blocks(pods[value]) if isinstance(value, str) else value for name, value in fields.items()
    }
    match = Match(**values)
    host = mesh.server.ip4
    mesh.lab.policies(policy(Action.ALLOW, match))
    got = [answer(mesh.client, host), answer(mesh.outside_client, host)]
    assert got == ["200" if client else "reset", "200" if outsider else "reset"]
    mesh.lab.policies(policy(Action.DENY, match))
    got = [answer(mesh.client, host), answer(mesh.outside_client, host)]
    assert got == ["reset" if client else "200", "reset" if outsider else "200"]


@pytest.mark.parametrize("family", [4, 6])
def test_strict_refuses_plaintext_and_the_log_names_the_policy(mesh: Mesh, family: int) -> None:
    name = f"strict-{family}"
    mesh.lab.policies(policy(Action.DENY, Match(not_principals=PRESENCE), name=name))
    host = address(mesh.server, family)
    assert answer(mesh.client, host) == "200"
    assert answer(mesh.outside_client, host) == "reset"
    error = f"connection closed due to policy rejection: explicitly denied by: default/{name} (rule 0)"
    line = log_of(mesh, 2, error=error)
    assert line["direction"] == "inbound"
    assert line["dst.workload"] == "server"
    assert address(mesh.outside_client, family) in line["src.addr"]
    assert "src.identity" not in line


def test_a_caller_is_denied_by_identity_with_401(mesh: Mesh) -> None:
    caller = text(MatchKind.EXACT, "cluster.local/ns/default/sa/client")
    mesh.lab.policies(
        policy(Action.DENY, Match(destination_ports=(9,)), Match(principals=caller), name="no-client")
    )
    assert answer(mesh.client, mesh.server.ip4) == "reset"
    error = "connection closed due to policy rejection: explicitly denied by: default/no-client (rule 1)"
    line = log_of(mesh, 2, error=error)
    assert line["src.identity"] == identity_of(mesh.client)
    assert line["dst.addr"] == f"{mesh.server.ip4}:{HTTP}"
    until(
        lambda: any("(HTTP 401)" in line.get("error", "") for line in mesh.lab.nodes[1].access_log()),
        "the caller's own proxy says why",
        GENEROUS,
    )


def test_an_allow_policy_without_rules_denies_all(mesh: Mesh) -> None:
    mesh.lab.policies(policy(Action.ALLOW))
    assert answer(mesh.client, mesh.server.ip4) == "reset"
    assert answer(mesh.outside_client, mesh.server.ip4) == "reset"
    error = "connection closed due to policy rejection: allow policies exist, but none allowed"
    assert log_of(mesh, 2, error=error)


def test_whom_a_policy_concerns(mesh: Mesh) -> None:
    """The whole mesh, its namespace, or who lists it."""
    host = mesh.server.ip4
    mesh.lab.policies(
        policy(Action.DENY, EVERYTHING, name="theirs", namespace="other"),
        policy(Action.DENY, EVERYTHING, name="listed", scope=PolicyScope.WORKLOAD_SELECTOR),
    )
    assert answer(mesh.client, host) == "200"
    workload = mesh.lab.workload(mesh.server, True, policies=("default/listed",))
    mesh.lab.change(mesh.lab.state.upsert_workload(workload))
    until(lambda: answer(mesh.client, host) == "reset", "the listed policy counts", GENEROUS)
    mesh.lab.describe(mesh.server, hbone=True)
    until(lambda: answer(mesh.client, host) == "200", "it does not any more", GENEROUS)
    everywhere = policy(Action.DENY, EVERYTHING, namespace="istio-system", scope=PolicyScope.GLOBAL)
    mesh.lab.policies(everywhere)
    assert answer(mesh.client, host) == "reset"
    mesh.lab.policies(removed=(everywhere.key,))
    assert answer(mesh.client, host) == "200"


def test_a_change_ends_the_open_connections_that_it_no_longer_allows(mesh: Mesh) -> None:
    with (
        connection(mesh.client, mesh.server) as (meshed, at_server),
        connection(mesh.outside_client, mesh.server) as (plain, plain_at_server),
    ):
        mesh.lab.policies(STRICT)
        assert was_reset(plain)
        assert was_reset(plain_at_server)
        error = "connection closed due to policy change: explicitly denied by: default/strict (rule 0)"
        assert log_of(mesh, 2, error=error)["bytes_sent"] == 4
        # The other one is allowed still; and what shares a tunnel with one that is not.
        assert alive(meshed, at_server)
        with connection(mesh.client, mesh.server) as (other, other_at_server):
            port = other_at_server.getsockname()[1]
            mesh.lab.policies(policy(Action.DENY, Match(destination_ports=(port,)), name="port"))
            assert was_reset(other)
            assert was_reset(other_at_server)
            error = "connection closed due to policy change: explicitly denied by: default/port (rule 0)"
            assert log_of(mesh, 2, error=error)["src.identity"] == identity_of(mesh.client)
            assert alive(meshed, at_server)


def test_a_pod_that_left_is_judged_while_its_connections_last(mesh: Mesh) -> None:
    lab = mesh.lab
    pod = lab.join(lab.pod("leaving", 2))
    with connection(mesh.outside_client, pod) as (sock, accepted):
        lab.leave(pod)
        assert alive(sock, accepted)
        lab.policies(STRICT)
        assert was_reset(sock)


def test_a_listed_policy_that_has_not_come_keeps_the_pod_closed(
    mesh: Mesh, monkeypatch: pytest.MonkeyPatch
) -> None:
    host = mesh.server.ip4
    monkeypatch.setattr(distribution, "SETTLE", 0.2)
    with connection(mesh.client, mesh.server) as (sock, accepted):
        workload = mesh.lab.workload(mesh.server, True, policies=("default/late",))
        mesh.lab.change(mesh.lab.state.upsert_workload(workload))
        until(lambda: answer(mesh.client, host) == "reset", "nobody comes in", GENEROUS)
        assert answer(mesh.outside_client, host) == "reset"
        reason = "default/late: the workload lists it, and the control plane has not sent it yet"
        assert log_of(mesh, 2, error=f"connection closed due to policy rejection: {reason}")
        # Nobody knows yet whether who is in may stay.
        assert alive(sock, accepted)
        allowed = Match(not_destination_ports=(accepted.getsockname()[1],))
        late = policy(Action.ALLOW, allowed, name="late", scope=PolicyScope.WORKLOAD_SELECTOR)
        mesh.lab.policies(late)
        assert was_reset(sock)
        assert answer(mesh.client, host) == "200"
    # Removed although it is listed still: the control plane said that there is none.
    mesh.lab.policies(removed=("default/late",))
    assert answer(mesh.client, host) == "200"


def test_a_pod_of_which_nothing_is_known_waits_and_is_closed_after_that(
    mesh: Mesh, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(distribution, "SETTLE", 1.0)
    lab = mesh.lab
    pod = lab.pod("new", 2)
    lab.join(pod)
    lab.change(lab.state.remove(f"Kubernetes//Pod/{pod.namespace}/{pod.name}"))
    lab.nodes[2].call(lab.nodes[2].workers.delete_pod, pod.uid)
    with pod.listen(HTTP) as listener:
        listener.settimeout(GENEROUS)
        lab.join_unknown(pod)
        # In plaintext, since nobody knows of the pod. First they wait, then they are refused.
        with mesh.outside_client.connect(pod.ip4, HTTP, timeout=GENEROUS) as sock:
            assert was_reset(sock)
        reason = f"the control plane has not told of the workload default/{pod.name} yet"
        assert log_of(mesh, 2, error=f"connection closed due to policy rejection: {reason}")
        lab.describe(pod, hbone=True)
        until(lambda: _accepted(mesh.outside_client, pod, listener), "it is served", GENEROUS)
    lab.leave(pod)


def _accepted(client: LabPod, pod: LabPod, listener: socket.socket) -> bool:
    try:
        with client.connect(pod.ip4, HTTP, timeout=GENEROUS) as sock:
            listener.settimeout(1)
            with listener.accept()[0]:
                sock.sendall(b"x")
                return True
    except (ConnectionResetError, TimeoutError):
        return False


def test_a_dry_run_changes_nothing_and_is_told(mesh: Mesh) -> None:
    rehearsed = policy(Action.DENY, Match(principals=PRESENCE), name="later", dry_run=True)
    mesh.lab.policies(rehearsed)
    with connection(mesh.client, mesh.server) as (sock, accepted):
        assert answer(mesh.client, mesh.server.ip4) == "200"
        assert answer(mesh.outside_client, mesh.server.ip4) == "200"
        told = "would be refused: explicitly denied by: default/later (rule 0)"
        line = log_of(mesh, 2, dry_run=told)
        assert line["src.identity"] == identity_of(mesh.client)
        assert "error" not in line
        plain = [one for one in recent(mesh) if not one["src_identity"]]
        assert all(not one["dry_run"] for one in plain)
        mesh.lab.policies(rehearsed)
        assert alive(sock, accepted)


def recent(mesh: Mesh) -> list[dict[str, Any]]:
    """What the workers of the server's node judged lately."""
    node = mesh.lab.nodes[2]
    answers = node.call(node.workers.inspections.ask, "recent")
    assert all(not one.error for one in answers), answers
    return [item for one in answers for part in one.items for item in part]


def test_what_was_judged_lately_is_told(mesh: Mesh) -> None:
    mesh.lab.policies(policy(Action.DENY, Match(not_principals=PRESENCE), name="told"))
    for _ in range(3):
        assert answer(mesh.client, mesh.server.ip4) == "200"
    assert answer(mesh.outside_client, mesh.server.ip4) == "reset"
    found = [one for one in recent(mesh) if one["dst_port"] == HTTP and one["dst_addr"] == mesh.server.ip4]
    allowed = [
        one
        for one in found
        if one["src_identity"] == identity_of(mesh.client) and one["verdict"] == "allowed"
    ]
    assert sum(one["count"] for one in allowed) >= 3
    (first, *_) = allowed
    assert first["src_addr"] == mesh.client.ip4
    assert (first["src_workload"], first["dst_workload"], first["dst_namespace"]) == (
        "client",
        "server",
        "default",
    )
    (denied,) = [one for one in found if one["policy"] == "default/told"]
    assert (denied["verdict"], denied["rule"], denied["src_identity"]) == ("denied", 0, "")
    assert denied["src_addr"] == mesh.outside_client.ip4
    assert denied["count"] == 1
    assert denied["time"] > 0


def test_a_new_worker_enforces_what_the_dead_one_did(mesh: Mesh) -> None:
    """Of more policies than a message has."""
    mesh.lab.policies(
        *(policy(Action.DENY, Match(destination_ports=(9,)), name=f"p{number}") for number in range(250)),
        policy(Action.DENY, Match(not_principals=PRESENCE), name="zz"),
    )
    node = mesh.lab.nodes[2]
    before = node.call_sync(node.workers.describe)
    for one in before:
        os.kill(one["pid"], signal.SIGKILL)
    until(
        lambda: all(
            one["pid"] and one["restarts"] > old["restarts"]
            for one, old in zip(node.call_sync(node.workers.describe), before, strict=True)
        ),
        "the workers run again",
        GENEROUS,
    )
    for _ in range(8):
        assert answer(mesh.client, mesh.server.ip4) == "200"
        assert answer(mesh.outside_client, mesh.server.ip4) == "reset"
