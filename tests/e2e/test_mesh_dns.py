"""DNS capture and the exceptions from capture in a whole mesh, seen from programs in pods."""

import contextlib
import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator

import pytest
from prometheus_client.parser import text_string_to_metric_families as parsed

from tests.e2e.whole import ECHO, HTTP, MODE, WholeMesh, idle, namespace, service, workload
from ztunnel.embedded.addresses import DNS_VIP

pytestmark = pytest.mark.e2e

WEB = "web.default.svc.cluster.local"
TRAFFIC = "traffic.sidecar.istio.io"
LIMIT = 60.0
OURS, CLUSTERS = 30, 5  # seconds for which the proxy's answers hold, and the cluster's


def server(annotations: str = "") -> str:
    """A Pod of the program."""
    return f"""
apiVersion: v1
kind: Pod
metadata: {{name: server, annotations: {{{annotations}}}}}
spec:
  nodeName: node-2
  terminationGracePeriodSeconds: 0
  containers: [{{name: main, command: [PROGRAM]}}]
---
"""


def resources(client: str = "", of_server: str = "") -> str:
    return (
        namespace(mode="ambient")
        + workload("web", node="node-2")
        + service("web")
        + service("only4", app="web", extra="ipFamilyPolicy: SingleStack")
        + service("peers", app="web", extra="clusterIP: None")
        + idle("client").replace("labels:", f"annotations: {{{client}}}, labels:")
        + idle("apart", labels=f", {MODE}: none")
        + server(of_server)
    )


@pytest.fixture(scope="module")
def mesh() -> Iterator[WholeMesh]:
    with WholeMesh(resources(), workers=1) as mesh:
        mesh.until(lambda: len(mesh.pods()) == 4, "four pods", LIMIT)
        mesh.wait_pods()
        mesh.wait_membership(client=True, web=True, server=True)
        yield mesh


def annotate(mesh: WholeMesh, client: str = "", of_server: str = "", *, rules: str = "") -> None:
    """Give the pods these annotations, and wait until the agent has acted: the client's rules say `rules`."""
    mesh.resources(resources(client, of_server))

    def acted() -> bool:
        listed = [rules_of(mesh, pod) for pod in ("client", "server")]
        wanted = [client, of_server]
        return all(
            ("excluded" in text or "included" in text) == ("OutboundIP" in want or "Ports" in want)
            for text, want in zip(listed, wanted, strict=True)
        ) and (rules in listed[0])

    mesh.until(acted, f"the rules follow {client} {of_server}", LIMIT)


def rules_of(mesh: WholeMesh, pod: str) -> str:
    path = mesh.state.netns / mesh.pod(pod).metadata.uid
    return subprocess.run(
        ["nsenter", f"--net={path}", "nft", "list", "ruleset"], capture_output=True, text=True, check=True
    ).stdout


def dig(mesh: WholeMesh, *words: str) -> tuple[str, list[str]]:
    """The code and the records of an answer (name, TTL, class, type, data)."""
    done = mesh.exec("client", "dig", "+nocmd", "+noquestion", "+nostats", "+comments", "+answer", *words)
    code = re.search(r"status: (\w+)", done.stdout)
    lines = [line for line in done.stdout.splitlines() if line and not line.startswith(";")]
    return (code[1] if code else f"exit code {done.code}"), [" ".join(line.split()) for line in lines]


def data(answer: tuple[str, list[str]]) -> list[str]:
    code, records = answer
    assert code == "NOERROR", answer
    return sorted(record.split(" ", 4)[4] for record in records if " SOA " not in record)


def admin(mesh: WholeMesh, page: str) -> str:
    """A page of the proxy of the client's node."""
    socket = str(mesh.state.node("node-1") / "admin.sock")
    argv = ["curl", "-s", "--unix-socket", socket, f"http://proxy/{page}"]
    return subprocess.run(argv, capture_output=True, check=True, text=True).stdout


def counted(mesh: WholeMesh) -> dict[str, int]:
    """What it has counted."""
    found: dict[str, int] = json.loads(admin(mesh, "config_dump?sections=dns"))["dns"]
    return found


