"""Real programs between pods on two nodes, inside the mesh and across its border, over both families."""

import hashlib
import os
import subprocess
import tempfile
import textwrap
from collections.abc import Iterator
from pathlib import Path

import msgspec
import pytest

from tests.e2e.conftest import HTTP, PATHS, Mesh, address, url_host
from tests.proxy.meshlab import wait_listening
from ztunnel.embedded.testing import LabPod

pytestmark = pytest.mark.e2e

on_each_path = pytest.mark.parametrize("path", PATHS)
on_each_family = pytest.mark.parametrize("family", [4, 6])


@on_each_path
@on_each_family
def test_curl_and_nginx(mesh: Mesh, path: str, family: int) -> None:
    client, server = mesh.path(path)
    result = client.check(["curl", "-sS", "-m", "10", f"http://{url_host(server, family)}:{HTTP}/"])
    assert (result.returncode, result.stdout) == (0, "hello world\n"), result.stderr


@on_each_path
@on_each_family
def test_the_application_sees_the_client_pods_own_address(mesh: Mesh, path: str, family: int) -> None:
    client, server = mesh.path(path)
    result = client.check(["curl", "-sS", "-m", "10", f"http://{url_host(server, family)}:{HTTP}/who"])
    assert result.stdout.strip().removeprefix("::ffff:") == address(client, family), result.stderr


@on_each_path
def test_wrk_and_nginx(mesh: Mesh, path: str) -> None:
    client, server = mesh.path(path)
    result = client.check(["wrk", "-t1", "-c32", "-d2", f"http://{server.ip4}:{HTTP}/"])
    assert result.returncode == 0, result.stderr
    assert "Socket errors" not in result.stdout
    assert "Non-2xx" not in result.stdout
    rate = next(line for line in result.stdout.splitlines() if "Requests/sec" in line)
    assert float(rate.split()[1]) > 100


@on_each_path
@on_each_family
@pytest.mark.parametrize("reverse", [False, True], ids=["upload", "download"])
def test_iperf3_with_four_streams(mesh: Mesh, path: str, family: int, reverse: bool) -> None:
    client, server = mesh.path(path)
    port = 5200 + 10 * PATHS.index(path) + family + 2 * reverse
    program = server.start(["iperf3", "-s", "-1", "-p", str(port)], stdout=subprocess.DEVNULL)
    wait_listening(server, port)
    command = ["iperf3", "-c", address(server, family), "-p", str(port), "-t", "1", "-P", "4", "-J"]
    result = client.check(command + ["-R"] * reverse, timeout=30)
    assert result.returncode == 0, result.stdout[-500:] + result.stderr
    assert program.wait(10) == 0
    report = msgspec.json.decode(result.stdout)
    assert len(report["end"]["streams"]) == 4
    assert all(stream["receiver"]["bytes"] > 0 for stream in report["end"]["streams"])


DIGEST_AT_END = """
    import hashlib, socketserver, sys
    class Handler(socketserver.StreamRequestHandler):
        def handle(self):
            self.wfile.write(hashlib.sha256(self.rfile.read()).hexdigest().encode())
    class Server(socketserver.ThreadingTCPServer):
        address_family = __import__("socket").AF_INET6
    Server(("::", int(sys.argv[1])), Handler).serve_forever()
"""


@on_each_path
@on_each_family
def test_ncat_half_close(mesh: Mesh, python: str, path: str, family: int) -> None:
    """The server answers only after the client's end of input: the FIN must cross, and the way back stay open."""
    client, server = mesh.path(path)
    port = 5300 + 10 * PATHS.index(path) + family
    server.start([python, "-c", textwrap.dedent(DIGEST_AT_END), str(port)])
    wait_listening(server, port)
    data = os.urandom(300_000).hex()
    result = client.check(["ncat", f"-{family}", address(server, family), str(port)], input=data)
    assert result.stdout == hashlib.sha256(data.encode()).hexdigest(), result.stderr


@on_each_path
@on_each_family
def test_a_server_that_speaks_first(mesh: Mesh, path: str, family: int) -> None:
    client, server = mesh.path(path)
    port = 5400 + 10 * PATHS.index(path) + family
    greeting = "printf '220 mail.test ESMTP\\r\\n'; read line; printf '221 bye\\r\\n'"
    server.start(["ncat", f"-{family}", "-l", "-k", str(port), "--sh-exec", greeting])
    wait_listening(server, port)
    with client.connect(address(server, family), port) as connection, connection.makefile("rwb") as stream:
        assert stream.readline() == b"220 mail.test ESMTP\r\n"
        stream.write(b"QUIT\r\n")
        stream.flush()
        assert stream.readline() == b"221 bye\r\n"
        assert stream.read() == b""


