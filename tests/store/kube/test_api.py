"""Requests to an API server: what is sent, which errors people read, and streams that end when they are told to."""

import contextlib
import datetime
import ipaddress
import os
import queue
import re
import socket
import ssl
import struct
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

from tests.store.kube.server import CORE, Answer, Handler, Request, failure, serving
from ztunnel.cli.kube.sockets import open_socket
from ztunnel.store.kube.api import Api, ApiError, NoSuchKind

SECRET = "s3cr3t-t0k3n"


def with_core(handle: Handler) -> Handler:
    def both(request: Request) -> Answer:
        if request.path == "/api/v1":
            return Answer(body=CORE)
        if request.path.startswith("/apis/") and request.path.count("/") == 3:
            return failure(404, "NotFound", "the server could not find the requested resource")
        return handle(request)

    return both


def error_of(api: Api, path: str = "/api/v1/namespaces/default/pods/a", method: str = "GET") -> ApiError:
    with pytest.raises(ApiError) as caught:
        api.request(method, path)
    return caught.value


def test_an_error_names_what_was_asked_and_the_remedy_and_no_token() -> None:
    answers = {
        403: failure(403, "Forbidden", 'pods "a" is forbidden: User "u" cannot get resource "pods"'),
        404: failure(404, "NotFound", 'pods "a" not found'),
        409: failure(409, "Conflict", "the object has been modified"),
        410: failure(410, "Expired", "too old resource version"),
        500: Answer(500, b"boom \xff"),
    }
    status = 0
    with serving(lambda request: answers[status]) as fake:
        api = fake.api(SECRET)
        found = {}
        for status in answers:
            found[status] = error_of(api)
            assert SECRET not in str(found[status])
        assert all(request.headers["Authorization"] == f"Bearer {SECRET}" for request in fake.requests)
    assert found[403].forbidden
    assert 'cannot get resource "pods"' in str(found[403])
    assert "Role" in str(found[403])
    assert found[404].not_found
    assert found[409].conflict
    assert found[410].gone
    assert found[410].reason == "Expired"
    assert found[500].transient
    assert "boom" in str(found[500])


def test_what_is_refused_of_a_secret_is_not_quoted() -> None:
    told = failure(422, "Invalid", 'Secret "x" is invalid: data: "hunter2"')
    with serving(lambda request: told) as fake:
        error = error_of(fake.api(), "/api/v1/namespaces/default/secrets/x", "PUT")
    assert "hunter2" not in str(error)
    assert error.status == 422


def test_a_server_that_is_not_there_is_named_with_the_cause() -> None:
    with serving(lambda request: Answer(body={})) as fake:
        api = fake.api()
    error = error_of(api)
    assert error.unreachable
    assert fake.url in str(error)
    assert "refused" in str(error).lower()


def test_an_answer_that_does_not_come_is_not_waited_for() -> None:
    done = threading.Event()

    def late(request: Request) -> Answer:
        done.wait(60)
        return Answer(body={})

    with serving(late) as fake:
        with pytest.raises(ApiError, match="no answer in time"):
            fake.api().request("GET", "/api/v1/pods", timeout=0.1)
        done.set()


def test_a_connection_that_the_server_closed_meanwhile_is_made_again_for_what_may_be_asked_twice() -> None:
    count = {"GET": 0, "POST": 0}

    def handle(request: Request) -> Answer:
        count[request.method] += 1
        return Answer(0) if count[request.method] == 1 else Answer(body={"a": 1})

    with serving(handle) as fake:
        assert fake.api().get_json("/api/v1/pods") == {"a": 1}
        assert error_of(fake.api(), method="POST").unreachable
    assert count == {"GET": 2, "POST": 1}


def test_a_busy_server_is_asked_again_when_it_says() -> None:
    answers = [failure(429, "TooManyRequests", "slow down", Retry_After="0.05"), Answer(body={"ok": True})]
    with serving(lambda request: answers.pop(0)) as fake:
        assert fake.api().get_json("/x") == {"ok": True}
    answers = [failure(429, "TooManyRequests", "slow down", Retry_After="3600")]
    with serving(lambda request: answers.pop(0)) as fake:
        assert error_of(fake.api()).status == 429


