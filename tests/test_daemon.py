"""The node daemon as a process, between the real control plane, a real agent's socket and real pods."""

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import pytest
import trio

from cni import rules
from cni.zds import ZdsServer
from tests.controlplane.objects import authorization, node, peer_authentication
from tests.controlplane.objects import pod as pod_object
from tests.controlplane.process import ControlPlane
from tests.telemetry.scraped import Scraped
from tests.telemetry.written import whole_lines
from ztunnel.embedded.testing import Lab, LabPod
from ztunnel.inpod.pods import WorkloadInfo, ZdsError

pytestmark = pytest.mark.e2e
LIMIT = 20.0  # seconds for whatever is waited for, on a machine with other things to do


async def until(condition: Any, what: str, limit: float = LIMIT) -> None:
    """Wait until `condition()`, which may be async, is true."""
    with trio.move_on_after(limit):
        while True:
            value = condition()
            if hasattr(value, "__await__"):
                value = await value
            if value:
                return
            await trio.sleep(0.02)
    raise AssertionError(f"not within {limit} s: {what}")


async def get(path: Path, target: str, method: str = "GET") -> tuple[int, str]:
    """Status and body of a page on a Unix socket; (0, "") where nobody listens."""
    try:
        async with await trio.open_unix_socket(path) as stream:
            request = f"{method} {target} HTTP/1.1\r\nHost: ztunnel\r\nConnection: close\r\n\r\n"
            await stream.send_all(request.encode())
            answer = b"".join([data async for data in stream])
    except OSError:
        return 0, ""
    head, _, body = answer.partition(b"\r\n\r\n")
    return int(head.split()[1]), body.decode()


def alive(pid: int) -> bool:
    """Whether a process that need not be our child runs."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


class World:
    """A node with two pods, its control plane, its agent's socket, and its daemon."""

    def __init__(self, directory: Path, lab: Lab, nursery: trio.Nursery) -> None:
        self.directory = directory
        self.lab = lab
        self.client = lab.pod("client", service_account="client")
        self.server = lab.pod("server", service_account="server")
        (directory / "plane").mkdir()
        self.plane = ControlPlane(directory / "plane")
        self.plane.apply(node("node-1"))
        for one in (self.client, self.server):
            self.plane.apply(
                pod_object(one.name, one.ip4, one.ip6, account=one.service_account, mesh=True, node="node-1")
            )
        self.agent = ZdsServer(directory / "zds.sock")
        self.nursery = nursery
        self.log = directory / "log"
        self.processes: list[subprocess.Popen[bytes]] = []

    def environment(self, **settings: str) -> dict[str, str]:
        address = f"https://127.0.0.1:{self.plane.port}"
        return {
            "NODE_NAME": "node-1",
            "XDS_ADDRESS": address,
            "XDS_ROOT_CA": str(self.plane.root_ca),
            "AUTH_TOKEN": str(self.directory / "plane" / "tokens" / "node-1"),
            "INPOD_UDS": str(self.directory / "zds.sock"),
            "ADMIN_ADDR": f"unix:{self.directory}/admin.sock",
            "READINESS_ADDR": f"unix:{self.directory}/ready.sock",
            "METRICS_ADDR": f"unix:{self.directory}/metrics.sock",
            "LOG_FORMAT": "json",
            "TERMINATION_GRACE_PERIOD": "20s",
        } | settings

    def start(self, *, silent: bool = False, **settings: str) -> subprocess.Popen[bytes]:
        """Start a daemon; a `silent` one without standard error."""
        argv = [sys.executable, "-m", "ztunnel"]
        with self.log.open("ab") as log:
            process = subprocess.Popen(
                ["sh", "-c", 'exec "$@" 2>&-', "sh", *argv] if silent else argv,
                stderr=log, env=self.environment(**settings), start_new_session=True,
            )  # fmt: skip
        self.processes.append(process)
        return process

    async def ready(self) -> None:
        async def is_ready() -> bool:
            return (await get(self.directory / "ready.sock", "/healthz/ready"))[0] == 200

        await until(is_ready, f"the daemon is ready; its log: {self.log.read_text()}")

    async def join(self) -> None:
        """Bring both pods in."""
        for one in (self.client, self.server):
            with trio.fail_after(LIMIT):
                await self.agent.add(
                    one.uid, WorkloadInfo(one.name, one.namespace, one.service_account), one.path
                )
            with contextlib.closing(_Descriptor(one)) as namespace:
                rules.apply(namespace.fd, rules.Settings())

    async def dump(self) -> dict[str, Any]:
        status, body = await get(self.directory / "admin.sock", "/config_dump")
        assert status == 200
        assert "PRIVATE" not in body
        found: dict[str, Any] = json.loads(body)
        return found

    def pair(self) -> tuple[socket.socket, socket.socket]:
        """A connection of the client pod to the server pod, through the mesh: both programs' ends."""
        with self.server.listen(0) as listener:
            listener.settimeout(10)
            client = self.client.connect(self.server.ip4, listener.getsockname()[1])
            server, _ = listener.accept()
        server.settimeout(10)
        return client, server

    def lines(self, **values: Any) -> list[dict[str, Any]]:
        found = [json.loads(line) for line in whole_lines(self.log)]
        return [line for line in found if values.items() <= line.items()]