AS_POSTGRES = ("setpriv", "--reuid=postgres", "--regid=postgres", "--clear-groups")


@pytest.fixture(scope="module")
def postgres(mesh: Mesh) -> Iterator[str]:
    """PostgreSQL's programs; servers run in the server pods, with data of their own.

    Not in pytest's temporary folders: those are for root only, and PostgreSQL does not run as root.
    """
    with tempfile.TemporaryDirectory(prefix="postgres-") as directory:
        root = Path(directory)
        root.chmod(0o755)
        binaries, servers = _start_postgres(mesh, root)
        yield str(binaries)
        for server in servers:
            server.terminate()
            server.wait()


def _start_postgres(mesh: Mesh, root: Path) -> tuple[Path, list[subprocess.Popen[bytes]]]:
    data = root / "data"
    data.mkdir()
    binaries = next(Path("/usr/lib/postgresql").glob("*/bin"))
    subprocess.run(["chown", "postgres", data], check=True)
    subprocess.run(
        [*AS_POSTGRES, binaries / "initdb", "-A", "trust", "-D", data], check=True, capture_output=True
    )
    with (data / "pg_hba.conf").open("a") as access:
        access.write("host all all all trust\n")
    servers = []
    for pod in (mesh.server, mesh.outside_server):
        copy = root / pod.name
        subprocess.run(["cp", "-a", data, copy], check=True)
        server = pod.start(
            [
                *AS_POSTGRES, binaries / "postgres", "-D", copy, "-p", "5432",
                "-c", "listen_addresses=*", "-c", f"unix_socket_directories={copy}",
            ],
            stderr=subprocess.DEVNULL,
        )  # fmt: skip
        servers.append(server)
        wait_listening(pod, 5432)
    return binaries, servers


@on_each_path
def test_postgresql(mesh: Mesh, postgres: str, path: str) -> None:
    client, server = mesh.path(path)
    query = "select sum(n), inet_client_addr() from generate_series(1, 10000) n"
    result = client.check(
        [f"{postgres}/psql", "-h", server.ip4, "-U", "postgres", "-At", "-c", query],
        env=os.environ | {"PGCONNECT_TIMEOUT": "10"},
    )
    assert result.stdout.strip() == f"50005000|{client.ip4}", result.stderr


WEBSOCKET_SERVER = """
    import asyncio, sys
    from websockets.asyncio.server import serve
    async def echo(socket):
        async for message in socket:
            await socket.send(message)
    async def main():
        async with serve(echo, None, int(sys.argv[1]), max_size=None):
            await asyncio.Future()
    asyncio.run(main())
"""
WEBSOCKET_CLIENT = """
    import os, sys
    from websockets.sync.client import connect
    with connect(sys.argv[1], max_size=None) as socket:
        for size in (0, 1, 125, 126, 65536, 3_000_000):
            data = os.urandom(size)
            socket.send(data)
            assert socket.recv(timeout=10) == data
    print("all echoed")
"""
GRPC_SERVER = """
    import sys, grpc
    from concurrent import futures
    def unary(request, context):
        return request[::-1]
    def stream(requests, context):
        for request in requests:
            yield request + b"!"
    handlers = grpc.method_handlers_generic_handler("test.Echo", {
        "Reverse": grpc.unary_unary_rpc_method_handler(unary),
        "Chat": grpc.stream_stream_rpc_method_handler(stream),
    })
    server = grpc.server(futures.ThreadPoolExecutor(4), handlers=[handlers])
    assert server.add_insecure_port(f"[::]:{sys.argv[1]}")
    server.start()
    server.wait_for_termination()
"""
GRPC_CLIENT = """
    import sys, grpc
    with grpc.insecure_channel(sys.argv[1]) as channel:
        reverse = channel.unary_unary("/test.Echo/Reverse")
        assert reverse(b"abc" * 100_000, timeout=10) == b"cba" * 100_000
        chat = channel.stream_stream("/test.Echo/Chat")
        answers = list(chat(iter([b"%d" % n for n in range(100)]), timeout=10))
        assert answers == [b"%d!" % n for n in range(100)]
    print("all answered")
"""


def _run_pair(
    client: LabPod, server: LabPod, python: str, programs: tuple[str, str], port: int, target: str
) -> str:
    serving, asking = (textwrap.dedent(text) for text in programs)
    server.start([python, "-c", serving, str(port)])
    wait_listening(server, port)
    result = client.check([python, "-c", asking, target], timeout=60)
    assert result.returncode == 0, result.stderr
    return result.stdout.strip()