@pytest.mark.parametrize("asked", ["inf", "1e12", "nan", "-1", "Wed, 21 Oct 2026 07:28:00 GMT"])
def test_nobody_on_the_way_can_have_the_server_forgotten(asked: str) -> None:
    with serving(lambda request: failure(503, "ServiceUnavailable", "later", Retry_After=asked)) as fake:
        with pytest.raises(ApiError) as caught:
            fake.api().stream("/api/v1/pods")
        assert 0 <= caught.value.retry_after <= 300


def test_paths_come_from_what_the_server_says_it_serves() -> None:
    with serving(with_core(lambda request: Answer(body={}))) as fake:
        api = fake.api()
        assert api.path("v1", "Pod") == "/api/v1/pods"
        assert api.path("v1", "Pod", "a", "b", "status") == "/api/v1/namespaces/a/pods/b/status"
        assert api.path("v1", "Node", "ignored", "n1") == "/api/v1/nodes/n1"
        assert api.path("v1", "Pod", "../x", "a/b") == "/api/v1/namespaces/..%2Fx/pods/a%2Fb"
        assert len(fake.requests) == 1
        with pytest.raises(ApiError, match="in no namespace"):
            api.path("v1", "Pod", "", "b")
        with pytest.raises(NoSuchKind, match="CustomResourceDefinition"):
            api.path("example.org/v1", "Thing")
        assert not api.serves("example.org/v1", "Thing")
        assert api.serves("v1", "Service")


def test_a_kind_that_comes_later_is_found() -> None:
    there = False

    def handle(request: Request) -> Answer:
        if not there:
            return failure(404, "NotFound", "no")
        return Answer(body={"resources": [{"name": "things", "kind": "Thing", "namespaced": True}]})

    with serving(handle) as fake:
        api = fake.api()
        assert not api.serves("example.org/v1", "Thing")
        there = True
        assert api.serves("example.org/v1", "Thing")


def test_apply_is_server_side() -> None:
    with serving(with_core(lambda request: Answer(body=request.json))) as fake:
        obj = {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "a"}}
        assert fake.api().apply(obj, dry_run=True) == obj
        sent = fake.requests[-1]
    assert (sent.method, sent.path) == ("PATCH", "/api/v1/namespaces/team/pods/a")
    assert sent.query == {"fieldManager": "ambient", "force": "true", "dryRun": "All"}
    assert sent.headers["Content-Type"] == "application/apply-patch+yaml"