class _Descriptor:
    def __init__(self, pod: LabPod) -> None:
        self.fd = pod.open()

    def close(self) -> None:
        os.close(self.fd)


def talk(client: socket.socket, server: socket.socket) -> None:
    for one, other in ((client, server), (server, client)):
        one.sendall(b"hello")
        assert other.recv(5) == b"hello"


async def wait(process: subprocess.Popen[bytes], limit: float = LIMIT) -> int:
    with trio.fail_after(limit):
        return await trio.to_thread.run_sync(process.wait, abandon_on_cancel=True)


@pytest.fixture
def lab(tmp_path: Path) -> Iterator[Lab]:
    with Lab(tmp_path, nodes=1) as made:
        yield made


@pytest.fixture
async def world(tmp_path: Path, lab: Lab, nursery: trio.Nursery) -> AsyncIterator[World]:
    made = World(tmp_path, lab, nursery)
    await made.plane.start()
    await nursery.start(made.agent.run)
    yield made
    for process in made.processes:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
    if made.plane.process is not None and made.plane.process.poll() is None:
        await made.plane.stop()
    assert not [line for line in made.log.read_text().splitlines() if "internal error" in line]


async def test_ready_once_the_control_plane_the_agent_and_the_workers_are_there(world: World) -> None:
    await world.plane.stop()
    world.start()
    reasons: list[str] = []

    async def answers() -> bool:
        status, body = await get(world.directory / "ready.sock", "/healthz/ready")
        if status:
            assert status == 503
            reasons.append(body)
        return "no state from the control plane" in body

    await until(answers, "readiness answers and says what is missing")
    await world.plane.start()
    await world.ready()
    await world.join()
    client, server = world.pair()
    talk(client, server)
    dump = await world.dump()
    assert dump["ready"] == "ready"
    assert {one["name"] for one in dump["pods"]} == {"client", "server"}
    assert all(one["state"] == "valid" and one["not_after"] > time.time() for one in dump["certificates"])
    assert len(dump["workers"]) == len(dump["stats"]) == 2
    assert dump["totals"]["HBONE"] == 2
    assert sum(one["connections"] for one in dump["stats"]) == 2
    assert (world.directory / "admin.sock").stat().st_mode & 0o777 == 0o600
    client.close()
    server.close()
    await until(lambda: len(world.lines(scope="access")) == 2, "both ends are in the access log")
    for line in world.lines(scope="access"):
        assert line["src.identity"] == "spiffe://cluster.local/ns/default/sa/client"
        assert line["dst.identity"] == "spiffe://cluster.local/ns/default/sa/server"
        assert line["connection_security_policy"] == "mutual_tls"
        assert "error" not in line