@pytest.mark.parametrize("transport", ["+notcp", "+tcp"])
def test_services_are_answered_and_the_rest_is_what_the_cluster_says(mesh: WholeMesh, transport: str) -> None:
    web, only4, pod = mesh.service("web"), mesh.service("only4"), mesh.pod("web")
    before = counted(mesh)

    def ask(name: str, kind: str = "A", *words: str) -> tuple[str, list[str]]:
        return dig(mesh, transport, *words, name, kind)

    assert data(ask(WEB)) == [web.addresses[0]]
    assert data(ask(WEB, "AAAA")) == [web.addresses[1]]
    assert data(ask("web", "A", "+search")) == [web.addresses[0]]
    assert data(ask("only4.default.svc.cluster.local")) == only4.addresses[:1]
    assert data(ask("peers.default.svc.cluster.local")) == [pod.addresses[0]]
    assert data(ask("peers.default.svc.cluster.local", "AAAA")) == [pod.addresses[1]]
    no_data = ask("only4.default.svc.cluster.local", "AAAA", "+authority")
    assert data(no_data) == []
    assert "SOA" in no_data[1][0]
    # The last step of a resolver's search list, at its first.
    assert data(ask(f"{WEB}.default.svc.cluster.local")) == [web.addresses[0], f"{WEB}."]
    assert counted(mesh)["upstream_requests"] == before["upstream_requests"]
    # Others' answers, through us.
    assert data(ask(f"_http._tcp.{WEB}", "SRV")) == [f"0 100 80 {WEB}."]
    reverse = ".".join(reversed(web.addresses[0].split("."))) + ".in-addr.arpa"
    assert data(ask(reverse, "PTR")) == [f"{WEB}."]
    assert data(ask(WEB, "TXT")) == []
    assert ask("nosuch.default.svc.cluster.local")[0] == "NXDOMAIN"
    assert ask("web.nosuch.svc.cluster.local")[0] == "NXDOMAIN"
    after = counted(mesh)
    assert after["upstream_requests"] == before["upstream_requests"] + 5
    labels = {
        "request_query_type": "srv",
        "request_protocol": transport.removeprefix("+").replace("notcp", "udp"),
        "source_canonical_service": "client",
        "source_canonical_revision": "latest",
    }
    samples = [one for family in parsed(admin(mesh, "metrics")) for one in family.samples]
    assert [one.value for one in samples if one.labels == labels] == [1, 1]
    assert {one.name for one in samples if one.labels == labels} == {
        "istio_dns_requests_total",
        "istio_dns_upstream_requests_total",
    }
    assert after["upstream_failures"] == before["upstream_failures"]


def test_programs_resolve_as_ever(mesh: WholeMesh) -> None:
    assert f"nameserver {DNS_VIP}" in mesh.exec("client", "cat", "/etc/resolv.conf").stdout
    web = mesh.service("web")
    for name in ("web", "web.default", "web.default.svc", WEB):
        for database, address in (("ahostsv4", web.addresses[0]), ("ahostsv6", web.addresses[1])):
            found = mesh.exec("client", "getent", database, name)
            assert found.stdout.split()[:1] == [address], (name, found)
        assert "hello" in mesh.curl("client", f"http://{name}/")
    assert mesh.exec("client", "getent", "hosts", "nosuch").code == 2


def test_edns_and_its_versions(mesh: WholeMesh) -> None:
    told = mesh.exec("client", "dig", "+edns=1", "+noednsnegotiation", WEB).stdout
    assert "status: BADVERS" in told
    told = mesh.exec("client", "dig", "+bufsize=4096", "+dnssec", WEB).stdout
    assert "EDNS: version: 0, flags: do; udp: 1232" in told
    assert "OPT" not in mesh.exec("client", "dig", "+noedns", WEB).stdout