def test_an_error_of_apply_names_the_object() -> None:
    refused = failure(422, "Invalid", "spec.containers: Required value")
    with serving(with_core(lambda request: refused)) as fake, pytest.raises(ApiError) as caught:
        fake.api().apply({"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "a", "namespace": "ns"}})
    assert str(caught.value).startswith("Pod ns/a: ")
    assert "spec.containers: Required value" in str(caught.value)


def test_delete_says_whether_there_was_one() -> None:
    answers = [Answer(body={}), failure(404, "NotFound", "no"), failure(409, "Conflict", "uid")]
    with serving(with_core(lambda request: answers.pop(0))) as fake:
        api = fake.api()
        assert api.delete("v1", "Pod", "a", "b", propagation="Foreground")
        assert fake.requests[-1].json["propagationPolicy"] == "Foreground"
        assert not api.delete("v1", "Pod", "a", "b")
        assert not api.delete("v1", "Pod", "a", "b", uid="1")
        assert not api.delete("example.org/v1", "Thing", "a", "b")


def test_a_patch_that_met_another_change_is_tried_again_unless_it_is_pinned() -> None:
    conflict = failure(409, "Conflict", "modified")
    answers = [conflict, conflict, Answer(body={"metadata": {}}), conflict]
    with serving(with_core(lambda request: answers.pop(0))) as fake:
        fake.api().patch("v1", "Pod", "a", "b", {"status": {}}, "status")
        assert fake.requests[-1].path == "/api/v1/namespaces/a/pods/b/status"
        with pytest.raises(ApiError) as caught:
            fake.api().patch("v1", "Pod", "a", "b", {"metadata": {"resourceVersion": "1"}})
    assert caught.value.conflict
    assert not answers


def test_a_list_is_read_in_pages_and_once_more_whole_if_it_took_too_long() -> None:
    def page(*names: str, following: str = "") -> Answer:
        items = [{"metadata": {"name": name}} for name in names]
        return Answer(body={"metadata": {"continue": following}, "items": items})

    answers = [page("a", "b", following="x"), page("c")]
    with serving(with_core(lambda request: answers.pop(0))) as fake:
        found = fake.api().list("v1", "Pod", "ns", "app=x", limit=2)
        assert [each["metadata"]["name"] for each in found] == ["a", "b", "c"]
        assert found[0]["kind"] == "Pod"
        assert fake.requests[-1].query == {"labelSelector": "app=x", "limit": "2", "continue": "x"}
        answers += [page("a", following="x"), failure(410, "Expired", "old"), page("a", "b", "c")]
        assert len(fake.api().list("v1", "Pod", "ns", limit=1)) == 3
        assert fake.requests[-1].query == {"limit": "0"}


def test_lines_come_as_they_are_sent_whatever_the_chunks() -> None:
    chunks: queue.Queue[bytes | None] = queue.Queue()
    big = b"x" * 1_000_000
    for chunk in (b'{"a"', b":1}\n\n{", b'"b":2}\n' + big[:10], big[10:], b"\nlast", None):
        chunks.put(chunk)
    with serving(lambda request: Answer(chunks=chunks)) as fake:
        lines = list(fake.api().stream("/watch", {"watch": "1"}))
        assert fake.requests[0].query == {"watch": "1"}
    assert lines == [b'{"a":1}', b'{"b":2}', big, b"last"]


def test_a_stream_that_is_refused_raises_what_the_server_said() -> None:
    with (
        serving(lambda request: failure(410, "Expired", "too old")) as fake,
        pytest.raises(ApiError) as caught,
    ):
        fake.api().stream("/watch")
    assert caught.value.gone


def test_a_stream_is_closed_by_another_thread_at_once() -> None:
    chunks: queue.Queue[bytes | None] = queue.Queue()
    chunks.put(b"one\n")
    with serving(lambda request: Answer(chunks=chunks)) as fake:
        stream = fake.api().stream("/watch")
        seen: list[bytes] = []
        first = threading.Event()

        def read() -> None:
            for line in stream:
                seen.append(line)
                first.set()

        reader = threading.Thread(target=read, daemon=True)
        reader.start()
        assert first.wait(60)
        stream.close()
        reader.join(60)
        assert not reader.is_alive()
        assert seen == [b"one"]
        chunks.put(None)
        assert list(stream) == []


def test_a_stream_that_breaks_or_falls_silent_says_so() -> None:
    chunks: queue.Queue[bytes | None] = queue.Queue()
    chunks.put(b"one\n")
    with serving(lambda request: Answer(chunks=chunks)) as fake:
        lines = iter(fake.api().stream("/watch", silence=0.2))
        assert next(lines) == b"one"
        with pytest.raises(ApiError, match="timed out") as caught:
            next(lines)
        chunks.put(None)
    assert caught.value.unreachable


def test_an_event_is_sent_once_and_then_counted() -> None:
    stored: dict[str, dict[str, object]] = {}

    def handle(request: Request) -> Answer:
        name = request.path.rpartition("/")[2]
        if request.method == "POST":
            name = request.json["metadata"]["name"]
            if name in stored:
                return failure(409, "AlreadyExists", "there")
            stored[name] = request.json
        elif name not in stored:
            return failure(404, "NotFound", "no")
        elif request.method == "PATCH":
            stored[name].update(request.json)
        return Answer(body=stored[name])

    pod = {"apiVersion": "v1", "kind": "Pod", "namespace": "ns", "name": "a", "uid": "1"}
    with serving(handle) as fake:
        api = fake.api()
        for _ in range(3):
            api.event(pod, reason="NotJoined", message="no rules")
        api.event(pod, reason="Joined", message="in", type="Normal")
        fake.api().event(pod, reason="NotJoined", message="no rules")  # after a restart
        assert sorted(str(each["count"]) for each in stored.values()) == ["1", "4"]
        stored.clear()  # the API server keeps events for an hour
        api.event(pod, reason="NotJoined", message="no rules")
        (event,) = stored.values()
        assert event["count"] == 1
        assert event["involvedObject"] == pod
        assert fake.requests[-1].path == "/api/v1/namespaces/ns/events"


def test_many_threads_share_one_api() -> None:
    with serving(with_core(lambda request: Answer(body={"path": request.path}))) as fake:
        api = fake.api()
        wrong: list[object] = []

        def ask(number: int) -> None:
            for index in range(20):
                path = f"/x/{number}/{index}"
                answer = api.get_json(path)
                if answer != {"path": path}:
                    wrong.append(answer)

        threads = [threading.Thread(target=ask, args=(number,)) for number in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(60)
        assert not wrong
        assert len(fake.requests) == 160


class Authority:
    """A CA with a server certificate for 127.0.0.1, as files."""

    def __init__(self, folder: Path, name: str) -> None:
        now = datetime.datetime.now(datetime.UTC)
        key, own = ec.generate_private_key(ec.SECP256R1()), ec.generate_private_key(ec.SECP256R1())
        subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])
        base = (
            x509.CertificateBuilder()
            .issuer_name(subject)
            .not_valid_before(now - datetime.timedelta(days=1))
            .not_valid_after(now + datetime.timedelta(days=1))
        )
        root = (
            base.subject_name(subject)
            .public_key(key.public_key())
            .serial_number(1)
            .add_extension(x509.BasicConstraints(ca=True, path_length=None), critical=True)
            .sign(key, hashes.SHA256())
        )
        leaf = (
            base.subject_name(x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "kube-apiserver")]))
            .public_key(own.public_key())
            .serial_number(2)
            .add_extension(
                x509.SubjectAlternativeName([x509.IPAddress(ipaddress.ip_address("127.0.0.1"))]),
                critical=False,
            )
            .sign(key, hashes.SHA256())
        )
        self.root = root.public_bytes(serialization.Encoding.PEM)
        chain, private = folder / f"{name}.pem", folder / f"{name}.key"
        chain.write_bytes(leaf.public_bytes(serialization.Encoding.PEM))
        private.write_bytes(
            own.private_bytes(
                serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
            )
        )
        self.context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        self.context.load_cert_chain(chain, private)


