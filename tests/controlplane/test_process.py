"""Starting, stopping and logging: what an operator sees of the process."""

import signal
import socket
import ssl
import subprocess
from pathlib import Path

import pytest
import trio
import trio.testing

from tests.controlplane.process import ControlPlane
from ztunnel.controlplane.authority import AuthorityKeeper
from ztunnel.controlplane.tls import ServerIdentity


async def run(plane: ControlPlane, *arguments: str, **environ: str) -> subprocess.CompletedProcess[bytes]:
    with trio.fail_after(30):
        return await trio.run_process(
            plane.command(*arguments), capture_stdout=True, capture_stderr=True, check=False, env=environ
        )


async def test_help_has_an_example(stopped: ControlPlane) -> None:
    completed = await run(stopped, "--help")
    assert completed.returncode == 0
    assert b"example:" in completed.stdout


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--listen", "15012"], "--listen: '15012' is not HOST:PORT; write it as"),
        (["--listen", "::1:15012"], "[::1]:15012"),
        (["--listen", "127.0.0.1:99999"], "is not HOST:PORT"),
        (["--listen", "192.0.2.1:0"], "choose another address or port"),
        (["--listen", "no-such-host.invalid:0"], "use an IP address of this machine"),
        (["--trust-domain", "Bad/Domain"], "--trust-domain"),
        (["--cluster-id", "a/b"], "--cluster-id"),
        (["--store", "/no/such/place"], "--store /no/such/place: no such directory; make it"),
        (["--tokens", "/no/such/place"], "--tokens /no/such/place: no such directory; make it"),
        (["--ca-dir", "/dev/null/ca"], "--ca-dir /dev/null/ca"),
        (["--unknown"], "--unknown"),
        (["--admin", "0.0.0.0:0"], "--admin 0.0.0.0:0: the admin pages listen on loopback addresses only"),
        (["--admin", "unix:/no/such/place"], "--admin unix:/no/such/place: cannot listen"),
    ],
)
async def test_wrong_usage_is_one_line_and_status_2(
    stopped: ControlPlane, arguments: list[str], words: str
) -> None:
    completed = await run(
        stopped, *([] if "--listen" in arguments else ["--listen", "127.0.0.1:0"]), *arguments
    )
    assert completed.returncode == 2
    assert words in completed.stderr.decode().splitlines()[-1]
    assert b"Traceback" not in completed.stderr


@pytest.mark.parametrize(
    ("environ", "complaint"),
    [
        (
            {"DEFAULT_WORKLOAD_CERT_TTL": "a day"},
            "DEFAULT_WORKLOAD_CERT_TTL: 'a day' is not a duration such as 24h",
        ),
        ({"MAX_WORKLOAD_CERT_TTL": "1h"}, "certificates of 24h by default and 1h at most"),
        ({"DEFAULT_WORKLOAD_CERT_TTL": "5s"}, "have to be at least 10s"),
    ],
)
async def test_lifetimes_that_cannot_be(
    stopped: ControlPlane, environ: dict[str, str], complaint: str
) -> None:
    completed = await run(stopped, "--listen", "127.0.0.1:0", **environ)
    assert completed.returncode == 2
    assert complaint in completed.stderr.decode().splitlines()[-1]


@pytest.mark.parametrize(("name", "value"), [("LOG_LEVEL", "loud"), ("LOG_FORMAT", "xml")])
async def test_wrong_log_settings(stopped: ControlPlane, name: str, value: str) -> None:
    completed = await run(stopped, "--listen", "127.0.0.1:0", **{name: value})
    assert completed.returncode == 2
    assert f"{name}: '{value}'" in completed.stderr.decode()


async def test_a_port_in_use(stopped: ControlPlane) -> None:
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        completed = await run(stopped, "--listen", f"127.0.0.1:{port}")
    assert completed.returncode == 2
    (line,) = completed.stderr.decode().splitlines()
    assert line == (
        f"ztunnel.controlplane: --listen 127.0.0.1:{port}: Address already in use;"
        " stop what listens there, or choose another address or port"
    )


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
async def test_it_ends_in_order(plane: ControlPlane, number: signal.Signals) -> None:
    assert await plane.stop(number) == 0
    assert [line["message"] for line in plane.lines()][-1] == "stopped"
    # Its port is free at once for the next.
    await plane.start()


async def test_ipv6(stopped: ControlPlane) -> None:
    with (stopped.directory / "log").open("ab") as log:
        stopped.process = subprocess.Popen(
            stopped.command("--listen", "[::1]:0"), stderr=log, env={"LOG_FORMAT": "json"}
        )
    line = await stopped.logged(message="listening")
    host, _, port = line["address"].rpartition(":")
    assert host == "[::1]"
    connection = await trio.open_tcp_stream("::1", int(port))
    async with trio.SSLStream(connection, stopped.tls(), server_hostname="::1") as stream:
        with trio.fail_after(20):
            await stream.do_handshake()


async def test_logs_hold_no_secrets(plane: ControlPlane) -> None:
    async with plane.stream() as stream:
        await stream.send()
        await stream.receive()
    async with plane.stream("a wrong token") as stream:
        await stream.send()
        await plane.logged(level="warn")
    await plane.stop()
    for secret in ("token of node", "a wrong token", "PRIVATE KEY", "BEGIN"):
        assert secret not in plane.log
    assert (plane.directory / "ca" / "ca-key.pem").stat().st_mode & 0o077 == 0


async def test_a_renewed_server_certificate_serves_the_next_connections(tmp_path: Path) -> None:
    identity = ServerIdentity(AuthorityKeeper(tmp_path / "ca"), "127.0.0.1")
    client = ssl.create_default_context(cafile=str(tmp_path / "ca" / "root-cert.pem"))
    client.set_alpn_protocols(["h2"])
    for host in ("127.0.0.1", "::1", "localhost", "istiod.istio-system.svc"):
        await served_certificate(identity.context, client, host)
    before = await served_certificate(identity.context, client, "localhost")
    assert before == await served_certificate(identity.context, client, "localhost")
    identity.renew()
    assert before != await served_certificate(identity.context, client, "localhost")


async def test_older_tls_is_refused(plane: ControlPlane) -> None:
    context = plane.tls()
    context.maximum_version = ssl.TLSVersion.TLSv1_2
    connection = await trio.open_tcp_stream("127.0.0.1", plane.port)
    stream = trio.SSLStream(connection, context, server_hostname="127.0.0.1")
    with pytest.raises(trio.BrokenResourceError), trio.fail_after(20):
        await stream.do_handshake()
    await connection.aclose()


async def served_certificate(server: ssl.SSLContext, client: ssl.SSLContext, host: str) -> bytes:
    """The certificate that a client who calls the server `host` gets, verified."""
    left, right = trio.testing.memory_stream_pair()
    accepted = trio.SSLStream(left, server, server_side=True)
    connected = trio.SSLStream(right, client, server_hostname=host)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(accepted.do_handshake)
        nursery.start_soon(connected.do_handshake)
    certificate = connected.getpeercert(binary_form=True)
    assert certificate
    assert connected.selected_alpn_protocol() == "h2"
    return bytes(certificate)