@on_each_path
@on_each_family
def test_websocket(mesh: Mesh, python: str, path: str, family: int) -> None:
    client, server = mesh.path(path)
    port = 5500 + 10 * PATHS.index(path) + family
    target = f"ws://{url_host(server, family)}:{port}/"
    programs = (WEBSOCKET_SERVER, WEBSOCKET_CLIENT)
    assert _run_pair(client, server, python, programs, port, target) == "all echoed"


@on_each_path
@on_each_family
def test_grpc(mesh: Mesh, python: str, path: str, family: int) -> None:
    client, server = mesh.path(path)
    port = 5600 + 10 * PATHS.index(path) + family
    target = f"{'ipv6' if family == 6 else 'ipv4'}:{url_host(server, family)}:{port}"
    assert _run_pair(client, server, python, (GRPC_SERVER, GRPC_CLIENT), port, target) == "all answered"


# The program writes to the socket itself. (ncat's --sh-exec between them loses up to 8 KiB near the end, mesh or not:
# it does not look at what send() took, and its child's SIGCHLD cuts a send short about once in two hundred runs.)
OUTPUT_OF_A_PROGRAM = """
    import socketserver, subprocess, sys
    class Handler(socketserver.BaseRequestHandler):
        def handle(self):
            subprocess.run(sys.argv[2], shell=True, stdout=self.request)
    socketserver.ThreadingTCPServer(("", int(sys.argv[1])), Handler).serve_forever()
"""


@pytest.mark.long
@on_each_path
def test_a_gibibyte_arrives_as_it_was_sent(mesh: Mesh, python: str, path: str) -> None:
    client, server = mesh.path(path)
    port = 5700 + PATHS.index(path)
    # A stream cipher's output: a gibibyte that no compression or repetition could hide an error in.
    produce = "openssl enc -aes-128-ctr -K 00 -iv 00 -in /dev/zero 2>/dev/null | head -c 1073741824"
    server.start([python, "-c", textwrap.dedent(OUTPUT_OF_A_PROGRAM), str(port), produce])
    wait_listening(server, port)
    compare = f"ncat --recv-only {server.ip4} {port} | cmp - <({produce})"  # says where, if they differ
    result = client.check(["bash", "-c", compare], timeout=200)
    assert (result.returncode, result.stdout) == (0, ""), result.stderr


THOUSAND = """
    import asyncio, sys
    host, port = sys.argv[1], int(sys.argv[2])
    async def one(number, gate):
        reader, writer = await asyncio.open_connection(host, port)
        await gate.wait()  # all thousand are open at once
        data = b"%06d" % number * 100
        writer.write(data)
        await writer.drain()
        writer.write_eof()
        assert await reader.read() == data
        writer.close()
    async def main():
        gate = asyncio.Barrier(1000)
        await asyncio.gather(*(one(number, gate) for number in range(1000)))
    asyncio.run(main())
    print("all thousand")
"""
ECHO = """
    import asyncio, sys
    async def echo(reader, writer):
        while data := await reader.read(65536):
            writer.write(data)
            await writer.drain()
        writer.close()
    async def main():
        server = await asyncio.start_server(echo, None, int(sys.argv[1]), backlog=4096)
        await server.serve_forever()
    asyncio.run(main())
"""


@on_each_path
@on_each_family
def test_a_thousand_connections_at_once(mesh: Mesh, python: str, path: str, family: int) -> None:
    client, server = mesh.path(path)
    port = 5800 + 10 * PATHS.index(path) + family
    server.start([python, "-c", textwrap.dedent(ECHO), str(port)])
    wait_listening(server, port)
    command = [python, "-c", textwrap.dedent(THOUSAND), address(server, family), str(port)]
    result = client.check(command, timeout=60)
    assert (result.returncode, result.stdout.strip()) == (0, "all thousand"), result.stderr


def test_the_mesh_was_a_mesh(mesh: Mesh) -> None:
    """The paths above are what they are called: tunnels inside, plain TCP across the border."""
    log = mesh.lab.nodes[1].access_log()
    inside = [e for e in log if e["dst.addr"].startswith((mesh.server.ip4, f"[{mesh.server.ip6}"))]
    across = [
        e for e in log if e["dst.addr"].startswith((mesh.outside_server.ip4, f"[{mesh.outside_server.ip6}"))
    ]
    assert inside
    assert across
    assert {e["connection_security_policy"] for e in inside} == {"mutual_tls"}
    assert {e["dst.identity"] for e in inside} == {"spiffe://cluster.local/ns/default/sa/server"}
    assert {e["connection_security_policy"] for e in across} == {"unknown"}