def test_in_a_pod_the_token_and_the_ca_are_read_again_when_they_change(tmp_path: Path) -> None:
    ours, other = Authority(tmp_path, "ours"), Authority(tmp_path, "other")
    folder = tmp_path / "serviceaccount"
    folder.mkdir()
    (folder / "token").write_text("first\n")
    (folder / "ca.crt").write_bytes(other.root)
    (folder / "namespace").write_text("istio-system")
    with serving(lambda request: Answer(body={}), ours.context) as fake:
        environment = {"KUBERNETES_SERVICE_HOST": "127.0.0.1", "KUBERNETES_SERVICE_PORT": str(fake.port)}
        api = Api.in_cluster(folder, environment)
        assert api.namespace == "istio-system"
        with pytest.raises(ApiError, match="no trusted connection") as caught:
            api.get_json("/x")
        assert caught.value.unreachable
        assert not fake.requests
        (folder / "ca.new").write_bytes(ours.root)
        (folder / "ca.new").replace(folder / "ca.crt")
        api.get_json("/x")
        (folder / "token").write_text("second")
        api.get_json("/x")
        told = [request.headers["Authorization"] for request in fake.requests]
    assert told == ["Bearer first", "Bearer second"]


def test_a_token_replaced_in_this_moment_is_read_again(tmp_path: Path) -> None:
    answers = [failure(401, "Unauthorized", "Unauthorized"), Answer(body={"ok": 1})]
    with serving(lambda request: answers.pop(0)) as fake:
        assert fake.api(SECRET).get_json("/x") == {"ok": 1}
        answers += [failure(401, "Unauthorized", "Unauthorized")] * 2
        assert "token" in str(error_of(fake.api(SECRET)))


ENDS = [
    "at once",
    "after the first bytes",
    "with a reset",
    "with a reset after the first bytes",
    "after the handshake",
]


@contextlib.contextmanager
def ending(how: str, context: ssl.SSLContext) -> Iterator[str]:
    """A server that ends each connection without a word: its address."""
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def serve() -> None:
            while True:
                try:
                    client, _ = listener.accept()
                except OSError:
                    return
                with client:
                    if "first bytes" in how:
                        client.recv(1 << 16)
                    if "reset" in how:
                        client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
                    if "handshake" in how:
                        with (
                            contextlib.suppress(OSError),
                            context.wrap_socket(client, server_side=True) as secure,
                        ):
                            secure.recv(1 << 16)

        thread = threading.Thread(target=serve, daemon=True)
        thread.start()
        try:
            yield f"https://127.0.0.1:{listener.getsockname()[1]}"
        finally:
            listener.shutdown(socket.SHUT_RDWR)
            thread.join(10)


