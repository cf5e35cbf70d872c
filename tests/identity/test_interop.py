"""Our TLS with the `openssl` program at the other end of a real socket, as server and as client."""

import contextlib
import socket
import subprocess
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from OpenSSL import SSL

from ztunnel.identity import testing, tls
from ztunnel.identity.ca import Authority
from ztunnel.identity.certs import WorkloadCertificate
from ztunnel.identity.errors import AlpnError, HandshakeError
from ztunnel.identity.spiffe import SpiffeId

LIMIT = 30.0  # seconds for anything to happen


def _files(certificate: WorkloadCertificate, directory: Path) -> list[str]:
    """Options that give the certificate to `openssl s_client` and `s_server`."""
    names = {"key": certificate.key_pem, "cert": certificate.chain_pem, "CAfile": certificate.roots_pem}
    for name, pem in names.items():
        (directory / name).write_bytes(pem)
    return [
        *("-key", str(directory / "key"), "-cert", str(directory / "cert")),
        *("-cert_chain", str(directory / "cert"), "-CAfile", str(directory / "CAfile")),
    ]


class _Visit(threading.Thread):
    """Our server for one visitor: who it was, or why it was refused."""

    def __init__(self, context: SSL.Context) -> None:
        super().__init__()
        self.context = context
        self.listener = socket.create_server(("127.0.0.1", 0))
        self.listener.settimeout(LIMIT)
        self.port = self.listener.getsockname()[1]
        self.peer: SpiffeId | None = None
        self.error: Exception | None = None

    def run(self) -> None:
        with self.listener:
            accepted, _ = self.listener.accept()
        with accepted:
            accepted.settimeout(None)  # pyOpenSSL needs a blocking socket; the client program has the limit
            server = SSL.Connection(self.context, accepted)
            server.set_accept_state()
            try:
                server.do_handshake()
                self.peer = tls.verify_peer(server, "cluster.local")
                server.sendall(b"welcome\n")
                server.shutdown()
                with contextlib.suppress(SSL.Error):
                    server.recv(1)
            except SSL.Error as error:
                self.error = tls.handshake_error(server, error)
            except Exception as error:  # the test judges it
                self.error = error


def _visit(context: SSL.Context, *options: str) -> tuple[_Visit, str]:
    visit = _Visit(context)
    visit.start()
    command = ["openssl", "s_client", "-connect", f"127.0.0.1:{visit.port}", "-verify_return_error"]
    done = subprocess.run(
        [*command, *options], input="", capture_output=True, text=True, timeout=LIMIT, check=False
    )
    visit.join(LIMIT)
    assert not visit.is_alive()
    return visit, done.stdout + done.stderr


def test_openssl_as_client(authority: Authority, server_context: SSL.Context, tmp_path: Path) -> None:
    files = _files(testing.workload(authority), tmp_path)
    visit, output = _visit(server_context, *files, "-alpn", "h2", "-ign_eof")
    assert visit.error is None
    assert visit.peer == SpiffeId.parse(testing.CLIENT)
    assert "welcome" in output
    assert "Verify return code: 0 (ok)" in output
    assert "ALPN protocol: h2" in output
    assert "New, TLSv1.3" in output
    assert "Reused" not in output


@pytest.mark.parametrize(
    ("options", "refusal", "complaint"),
    [
        (["-alpn", "http/1.1"], AlpnError, r"offers the ALPN protocols \['http/1.1'\]"),
        ([], AlpnError, "no ALPN protocol"),
        (["-alpn", "h2", "-tls1_2"], HandshakeError, "does not support TLS 1.3"),
    ],
)
def test_openssl_as_a_client_that_is_refused(
    options: list[str],
    refusal: type[Exception],
    complaint: str,
    authority: Authority,
    server_context: SSL.Context,
    tmp_path: Path,
) -> None:
    visit, _ = _visit(server_context, *_files(testing.workload(authority), tmp_path), *options)
    assert visit.peer is None
    with pytest.raises(refusal, match=complaint):
        raise visit.error or AssertionError("let in")


def test_openssl_as_a_client_without_a_certificate(
    authority: Authority, server_context: SSL.Context, tmp_path: Path
) -> None:
    (tmp_path / "root").write_bytes(authority.root_pem)
    visit, output = _visit(server_context, "-CAfile", str(tmp_path / "root"), "-alpn", "h2", "-ign_eof")
    assert "presented no certificate" in str(visit.error)
    assert "alert certificate required" in output


@contextlib.contextmanager
def _openssl_server(*options: str) -> Iterator[int]:
    """The port of an `openssl s_server` that says "welcome" to whom it lets in."""
    with subprocess.Popen(
        ["openssl", "s_server", "-accept", "127.0.0.1:0", "-naccept", "1", *options],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    ) as server:
        assert server.stdin is not None
        assert server.stdout is not None
        try:
            server.stdin.write("welcome\n")
            server.stdin.flush()
            for line in server.stdout:
                if line.startswith("ACCEPT "):
                    break
            yield int(line.rsplit(":", 1)[1])
        finally:
            server.kill()


def test_openssl_as_server(authority: Authority, client_context: SSL.Context, tmp_path: Path) -> None:
    files = _files(testing.workload(authority, testing.SERVER), tmp_path)
    with (
        _openssl_server(*files, "-Verify", "4", "-verify_return_error", "-alpn", "h2") as port,
        socket.create_connection(("127.0.0.1", port), timeout=LIMIT) as connected,
    ):
        connected.settimeout(None)
        client = SSL.Connection(client_context, connected)
        client.set_connect_state()
        client.do_handshake()
        assert tls.verify_peer(client, "cluster.local", [testing.SERVER]) == SpiffeId.parse(testing.SERVER)
        assert client.get_protocol_version_name() == "TLSv1.3"
        assert client.recv(100) == b"welcome\n"


def test_openssl_as_a_server_without_alpn(
    authority: Authority, client_context: SSL.Context, tmp_path: Path
) -> None:
    files = _files(testing.workload(authority, testing.SERVER), tmp_path)
    with (
        _openssl_server(*files) as port,
        socket.create_connection(("127.0.0.1", port), timeout=LIMIT) as connected,
    ):
        connected.settimeout(None)
        client = SSL.Connection(client_context, connected)
        client.set_connect_state()
        client.do_handshake()
        with pytest.raises(AlpnError, match="no ALPN protocol, expected 'h2'"):
            tls.verify_peer(client, "cluster.local", [testing.SERVER])
