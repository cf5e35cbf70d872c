"""The node's rules for health probes, in a namespace of the test's own, with real connections into a pod's."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from cni.probes import table
from cni.rules import PROBE_SOURCES

pytestmark = pytest.mark.e2e
LIMIT = 60

# In a new network namespace, so that `HostProbes`, which works in its own process's, is in it.
SCRIPT = """
import json, os, socket, subprocess, sys, tempfile, threading
import trio
from cni.probes import HostProbes
from ztunnel.inpod import netns

told = {}
folder = tempfile.mkdtemp()
pod, other = f"{folder}/pod", f"{folder}/other"

def run(*words):
    subprocess.run(words, check=True)

def inside(path, *words):
    run("nsenter", f"--net={path}", *words)

def setup():
    run("ip", "link", "set", "lo", "up")
    for number, path in ((1, pod), (2, other)):
        netns.create(path)
        run("ip", "link", "add", f"veth{number}", "type", "veth", "peer", "name", "eth0", "netns", path)
        run("ip", "address", "add", f"10.9.{number}.1/24", "dev", f"veth{number}")
        run("ip", "address", "add", f"fd09:{number}::1/64", "dev", f"veth{number}", "nodad")
        run("ip", "link", "set", f"veth{number}", "up")
        inside(path, "ip", "link", "set", "lo", "up")
        inside(path, "ip", "address", "add", f"10.9.{number}.2/24", "dev", "eth0")
        inside(path, "ip", "address", "add", f"fd09:{number}::2/64", "dev", "eth0", "nodad")
        inside(path, "ip", "link", "set", "eth0", "up")
        inside(path, "ip", "route", "add", "default", "via", f"10.9.{number}.1")
        inside(path, "ip", "-6", "route", "add", "default", "via", f"fd09:{number}::1")
    with open("/proc/sys/net/ipv4/ip_forward", "w") as file:
        file.write("1")

def listener(path, family, address):
    descriptor = netns.open_path(path)
    with netns.inside(descriptor):
        made = socket.socket(family)
        made.bind((address, 7000))
        made.listen()
    os.close(descriptor)
    return made

def seen(listening, address, path=None, uid=0):
    '''Which source the pod sees of a connection from here (or from another pod, or another user).'''
    connect = f"s = socket.create_connection(({address!r}, 7000), 5); s.sendall(b'x'); s.recv(1)"
    code = f"import encodings.idna, os, socket; os.seteuid({uid}); {connect}"
    words = [sys.executable, "-c", code]
    if path:
        words = ["nsenter", f"--net={path}", *words]
    client = subprocess.Popen(words)
    listening.settimeout(20)
    connection, source = listening.accept()
    connection.recv(1)
    connection.sendall(b"y")
    assert client.wait(20) == 0
    connection.close()
    return source[0]

async def main():
    probes = HostProbes(name="probes_test")
    await probes.reconcile()
    four, six = listener(pod, socket.AF_INET, "10.9.1.2"), listener(pod, socket.AF_INET6, "fd09:1::2")
    told["before"] = seen(four, "10.9.1.2")
    await probes.admit("a", ["10.9.1.2", "fd09:1::2"])
    told["problem"] = probes.problem
    told["probe"] = seen(four, "10.9.1.2")
    told["probe6"] = seen(six, "fd09:1::2")
    told["forwarded"] = seen(four, "10.9.1.2", path=other)
    told["another user"] = seen(four, "10.9.1.2", uid=65534)
    told["again"] = await probes.reconcile()
    run("nft", "delete", "element", "inet", "probes_test", "probed_ipv4", "{ 10.9.1.2 }")
    told["repaired"] = await probes.reconcile()
    told["probe again"] = seen(four, "10.9.1.2")
    # Somebody takes the table away; the next change finds it gone and writes it anew.
    run("nft", "delete", "table", "inet", "probes_test")
    await probes.admit("b", ["10.9.2.2"])
    told["after loss"] = seen(four, "10.9.1.2")
    await probes.dismiss("a")
    told["dismissed"] = seen(four, "10.9.1.2")
    await probes.remove()
    told["tables"] = subprocess.run(["nft", "list", "tables"], capture_output=True, text=True).stdout

setup()
try:
    trio.run(main)
finally:
    for path in (pod, other):
        netns.remove(path)
    os.rmdir(folder)
print(json.dumps(told))
"""


def test_only_the_kubelets_own_connections_to_pods_of_the_mesh_are_rewritten(tmp_path: Path) -> None:
    done = subprocess.run(
        ["unshare", "-n", sys.executable, "-c", SCRIPT],
        capture_output=True,
        text=True,
        timeout=LIMIT,
        cwd=tmp_path,
    )
    assert done.returncode == 0, done.stderr
    told = json.loads(done.stdout)
    assert told.pop("problem") == ""
    assert told.pop("again") == []
    assert "probed_ipv4" in told.pop("repaired")[0]
    assert told == {
        "before": "10.9.1.1",
        "probe": "169.254.7.127",
        "probe6": "fd16:9254:7127:1337:ffff:ffff:ffff:ffff",
        "forwarded": "10.9.2.2",
        "another user": "10.9.1.1",
        "probe again": "169.254.7.127",
        "after loss": "169.254.7.127",
        "dismissed": "10.9.1.1",
        "tables": "",
    }


def test_the_rules_are_one_for_each_family() -> None:
    made = table([*PROBE_SOURCES], kubelet_uid=7)
    assert [len(each.elements) for each in made.sets] == [1, 1]
    assert [rule.comment for rule in made.chains[0].rules] == ["health probes, IPv4", "health probes, IPv6"]
