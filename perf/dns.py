"""`python -m perf dns`: queries a second through DNS capture, beside the same queries to the same servers without it.

Two pods on one node, one in the mesh and one not, ask two servers: the cluster's own DNS, and one that answers
anything at once, which shows what passing a query on costs. The sides take turns.
"""

import argparse
import json
import os
import statistics
import sys
import textwrap
from collections.abc import Sequence
from typing import NamedTuple

from rich.console import Console

from perf.load import LoadError
from perf.scale.report import Figures, Part, show
from ztunnel.embedded.addresses import DNS_VIP
from ztunnel.embedded.testmesh import RunningMesh

WIDTH = 120
OPEN = 16  # queries under way at a time, each on a socket of its own

# A server that says NOERROR to everything, with nothing in it.
ECHO = """
import socket
server = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
server.bind(("0.0.0.0", 53))
while True:
    data, client = server.recvfrom(4096)
    server.sendto(data[:2] + b"\\x81\\x80" + data[4:], client)
"""

# Asks for argv[5] seconds; prints queries a second, p50 and p99 in microseconds, and how many were not answered.
LOAD = """
import json, select, socket, struct, sys, time
server, name, kind, count, seconds = sys.argv[1], sys.argv[2], int(sys.argv[3]), int(sys.argv[4]), float(sys.argv[5])
labels = b"".join(bytes([len(label)]) + label.encode() for label in name.split("."))
tail = b"\\x01\\0\\0\\1\\0\\0\\0\\0\\0\\0" + labels + b"\\0" + struct.pack("!HH", kind, 1)
poll, sockets, began, took, number, lost = select.epoll(), {}, {}, [], 0, 0

def ask(fd):
    global number
    number = (number + 1) & 0xFFFF
    began[fd] = time.perf_counter(), struct.pack("!H", number)
    sockets[fd].send(began[fd][1] + tail)

for _ in range(count):
    one = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
    one.setblocking(False)
    one.connect((server, 53))
    sockets[one.fileno()] = one
    poll.register(one, select.EPOLLIN)
start = time.perf_counter()
for fd in sockets:
    ask(fd)
while (now := time.perf_counter()) < start + seconds:
    ready = poll.poll(1)
    for fd, _ in ready:
        answer = sockets[fd].recv(4096)
        since, wanted = began[fd]
        if answer[:2] == wanted and answer[3] & 15 == 0:
            took.append(time.perf_counter() - since)
            ask(fd)
        else:
            lost += answer[:2] == wanted
            ask(fd)
    if not ready:
        lost += len(sockets)
        for fd in sockets:
            ask(fd)
took.sort()
at = lambda share: took[min(len(took) - 1, int(share * len(took)))] * 1e6
print(json.dumps([len(took) / (time.perf_counter() - start), at(0.5), at(0.99), lost]))
"""

POD = """
apiVersion: v1
kind: Pod
metadata: {{name: {name}, labels: {{istio.io/dataplane-mode: {mode}}}}}
spec:
  nodeName: {node}
  terminationGracePeriodSeconds: 0
  containers: [{{name: main, command: {command}}}]
---
"""
SERVICE = """
apiVersion: v1
kind: Service
metadata: {name: web}
spec: {selector: {app: web}, ports: [{port: 80}]}
"""


class Way(NamedTuple):
    """What is measured: which pod asks which server for what. `server` "" is the pod `echo`."""

    title: str
    pod: str
    server: str
    name: str
    kind: int


WEB, OTHER = "web.default.svc.cluster.local", "www.example.org"
WAYS = (
    Way("a Service: the cluster's DNS", "outside", DNS_VIP, WEB, 1),
    Way("a Service: captured, answered by the proxy", "inside", DNS_VIP, WEB, 1),
    Way("not ours (TXT): the cluster's DNS", "outside", DNS_VIP, WEB, 16),
    Way("not ours (TXT): captured, passed on to it", "inside", DNS_VIP, WEB, 16),
    Way("any name: a server that is fast", "outside", "", OTHER, 1),
    Way("any name: captured, passed on to it", "inside", "", OTHER, 1),
)


def main(argv: Sequence[str]) -> int:
    """Measure and print; the exit code: 1 where it cannot be measured, or queries went unanswered."""
    parser = argparse.ArgumentParser(
        prog="python -m perf dns",
        description="Queries a second through DNS capture, beside the same without it.",
        epilog="example: python -m perf dns --rounds 5",
    )
    parser.add_argument("--rounds", type=int, default=3, help="rounds; the sides take turns in each [3]")
    parser.add_argument("--seconds", type=float, default=2, help="seconds a measurement [2]")
    given = parser.parse_args(argv)
    if os.geteuid() != 0:
        print("error: benchmarks need root: a user namespace changes the numbers", file=sys.stderr)
        return 1
    try:
        found = measure(given.rounds, given.seconds)
    except LoadError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    lost = sum(int(numbers[3]) for rounds in found.values() for numbers in rounds)
    console = Console()
    show(Part("DNS", [figures(found)], []), Console(width=max(WIDTH, console.width)))
    if lost:
        print(f"error: {lost} queries were not answered", file=sys.stderr)
    return 1 if lost else 0


def figures(found: dict[str, list[list[float]]]) -> Figures:
    """The table: medians over the rounds."""
    rows: list[tuple[str | float | int, ...]] = []
    for title, rounds in found.items():
        rate, p50, p99, _ = (statistics.median(column) for column in zip(*rounds, strict=True))
        rows.append((title, round(rate), round(p50), round(p99)))
    return Figures(
        f"DNS over UDP, {OPEN} queries at a time", ("way", "queries/s", "p50, us", "p99, us"), rows
    )


def measure(rounds: int, seconds: float) -> dict[str, list[list[float]]]:
    """The numbers of each way, a list a round. Raises LoadError."""
    command = json.dumps([sys.executable, "-c", ECHO])
    idle = json.dumps(["sleep", "infinity"])
    resources = SERVICE + "---\n"
    resources += POD.format(name="inside", mode="ambient", node="node-1", command=idle)
    resources += POD.format(name="outside", mode="none", node="node-1", command=idle)
    resources += POD.format(name="echo", mode="none", node="node-2", command=command)
    found: dict[str, list[list[float]]] = {way.title: [] for way in WAYS}
    with RunningMesh(resources, workers=1) as mesh:
        mesh.wait_pods()
        mesh.until(lambda: mesh.pods("inside")[0]["mesh"], "the pod is in the mesh")
        echo = mesh.pods("echo")[0]["ip"]
        for _ in range(rounds):
            for way in WAYS:
                words = [way.server or echo, way.name, str(way.kind), str(OPEN), str(seconds)]
                done = mesh.exec(way.pod, sys.executable, "-c", textwrap.dedent(LOAD), *words)
                if done.code:
                    raise LoadError(f"{way.title}: {done.stderr.strip()[-300:]}")
                found[way.title].append(json.loads(done.stdout))
    return found