async def test_the_log_level_can_be_changed(world: World) -> None:
    world.start()
    await world.ready()
    admin = world.directory / "admin.sock"
    assert await get(admin, "/logging") == (200, "info\n")
    assert await get(admin, "/logging?level=debug", "POST") == (200, "debug\n")
    assert (await get(admin, "/logging?level=loud", "POST"))[0] == 400
    assert await get(admin, "/logging?level=access:off", "POST") == (200, "debug,access:off\n")
    assert (await get(admin, "/logging?level=debug"))[0] == 405
    assert (await get(admin, "/quitquitquit"))[0] == 405
    assert (await get(admin, "/"))[0] == 200
    assert await get(admin, "/quitquitquit", "POST") == (200, "draining\n")
    assert await wait(world.processes[0]) == 0
    assert not admin.exists()


async def test_the_log_levels_of_scopes_reach_the_workers_and_their_successors(world: World) -> None:
    world.start()
    await world.ready()
    await world.join()
    admin = world.directory / "admin.sock"

    async def closed() -> float:
        page = (await get(world.directory / "metrics.sock", "/metrics"))[1]
        return Scraped(page).sum("istio_tcp_connections_closed_total")

    async def connect() -> None:
        before = await closed()
        client, server = world.pair()
        with client, server:
            talk(client, server)

        async def counted() -> bool:
            return await closed() == before + 2

        await until(counted, "the connection is counted on both sides")

    assert (await get(admin, "/logging?level=access:off", "POST"))[0] == 200
    await connect()
    for worker in (await world.dump())["workers"]:
        os.kill(worker["pid"], signal.SIGKILL)

    async def replaced() -> bool:
        workers = (await world.dump())["workers"]
        return all(worker["restarts"] == 1 and worker["pid"] for worker in workers)

    await until(replaced, "other workers run")
    await connect()
    assert world.lines(scope="access") == []
    assert (await get(admin, "/logging?level=access:info", "POST"))[0] == 200
    await connect()
    await until(lambda: len(world.lines(scope="access")) == 2, "connections are logged again")


async def test_a_daemon_without_standard_error_works(world: World) -> None:
    """Nothing that it opens takes the number, and the log's lines with it."""
    daemon = world.start(silent=True)
    await world.ready()
    await world.join()
    for _ in range(20):
        client, server = world.pair()
        with client, server:
            talk(client, server)
    for pid in [daemon.pid, *(worker["pid"] for worker in (await world.dump())["workers"])]:
        assert os.readlink(f"/proc/{pid}/fd/2") == "/dev/null"
    daemon.send_signal(signal.SIGTERM)
    assert await wait(daemon) == 0


async def test_sigterm_lets_open_connections_go_on_and_no_new_ones_begin(world: World) -> None:
    daemon = world.start()
    await world.ready()
    await world.join()
    client, server = world.pair()
    talk(client, server)
    daemon.send_signal(signal.SIGTERM)
    await until(lambda: world.lines(message="draining"), "the daemon drains")

    def refuses() -> bool:
        with world.server.listen(0) as listener:
            try:
                world.client.connect(world.server.ip4, listener.getsockname()[1]).close()
            except ConnectionRefusedError:
                return True
        return False

    await until(refuses, "new connections are refused")
    status, reasons = await get(world.directory / "ready.sock", "/healthz/ready")
    assert (status, "draining" in reasons) == (503, True)
    late = world.lab.pod("late")
    with pytest.raises(ZdsError, match="draining"):
        await world.agent.add(late.uid, WorkloadInfo(late.name, late.namespace, "client"), late.path)
    talk(client, server)
    assert daemon.poll() is None
    client.close()
    assert server.recv(1) == b""
    server.close()
    # Nothing is open any more: it need not wait for the end of its time.
    assert await wait(daemon, 10) == 0