def test_capture_goes_off_and_on_by_annotation(mesh: WholeMesh) -> None:
    def lifetime() -> int:
        return int(dig(mesh, WEB)[1][0].split()[1])

    assert lifetime() == OURS
    mesh.resources(resources('ambient.istio.io/dns-capture: "false"'))
    mesh.until(lambda: lifetime() == CLUSTERS, "the cluster's own DNS answers", LIMIT)
    asked = counted(mesh)["requests"]
    assert lifetime() == CLUSTERS
    assert counted(mesh)["requests"] == asked
    mesh.resources(resources())
    mesh.until(lambda: lifetime() == OURS, "the proxy answers", LIMIT)


# Asks for the Service, and for a record that is passed on, until its standard input ends; prints how often, and all
# answers that were none, or wrong. It takes 10 s for one to be lost.
ASKER = """
import os, select, socket, sys
web, server = sys.argv[1].encode(), (sys.argv[2], 53)
labels = b"".join(bytes([len(one)]) + one for one in web.split(b"."))
asked, wrong = 0, []
while not select.select([0], [], [], 0)[0]:
    for kind, wanted in ((1, socket.inet_aton(sys.argv[3])), (16, b"")):
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
            sock.settimeout(10)
            sock.connect(server)
            query = os.urandom(2) + b"\\1\\0\\0\\1\\0\\0\\0\\0\\0\\0" + labels + bytes([0, 0, kind, 0, 1])
            asked += 1
            try:
                sock.send(query)
                answer = sock.recv(4096)
            except OSError as error:
                wrong.append(repr(error))
                continue
            if answer[:2] != query[:2] or answer[3] & 15 or not answer.endswith(wanted):
                wrong.append(answer.hex())
print(asked, *wrong)
"""