@pytest.mark.parametrize("how", ENDS)
def test_a_server_that_ends_connections_is_away_and_not_distrusted(tmp_path: Path, how: str) -> None:
    """A balancer in front of a dead API server: whenever it ends a connection, it is told in the same words."""
    authority = Authority(tmp_path, "ours")
    (tmp_path / "token").write_text("token")
    (tmp_path / "ca.crt").write_bytes(authority.root)
    with ending(how, authority.context) as server:
        host, _, port = server.removeprefix("https://").rpartition(":")
        environment = {"KUBERNETES_SERVICE_HOST": host, "KUBERNETES_SERVICE_PORT": port}
        api = Api.in_cluster(tmp_path, environment)
        told = f"API server {server}: cannot be reached (it ends connections without an answer)"
        error = error_of(api)
        assert (error.reason, error.unreachable) == ("Unreachable", True)
        assert told in str(error)
        with pytest.raises(ApiError, match=re.escape(told)):
            open_socket(api.access, "/api/v1/namespaces/default/pods/a/portforward", [("ports", "80")])


def test_outside_of_a_pod_it_is_said_what_is_missing(tmp_path: Path) -> None:
    with pytest.raises(ApiError, match="KUBERNETES_SERVICE_HOST is not set"):
        Api.in_cluster(tmp_path, {})
    with pytest.raises(ApiError, match="token is missing"):
        Api.in_cluster(tmp_path, {"KUBERNETES_SERVICE_HOST": "10.0.0.1"})


KUBECONFIG = """
apiVersion: v1
kind: Config
current-context: here
clusters:
- {name: plain, cluster: {server: "http://127.0.0.1:PORT"}}
- {name: far, cluster: {server: "http://10.0.0.1:8080"}}
- {name: open, cluster: {server: "https://10.0.0.1", insecure-skip-tls-verify: true}}
users:
- {name: me, user: {token: s3cr3t-t0k3n}}
contexts:
- {name: here, context: {cluster: plain, user: me, namespace: team}}
- {name: far, context: {cluster: far, user: me}}
- {name: open, context: {cluster: open, user: me}}
"""


def test_a_kubeconfig_says_where_and_who(tmp_path: Path) -> None:
    file = tmp_path / "config"
    with serving(lambda request: Answer(body={})) as fake:
        file.write_text(KUBECONFIG.replace("PORT", str(fake.port)))
        api = Api.from_kubeconfig(file, None)
        assert api.namespace == "team"
        api.get_json("/x")
        assert fake.requests[0].headers["Authorization"] == f"Bearer {SECRET}"


@pytest.mark.parametrize(
    ("context", "told"),
    [
        ("nowhere", "choose one of: here, far, open"),
        ("far", "is not https://"),
        ("open", "insecure-skip-tls-verify"),
    ],
)
def test_a_context_that_cannot_be_used_is_explained(tmp_path: Path, context: str, told: str) -> None:
    file = tmp_path / "config"
    file.write_text(KUBECONFIG.replace("PORT", "1"))
    with pytest.raises(ApiError) as caught:
        Api.from_kubeconfig(file, context)
    assert told in str(caught.value)
    assert SECRET not in str(caught.value)


def test_a_kubeconfig_that_is_none_is_explained(tmp_path: Path) -> None:
    with pytest.raises(ApiError, match="no such file"):
        Api.from_kubeconfig(tmp_path / "absent")
    file = tmp_path / "config"
    file.write_text(f"users: [{{token: {SECRET}")
    with pytest.raises(ApiError) as caught:
        Api.from_kubeconfig(file)
    assert SECRET not in str(caught.value)


def test_in_a_pod_the_big_client_package_is_not_loaded(tmp_path: Path) -> None:
    import subprocess
    import sys

    (tmp_path / "token").write_text("t")
    (tmp_path / "ca.crt").write_bytes(Authority(tmp_path, "x").root)
    program = (
        "import sys; from pathlib import Path; from ztunnel.store.kube.api import Api;"
        f"Api.in_cluster(Path({str(tmp_path)!r}), {{'KUBERNETES_SERVICE_HOST': '10.0.0.1'}});"
        "sys.exit('kubernetes' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", program], env=dict(os.environ), timeout=60).returncode == 0


def test_closing_a_stream_does_not_wait_for_its_server() -> None:
    chunks: queue.Queue[bytes | None] = queue.Queue()
    with serving(lambda request: Answer(chunks=chunks)) as fake:
        stream = fake.api().stream("/watch")
        started = time.monotonic()
        stream.close()
        assert time.monotonic() - started < 10
        chunks.put(None)