@pytest.mark.parametrize("how", ["time", "second signal"])
async def test_a_connection_that_outlives_the_grace_period_is_cut(world: World, how: str) -> None:
    daemon = world.start(TERMINATION_GRACE_PERIOD="1s" if how == "time" else "1h")
    await world.ready()
    await world.join()
    client, server = world.pair()
    talk(client, server)
    daemon.send_signal(signal.SIGTERM)
    if how == "second signal":
        await until(lambda: world.lines(message="draining"), "the daemon drains")
        daemon.send_signal(signal.SIGTERM)
    assert await wait(daemon) == 0
    for sock in (client, server):
        with sock, pytest.raises(ConnectionResetError):
            assert sock.recv(1) == b""
            raise ConnectionResetError  # killed workers leave it to the kernel, which may end in order
    if how == "time":
        # The other worker may hear of it from the first, and say that its peer reset the stream.
        errors = [line["error"] for line in world.lines(scope="access")]
        assert len(errors) == 2
        assert any("grace period" in error for error in errors), errors


async def test_when_the_control_process_is_killed_its_workers_give_way_to_the_next_ones(world: World) -> None:
    """Connections that begin meanwhile wait, and are the successor's; none is refused."""
    daemon = world.start()
    await world.ready()
    await world.join()
    client, server = world.pair()
    talk(client, server)
    workers = [one["pid"] for one in (await world.dump())["workers"]]
    daemon.kill()
    await wait(daemon)
    with world.server.listen(0) as listener:
        listener.settimeout(LIMIT)
        # The kernel spreads them over all that listen: some wait with each worker.
        waiting = [world.client.connect(world.server.ip4, listener.getsockname()[1]) for _ in range(16)]
        world.start()
        await world.ready()
        served = [(await trio.to_thread.run_sync(listener.accept))[0] for _ in waiting]
    for number, sock in enumerate(waiting):
        sock.settimeout(LIMIT)
        sock.sendall(bytes([number]))
    numbers = set()
    for sock in served:
        sock.settimeout(LIMIT)
        numbers.add(sock.recv(1)[0])
    assert numbers == set(range(16))
    for sock in (*waiting, *served):
        sock.close()
    talk(client, server)  # still through the workers of the first
    client.close()
    server.close()
    await until(lambda: not any(map(alive, workers)), "the workers of the first have ended")
    assert len(world.lines(message="the control process is gone; waiting for the next one")) == 2


async def test_workers_that_get_no_successor_drain(world: World) -> None:
    daemon = world.start()
    await world.ready()
    await world.join()
    workers = [one["pid"] for one in (await world.dump())["workers"]]
    daemon.kill()
    await wait(daemon)
    await until(lambda: not any(map(alive, workers)), "they have ended", 60)
    assert len(world.lines(message="draining")) == 2
    with world.server.listen(0) as listener, pytest.raises(ConnectionRefusedError):
        world.client.connect(world.server.ip4, listener.getsockname()[1])


async def test_a_pod_whose_identity_gets_no_certificate_is_refused_and_nothing_of_it_stays(
    world: World,
) -> None:
    """The agent hears why. ztunnel asks for nobody's certificate afterwards."""
    world.start()
    await world.ready()
    one = world.client
    with trio.fail_after(40), pytest.raises(Exception, match="no certificate"):
        await world.agent.add(one.uid, WorkloadInfo(one.name, one.namespace, "nobody-here"), one.path)
    dump = await world.dump()
    assert dump["pods"] == dump["certificates"] == []