def test_an_upgrade_of_the_proxy_loses_no_query(mesh: WholeMesh) -> None:
    address = mesh.service("web").addresses[0]
    pod = mesh.pod("client").metadata.uid
    with subprocess.Popen(
        ["nsenter", f"--net={mesh.state.netns / pod}", sys.executable, "-c", ASKER, WEB, DNS_VIP, address],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as asker:
        before = counted(mesh)["requests"]
        mesh.until(lambda: counted(mesh)["requests"] > before + 20, "the old proxy answers", LIMIT)
        mesh.ok("upgrade", "--node", "node-1")
        mesh.until(lambda: counted(mesh)["requests"] > 20, "the new proxy answers", LIMIT)
        asked, *wrong = asker.communicate("")[0].split()
    assert int(asked) > 40
    assert not wrong


def test_while_the_proxy_is_away_nothing_wrong_is_said(mesh: WholeMesh) -> None:
    right = [mesh.service("web").addresses[0]]
    nodes = {node["name"]: node for node in mesh.status()["nodes"]}
    pid = nodes["node-1"]["ztunnel"]["pid"]
    os.kill(pid, signal.SIGKILL)
    outcomes = []

    def back() -> bool:
        code, records = dig(mesh, "+tries=1", "+time=1", WEB)
        outcomes.append((code, [record.split()[4] for record in records]))
        status = {node["name"]: node for node in mesh.status()["nodes"]}["node-1"]["ztunnel"]
        return bool(code == "NOERROR" and status["ready"] and status["pid"] != pid)

    mesh.until(back, "DNS is back", LIMIT)
    assert all(answer == ("NOERROR", right) or answer[0].startswith("exit code") for answer in outcomes), (
        outcomes
    )


# Exceptions from capture.


def speak(mesh: WholeMesh, pod: str, address: str, port: int) -> None:
    """A connection to a program of the pod `server`, to its end."""
    conversation = mesh.connect(mesh.pod(pod), address, port)
    with contextlib.closing(conversation.connection) as connection:
        if port == ECHO:
            conversation.talk()
        else:
            connection.sendall(b"GET / HTTP/1.0\r\n\r\n")
            while connection.recv(4096):
                pass


def arrivals(mesh: WholeMesh, address: str, port: int) -> list[str]:
    """How connections got to a program on node 2, those that its proxy saw."""
    ends = (f"{address}:{port}", f"[{address}]:{port}")
    found = [one for one in mesh.access_log("node-2", direction="inbound") if one["dst.addr"] in ends]
    return [one["connection_security_policy"] for one in found]


def security(mesh: WholeMesh, address: str, port: int = HTTP) -> str:
    """Make a connection from the client, and see how it got there."""
    before = len(arrivals(mesh, address, port))
    speak(mesh, "client", address, port)
    (how,) = mesh.until(lambda: arrivals(mesh, address, port)[before:], "the connection is in the log", LIMIT)
    return "tunnel" if how == "mutual_tls" else "plain"


def test_exceptions_of_the_way_out_and_open_connections(mesh: WholeMesh) -> None:
    four, six = mesh.pod("server").addresses
    with mesh.connect(mesh.pod("client"), four) as kept:
        kept.talk()

        def routes() -> tuple[str, ...]:
            kept.talk()
            return tuple(
                security(mesh, address, port) for address, port in ((four, HTTP), (six, HTTP), (four, ECHO))
            )

        assert routes() == ("tunnel", "tunnel", "tunnel")
        annotate(mesh, f'{TRAFFIC}/excludeOutboundPorts: "{HTTP}, 5432"')
        assert routes() == ("plain", "plain", "tunnel")
        annotate(mesh, f'{TRAFFIC}/excludeOutboundIPRanges: "{four}/32,192.0.2.0/24"', rules="192.0.2.0/24")
        assert routes() == ("plain", "tunnel", "plain")
        annotate(mesh, f'{TRAFFIC}/excludeOutboundIPRanges: "{six}/120"', rules="excluded_ranges_ipv6")
        assert routes() == ("tunnel", "plain", "tunnel")
        annotate(
            mesh, f'{TRAFFIC}/includeOutboundIPRanges: "192.0.2.0/24,{six}/128"', rules="included_ranges_ipv6"
        )
        assert routes() == ("plain", "tunnel", "plain")
        annotate(mesh)
        assert routes() == ("tunnel", "tunnel", "tunnel")


def test_exceptions_of_the_way_in(mesh: WholeMesh) -> None:
    address = mesh.pod("server").addresses[0]

    def captured(port: int) -> bool:
        """Whether a connection from outside passes the proxy: one that does and comes later is in the log."""
        before, later = len(arrivals(mesh, address, port)), len(arrivals(mesh, address, ECHO))
        speak(mesh, "apart", address, port)
        if port not in excluded:
            mesh.until(lambda: arrivals(mesh, address, port)[before:], "the connection is in the log", LIMIT)
        speak(mesh, "apart", address, ECHO)
        mesh.until(lambda: arrivals(mesh, address, ECHO)[later:], "the later connection is in the log", LIMIT)
        return len(arrivals(mesh, address, port)) > before

    excluded: set[int] = set()
    assert captured(HTTP)
    annotate(mesh, "", f'{TRAFFIC}/excludeInboundPorts: "{HTTP}"')
    excluded.add(HTTP)
    assert not captured(HTTP)
    annotate(mesh)
    excluded.clear()
    assert captured(HTTP)


def test_what_cannot_be_read_is_reported_and_captured(mesh: WholeMesh) -> None:
    address = mesh.pod("server").addresses[0]
    annotate(
        mesh,
        f'{TRAFFIC}/excludeOutboundPorts: "{ECHO},http", {TRAFFIC}/includeOutboundIPRanges: "10.0.0.0/40"',
    )

    def messages() -> str:
        return " ".join(pod["message"] for pod in mesh.pods("client"))

    told = mesh.until(messages, "the pod says what is wrong", LIMIT)
    assert (
        f"metadata.annotations[{TRAFFIC}/excludeOutboundPorts]: 'http' is not a port from 1 to 65535" in told
    )
    assert (
        f"metadata.annotations[{TRAFFIC}/includeOutboundIPRanges]: '10.0.0.0/40' is not an IP range" in told
    )
    assert mesh.pod("client").metadata.annotations["ambient.istio.io/redirection"] == "enabled"
    assert security(mesh, address, ECHO) == "plain"
    assert security(mesh, address, HTTP) == "tunnel"
    annotate(mesh)
    mesh.until(lambda: not messages(), "nothing is wrong any more", LIMIT)