@pytest.mark.parametrize(
    ("settings", "names"),
    [
        ({"ZTUNNEL_WORKER_THREADS": "0"}, "ZTUNNEL_WORKER_THREADS"),
        ({"TERMINATION_GRACE_PERIOD": "soon"}, "TERMINATION_GRACE_PERIOD"),
        ({"POOL_MAX_STREAMS_PER_CONNECTION": "many"}, "POOL_MAX_STREAMS_PER_CONNECTION"),
        ({"SECRET_TTL": ""}, "SECRET_TTL"),
        ({"XDS_ADDRESS": "http://127.0.0.1:15010"}, "https://HOST:PORT"),
        ({"ADMIN_ADDR": "0.0.0.0:0"}, "loopback"),
        ({"ADMIN_ADDR": "nonsense"}, "nonsense"),
        ({"ADMIN_ADDR": "unix:/proc/nowhere/admin.sock"}, "/proc/nowhere/admin.sock"),
        ({"READINESS_ADDR": "unix:" + "/x" * 100}, "cannot listen"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_settings_that_cannot_be_used_end_it_with_one_line(settings: dict[str, str], names: str) -> None:
    usable = {
        "XDS_ADDRESS": "https://127.0.0.1:1",
        "ADMIN_ADDR": "127.0.0.1:0",
        "READINESS_ADDR": "127.0.0.1:0",
        "METRICS_ADDR": "127.0.0.1:0",
    }
    result = subprocess.run(
        [sys.executable, "-m", "ztunnel"], env=usable | settings, capture_output=True, text=True, timeout=60
    )
    assert result.returncode == 2, result.stderr
    assert result.stderr.startswith("error: ")
    assert result.stderr.count("\n") == 1
    assert names in result.stderr


def test_a_port_in_use_is_named() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        address = f"127.0.0.1:{taken.getsockname()[1]}"
        result = subprocess.run(
            [sys.executable, "-m", "ztunnel"],
            env={"XDS_ADDRESS": "https://127.0.0.1:1", "ADMIN_ADDR": address},
            capture_output=True, text=True, timeout=60,
        )  # fmt: skip
    assert result.returncode == 2
    assert address in result.stderr
    assert "in use" in result.stderr


@pytest.mark.parametrize(
    ("arguments", "code", "told"),
    [(["--help"], 0, "XDS_ADDRESS"), (["--version"], 0, "ztunnel "), (["--nonsense"], 2, "--help")],
)
def test_its_few_arguments(arguments: list[str], code: int, told: str) -> None:
    result = subprocess.run(
        [sys.executable, "-m", "ztunnel", *arguments], capture_output=True, text=True, timeout=60
    )
    assert result.returncode == code
    assert told in result.stdout + result.stderr


async def test_the_debug_pages_show_every_process_and_its_connections(world: World) -> None:
    world.start()
    await world.ready()
    await world.join()
    admin = world.directory / "admin.sock"
    client, server = world.pair()
    talk(client, server)

    async def page(target: str, status: int = 200, method: str = "GET") -> str:
        got, body = await get(admin, target, method)
        assert got == status, body
        return body

    tree = await page("/debug/tasks")
    assert all(name in tree for name in ("control\n", "worker-0\n", "worker-1\n", "Reactor.run"))
    assert set(json.loads(await page("/debug/tasks?format=json"))) == {"control", "worker-0", "worker-1"}
    memory = json.loads(await page("/debug/memory?objects=5"))
    assert set(memory) == {"control", "worker-0", "worker-1"}
    assert all(one["bytes"]["pss"] > 1_000_000 and len(one["objects"]) == 5 for one in memory.values())
    await page("/debug/memory?trace=start", 405)
    await page("/debug/memory?objects=many", 400)
    folded = await page("/debug/profile?seconds=0.5&format=collapsed")
    assert {line.partition(";")[0] for line in folded.splitlines()} == {"control", "worker-0", "worker-1"}
    assert "worker-1: " in await page("/debug/profile?seconds=0.1")
    assert "control" not in await page("/debug/profile?seconds=0.1&process=workers")
    for wrong in ("seconds=0", "seconds=1000", "seconds=x", "format=x", "process=x"):
        await page(f"/debug/profile?{wrong}", 400)

    shown = json.loads(await page("/debug/connections"))
    assert shown["limited"] == []
    assert "errors" not in shown
    both = {one["direction"]: one for one in shown["connections"]}
    assert set(both) == {"outbound", "inbound"}
    for one in both.values():
        assert (one["bytes_sent"], one["bytes_recv"], one["state"]) == (5, 5, "open")
        assert one["src.identity"] == "spiffe://cluster.local/ns/default/sa/client"
        assert one["dst.identity"] == "spiffe://cluster.local/ns/default/sa/server"
        assert one["dst.workload"] == "server"
        assert one["seconds"] > 0
    assert json.loads(await page("/debug/connections?from=server"))["connections"] == []
    assert len(json.loads(await page("/debug/connections?to=server&direction=inbound"))["connections"]) == 1
    await page("/debug/connections?port=http", 400)
    dump = await world.dump()
    assert {one["pod"]: (one["ports"], one["workers"]) for one in dump["listeners"]} == {
        "default/client": ([15001, 15006, 15008], 2), "default/server": ([15001, 15006, 15008], 2)
    }  # fmt: skip
    assert all(int(one["serial"], 16) for one in dump["certificates"])
    assert len(dump["tunnels"]) == 2
    tunnels = json.loads(await page("/debug/tunnels"))["tunnels"]
    assert {(one["direction"], one["pod"]) for one in tunnels} == {
        ("outbound", "default/client"), ("inbound", "default/server")
    }  # fmt: skip
    client.close()
    server.close()


async def test_policies_arrive_count_and_are_shown(world: World) -> None:
    """From the object to the connection that is closed."""
    world.start()
    await world.ready()
    await world.join()
    client, server = world.pair()
    talk(client, server)
    port = server.getsockname()[1]
    source = {"principals": ["cluster.local/ns/default/sa/client"]}
    to = [{"operation": {"ports": [str(port)]}}]
    denied = {
        "selector": {"matchLabels": {"app": "server"}},
        "action": "DENY",
        "rules": [{"from": [{"source": source}], "to": to}],
    }
    world.plane.apply(
        pod_object(
            "server", world.server.ip4, world.server.ip6, account="server", mesh=True, node="node-1",
            labels={"app": "server"},
        ),
        authorization("no-client", denied),
    )  # fmt: skip

    def closed() -> bool:
        server.settimeout(0.01)
        try:
            return server.recv(1) == b"?"
        except TimeoutError:
            return False
        except ConnectionResetError:
            return True

    await until(closed, "the connection that is denied now was closed")
    with pytest.raises(ConnectionResetError):
        client.recv(1)
    await until(lambda: world.lines(scope="access", direction="inbound"), "its line is in the log")
    (line,) = world.lines(scope="access", direction="inbound")
    assert line["error"] == (
        "connection closed due to policy change: explicitly denied by: default/no-client (rule 0)"
    )
    # Another port of the same pod is nobody's business.
    other, at_server = world.pair()
    talk(other, at_server)

    dump = await world.dump()
    policies = {f"{one['namespace']}/{one['name']}": one for one in dump["policies"]}
    shown = policies["default/no-client"]
    assert (shown["action"], shown["scope"], shown["problem"]) == ("DENY", "WORKLOAD_SELECTOR", "")
    clauses = [clause for rule in shown["rules"] for clause in rule]
    assert [{"principals": ["cluster.local/ns/default/sa/client"]}] in clauses
    assert [{"destination_ports": [port]}] in clauses
    pods = {one["name"]: one for one in dump["pod_policies"]}
    assert "default/no-client" in pods["server"]["policies"]
    assert "default/no-client" not in pods["client"]["policies"]
    assert not any(one["closed"] or one["lacks"] for one in pods.values())

    status, body = await get(world.directory / "admin.sock", "/debug/connections/recent")
    assert status == 200
    answer = json.loads(body)
    assert (answer["node"], answer["errors"]) == ("node-1", {})
    recent = {one["dst_port"]: one for one in answer["recent"]}
    assert recent[at_server.getsockname()[1]]["verdict"] == "allowed"
    # The connection was allowed when it began.
    assert recent[port]["verdict"] == "allowed"
    assert recent[port]["src_identity"] == "spiffe://cluster.local/ns/default/sa/client"
    assert (recent[port]["src_workload"], recent[port]["src_namespace"]) == ("client", "default")
    for one in (client, server, other, at_server):
        one.close()


async def test_a_plaintext_client_is_known_by_its_address(world: World) -> None:
    world.start()
    await world.ready()
    await world.join()
    world.plane.apply(peer_authentication("default", {"mtls": {"mode": "STRICT"}}, namespace="istio-system"))
    outsider = world.lab.pod("outsider")
    world.plane.apply(pod_object("outsider", outsider.ip4, outsider.ip6, node="node-1"))

    async def refused() -> bool:
        with world.server.listen(0) as listener:
            try:  # a reset may come before connect(2) has returned
                with outsider.connect(world.server.ip4, listener.getsockname()[1]) as sock:
                    sock.settimeout(0.2)
                    return sock.recv(1) == b"?"
            except TimeoutError:
                return False
            except ConnectionResetError:
                return True

    await until(refused, "plaintext is refused")
    client, server = world.pair()
    talk(client, server)
    client.close()
    server.close()

    async def known() -> bool:
        """Who is at an address is told by the control plane, in its own time."""
        await refused()
        _, body = await get(world.directory / "admin.sock", "/debug/connections/recent")
        denied = [one for one in json.loads(body)["recent"] if one["verdict"] == "denied"]
        assert all((one["src_identity"], one["src_addr"]) == ("", outsider.ip4) for one in denied), denied
        return "outsider" in [one["src_workload"] for one in denied]

    await until(known, "it is known by its address")


async def test_the_tap_tells_of_connections_as_they_begin_and_end(world: World) -> None:
    world.start()
    await world.ready()
    await world.join()
    admin = world.directory / "admin.sock"
    received = bytearray()

    def events(**wanted: Any) -> list[dict[str, Any]]:
        found = [
            json.loads(line)
            for line in received.split(b"\n")
            if line.startswith(b"{") and line.endswith(b"}")
        ]
        return [one for one in found if wanted.items() <= one.items()]

    async def read(stream: trio.SocketStream) -> None:
        async for data in stream:
            received.extend(data)

    async with await trio.open_unix_socket(admin) as stream, trio.open_nursery() as nursery:
        await stream.send_all(b"GET /debug/tap?to=server HTTP/1.1\r\nHost: x\r\n\r\n")
        nursery.start_soon(read, stream)
        await until(lambda: events(event="tapping"), "the tap is open")
        client, server = world.pair()
        await until(lambda: len(events(event="opened")) == 2, "both ends are told of")
        talk(client, server)
        client.close()
        server.close()
        await until(lambda: len(events(event="closed")) == 2, "both ends ended")
        assert not [one for one in events(event="closed") if "error" in one]
        assert all(one["bytes_sent"] == one["bytes_recv"] == 5 for one in events(event="closed"))
        # What is lost of a connection that cannot be made: it never began, and ended with the reason.
        with pytest.raises(ConnectionError):
            world.client.connect(world.server.ip4, 1).recv(1)
        await until(
            lambda: [one for one in events(event="closed", direction="outbound") if "error" in one], "why"
        )
        assert len(events(event="opened")) == 2
        # A worker that takes the place of another one hears of the tap, too.
        for one in (await world.dump())["workers"]:
            os.kill(one["pid"], signal.SIGKILL)
        before = len(events(event="opened"))

        async def again() -> bool:
            try:
                made = world.pair()
            except OSError:
                return False
            for one in made:
                one.close()
            return len(events(event="opened")) > before

        await until(again, "the new workers are tapped")
        nursery.cancel_scope.cancel()

    async def untapped() -> bool:
        return "_Debug.tap" not in (await get(admin, "/debug/tasks"))[1]

    await until(untapped, "the tap ended with its reader")
