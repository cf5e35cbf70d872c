"""The node agent with a real store, real pods, real rules, and the proxy's own end of ZDS."""

import os
import signal
import subprocess
import sys
from collections.abc import AsyncIterator, Iterator
from contextlib import closing
from pathlib import Path

import pytest
import trio

from cni import rules
from cni.agent import Agent, Config
from cni.rules import Settings, State
from tests.cni.conftest import LIMIT, open_descriptors, wait_until
from ztunnel.embedded.testing import Lab, LabPod
from ztunnel.inpod import zds
from ztunnel.inpod.pods import WorkloadInfo
from ztunnel.store.directory import DirectoryStore
from ztunnel.store.membership import MODE_LABEL, REDIRECTION_ANNOTATION, REDIRECTION_ERROR_ANNOTATION
from ztunnel.store.models import Container, Namespace, ObjectMeta, Phase, Pod, PodSpec, PodStatus

pytestmark = pytest.mark.e2e

PLAIN = Settings()


class TinyProxy:
    """Takes pods as ztunnel does, and notes how far each namespace was when it was handed over."""

    def __init__(self) -> None:
        self.served: dict[str, WorkloadInfo] = {}
        self.at_handover: dict[str, State] = {}
        self.refuse = ""
        self.calls: list[str] = []
        self.synced = False

    async def add(self, uid: str, info: WorkloadInfo, netns_fd: int) -> None:
        with closing(os.fdopen(netns_fd, "rb")):
            self.calls.append(f"add {uid}")
            if self.refuse:
                raise RuntimeError(self.refuse)
            self.at_handover[uid] = await trio.to_thread.run_sync(rules.state, netns_fd, PLAIN)
            self.served[uid] = info

    async def delete(self, uid: str) -> None:
        self.calls.append(f"delete {uid}")
        self.served.pop(uid, None)

    def known(self) -> set[str]:
        return set(self.served)

    def on_state(self, synced: bool) -> None:
        self.synced = synced

    async def run(self, path: Path) -> None:
        await zds.run(str(path), self, on_state=self.on_state)


class World:
    """A node with pods, their objects in a store, and an agent for them."""

    def __init__(self, lab: Lab, directory: Path) -> None:
        self.lab = lab
        self.directory = directory
        self.store = DirectoryStore(directory / "objects")
        (directory / "objects").mkdir()
        self.zds = directory / "zds"
        self.proxy = TinyProxy()
        self.label("ambient")

    def config(self, **options: float) -> Config:
        settings = {"grace": 0.0, "patience": LIMIT} | options
        return Config(
            "node-1", self.directory / "objects", self.directory / "netns", self.zds,
            grace=settings["grace"], patience=settings["patience"],
            reconcile_interval=settings.get("reconcile_interval", 600.0),
        )  # fmt: skip

    def label(self, mode: str) -> None:
        """Set the mode of the pods' namespace; "": none."""
        labels = {MODE_LABEL: mode} if mode else {}
        self.store.apply(Namespace(metadata=ObjectMeta(name="default", labels=labels)))

    def declare(self, name: str, uid: str, phase: Phase = "Running", **options: object) -> None:
        """Write the pod's object."""
        self.store.apply(
            Pod(
                metadata=ObjectMeta(
                    name=name, namespace="default", uid=uid, labels=options.get("labels", {}),  # type: ignore[arg-type]
                    annotations=options.get("annotations", {}),  # type: ignore[arg-type]
                ),
                spec=PodSpec(
                    node_name=str(options.get("node", "node-1")), service_account_name="clerk",
                    host_network=bool(options.get("host_network", False)),
                    containers=[Container(name="main", command=["true"])],
                ),
                status=PodStatus(phase=phase),
            )
        )  # fmt: skip

    def pod(self, name: str, phase: Phase = "Running", **options: object) -> LabPod:
        """A pod with its namespace and its object."""
        pod = self.lab.pod(name)
        self.declare(name, pod.uid, phase, **options)
        return pod

    def annotation(self, name: str, annotation: str = REDIRECTION_ANNOTATION) -> str:
        found = DirectoryStore(self.directory / "objects").get(Pod, "default", name)
        return found.metadata.annotations.get(annotation, "") if found else ""

    def error(self, name: str) -> str:
        return self.annotation(name, REDIRECTION_ERROR_ANNOTATION)

    def state(self, pod: LabPod) -> State:
        descriptor = pod.open()
        try:
            return rules.state(descriptor, PLAIN)
        finally:
            os.close(descriptor)

    async def enabled(self, name: str) -> None:
        await wait_until(lambda: self.annotation(name) == "enabled")

    async def start(self, nursery: trio.Nursery, **options: float) -> None:
        """Run an agent in this process, and the proxy."""
        nursery.start_soon(self.proxy.run, self.zds)
        await nursery.start(Agent(self.config(**options)).run)

    def process(self, preamble: str = "", **env: str) -> subprocess.Popen[str]:
        """Run an agent as a process of its own."""
        code = f"{preamble}\nimport sys\nfrom cni.agent import main\nsys.exit(main())"
        where = [
            "--store",
            self.directory / "objects",
            "--netns-dir",
            self.directory / "netns",
            "--zds",
            self.zds,
        ]
        return subprocess.Popen(
            [sys.executable, "-c", code, "--node", "node-1", *map(str, where)],
            stderr=subprocess.PIPE, text=True, env=os.environ | {"LOG_FORMAT": "json"} | env,
        )  # fmt: skip


@pytest.fixture
def world(tmp_path: Path) -> Iterator[World]:
    with Lab(tmp_path, nodes=1) as lab:
        yield World(lab, tmp_path)


@pytest.fixture
async def agents() -> AsyncIterator[trio.Nursery]:
    """Where agents and proxies run; they end with the test."""
    async with trio.open_nursery() as nursery:
        yield nursery
        nursery.cancel_scope.cancel()


def handles(pod: LabPod) -> str:
    """The rules with the numbers that the kernel counts up: the same text is the very same rules."""
    return pod.check(["nft", "-a", "list", "ruleset"]).stdout


async def test_a_running_pod_gets_its_listeners_before_its_rules(world: World, agents: trio.Nursery) -> None:
    pod = world.pod("web")
    await world.start(agents)
    await world.enabled("web")
    assert world.proxy.at_handover == {pod.uid: State.ABSENT}
    assert world.proxy.served == {pod.uid: WorkloadInfo("web", "default", "clerk")}
    assert world.state(pod) is State.REDIRECTED
    assert world.error("web") == ""


async def test_a_pod_that_has_not_started_gets_its_rules_first(world: World, agents: trio.Nursery) -> None:
    await world.start(agents)
    world.proxy.refuse = "not yet"
    pod = world.pod("web", "Pending")
    await wait_until(lambda: "not yet" in world.error("web"))
    assert world.state(pod) is State.REDIRECTED
    assert world.annotation("web") == "", "announced only when ztunnel has it"
    world.proxy.refuse = ""
    await world.enabled("web")
    assert world.proxy.at_handover == {pod.uid: State.REDIRECTED}
    assert world.error("web") == ""


async def test_only_this_nodes_pods_that_want_the_mesh_join(world: World, agents: trio.Nursery) -> None:
    apart = [
        world.pod("opted-out", labels={MODE_LABEL: "none"}),
        world.pod("elsewhere", node="node-2"),
        world.pod("on-the-host", host_network=True),
        world.pod("ended", "Succeeded"),
    ]
    world.pod("web")
    await world.start(agents)
    await world.enabled("web")
    world.label("")
    await wait_until(lambda: not world.proxy.served)
    joined = world.pod("opted-in", labels={MODE_LABEL: "ambient"})
    await world.enabled("opted-in")
    assert set(world.proxy.served) == {joined.uid}
    for pod in apart:
        assert world.state(pod) is State.ABSENT
        assert world.annotation(pod.name) == world.error(pod.name) == ""


async def test_a_pod_leaves_and_comes_back_and_its_connections_stay(
    world: World, agents: trio.Nursery
) -> None:
    pod, peer = world.pod("web"), world.pod("peer", labels={MODE_LABEL: "none"})
    await world.start(agents)
    await world.enabled("web")
    with closing(pod.listen(15001)) as capture, closing(peer.listen(8080)) as server:
        capture.settimeout(LIMIT)
        server.settimeout(LIMIT)
        with closing(pod.connect(peer.ip4, 8080)) as client:
            captured = capture.accept()[0]
            with closing(captured):
                world.label("")
                await wait_until(lambda: not world.proxy.served)
                assert world.annotation("web") == ""
                assert world.state(pod) is State.DRAINED
                client.sendall(b"still here")
                assert captured.recv(100) == b"still here"
                with closing(pod.connect(peer.ip4, 8080)) as straight:
                    server.accept()[0].close()
                    straight.close()
                world.label("ambient")
                await world.enabled("web")
                assert world.state(pod) is State.REDIRECTED
                world.label("")
                await wait_until(lambda: world.state(pod) is State.DRAINED)
                captured.sendall(b"and back")
                assert client.recv(100) == b"and back"
        await wait_until(lambda: world.state(pod) is State.ABSENT)
    world.label("ambient")
    await world.enabled("web")
    assert world.state(pod) is State.REDIRECTED


async def test_what_is_wrong_is_written_on_the_pod_and_tried_again(
    world: World, agents: trio.Nursery
) -> None:
    pod = world.pod("web")
    other = world.pod("other")
    pod.check(["ip", "link", "set", "lo", "down"])
    await world.start(agents)
    await wait_until(lambda: "ip link set lo up" in world.error("web"))
    assert world.annotation("web") == ""
    await world.enabled("other")
    assert world.state(other) is State.REDIRECTED
    pod.check(["ip", "link", "set", "lo", "up"])
    await world.enabled("web")
    assert world.error("web") == ""
    world.proxy.refuse = "out of files"
    third = world.pod("third")
    await wait_until(lambda: "out of files" in world.error("third"))
    assert world.annotation("third") == ""
    assert world.state(third) is State.ABSENT, "no redirection to listeners that are not there"
    world.proxy.refuse = ""
    await world.enabled("third")
    assert world.error("third") == ""


async def test_a_pod_waits_for_ztunnel_and_says_so(world: World, agents: trio.Nursery) -> None:
    pod = world.pod("web")
    await agents.start(Agent(world.config(patience=0.1)).run)
    await wait_until(lambda: "ztunnel is not connected" in world.error("web"))
    assert (world.annotation("web"), world.state(pod)) == ("", State.ABSENT)
    agents.start_soon(world.proxy.run, world.zds)
    await world.enabled("web")
    assert world.error("web") == ""


async def test_a_namespace_that_comes_late_is_waited_for(world: World, agents: trio.Nursery) -> None:
    await world.start(agents)
    world.declare("late", "default-late-uid", "Pending")
    (world.directory / "netns").mkdir(exist_ok=True)
    # The file is there before the namespace is mounted on it.
    await wait_until(lambda: world.proxy.synced)
    pod = world.lab.pod("late")
    await world.enabled("late")
    assert world.state(pod) is State.REDIRECTED


async def test_pods_deleted_and_replaced_are_dropped(world: World, agents: trio.Nursery) -> None:
    first = world.pod("web")
    await world.start(agents)
    await world.enabled("web")
    world.store.delete(Pod, "default", "web")
    await wait_until(lambda: not world.proxy.served)
    world.lab.remove(first)
    second = world.lab.pod("second")
    world.declare("web", second.uid)
    await world.enabled("web")
    assert set(world.proxy.served) == {second.uid}
    third = world.lab.pod("third")
    world.declare("web", third.uid)
    await wait_until(lambda: set(world.proxy.served) == {third.uid})
    await world.enabled("web")


async def test_a_restarted_ztunnel_gets_every_pod_again(world: World, agents: trio.Nursery) -> None:
    world.pod("web")
    pod = world.pod("api")
    await agents.start(Agent(world.config()).run)
    async with trio.open_nursery() as first:
        first.start_soon(world.proxy.run, world.zds)
        await world.enabled("web")
        await world.enabled("api")
        first.cancel_scope.cancel()
    before = handles(pod)
    world.proxy = TinyProxy()
    agents.start_soon(world.proxy.run, world.zds)
    await wait_until(lambda: world.proxy.synced)
    assert len(world.proxy.served) == 2
    assert world.annotation("web") == world.annotation("api") == "enabled"
    assert handles(pod) == before


async def test_rules_that_somebody_changed_are_repaired(world: World, agents: trio.Nursery) -> None:
    pod = world.pod("web")
    await world.start(agents, reconcile_interval=0.2)
    await world.enabled("web")
    pod.check(["nft", "flush", "ruleset"])
    pod.check(["ip", "rule", "flush"])
    await wait_until(lambda: world.state(pod) is State.REDIRECTED)
    assert world.annotation("web") == "enabled"


async def test_settings_of_the_pod_are_followed(world: World, agents: trio.Nursery) -> None:
    pod = world.pod("web", annotations={"ambient.istio.io/bypass-inbound-capture": "true"})
    await world.start(agents)
    await world.enabled("web")
    assert "15006" not in handles(pod)
    world.store.patch(
        Pod,
        "default",
        "web",
        {"metadata": {"annotations": {"ambient.istio.io/bypass-inbound-capture": None}}},
    )
    await wait_until(lambda: "15006" in handles(pod))
    assert world.annotation("web") == "enabled"


async def test_an_annotation_that_somebody_removed_is_written_again(
    world: World, agents: trio.Nursery
) -> None:
    pod = world.pod("web")
    await world.start(agents, reconcile_interval=0.2)
    await world.enabled("web")
    world.declare("web", pod.uid)
    await world.enabled("web")


async def test_joining_and_leaving_leaves_nothing_open(world: World, agents: trio.Nursery) -> None:
    pod = world.pod("web")
    await world.start(agents)
    await world.enabled("web")
    before = open_descriptors()
    for _ in range(5):
        world.label("")
        await wait_until(lambda: world.state(pod) is State.ABSENT)
        world.label("ambient")
        await world.enabled("web")
    # The agent may have been in the middle of something when they were counted first.
    await wait_until(lambda: open_descriptors() <= before)


async def test_killed_and_started_again_it_disturbs_nothing(world: World, agents: trio.Nursery) -> None:
    pod, leaving = world.pod("web"), world.pod("leaving")
    agents.start_soon(world.proxy.run, world.zds)
    first = world.process()
    second = None
    try:
        await world.enabled("web")
        await world.enabled("leaving")
        with closing(pod.listen(15001)) as capture:
            capture.settimeout(LIMIT)
            with closing(pod.connect("10.9.8.7", 80)) as client, closing(capture.accept()[0]) as captured:
                before = handles(pod)
                first.kill()
                first.wait()
                await wait_until(lambda: not world.proxy.synced)
                assert pod.uid in world.proxy.served
                # While nobody is there: one pod leaves, one comes.
                world.store.patch(Pod, "default", "leaving", {"metadata": {"labels": {MODE_LABEL: "none"}}})
                world.pod("new")
                second = world.process()
                await world.enabled("new")
                await wait_until(lambda: world.state(leaving) is State.ABSENT)
                assert handles(pod) == before
                assert "delete default-web-uid" not in world.proxy.calls
                client.sendall(b"still here")
                assert captured.recv(100) == b"still here"
        second.send_signal(signal.SIGTERM)
        assert second.wait(LIMIT) == 0
        assert not world.zds.exists()
        assert handles(pod) == before, "what is redirected stays so"
        assert world.annotation("web") == "enabled"
    finally:
        for process in filter(None, (first, second)):
            process.kill()
            process.communicate()


# The kernel refuses netfilter sockets to this process as one without nftables refuses them to all.
NO_NFTABLES = """
import ctypes, platform, struct
number = {"x86_64": 41, "aarch64": 198}[platform.machine()]
def step(code, value, yes=0, no=0): return struct.pack("HBBI", code, yes, no, value)
LOAD, EQUAL, RETURN = 0x20, 0x15, 0x06
program = b"".join([
    step(LOAD, 0), step(EQUAL, number, 0, 5),
    step(LOAD, 16), step(EQUAL, 16, 0, 3),
    step(LOAD, 32), step(EQUAL, 12, 0, 1),
    step(RETURN, 0x00050000 | 93), step(RETURN, 0x7fff0000),
])
libc = ctypes.CDLL(None, use_errno=True)
buffer = ctypes.create_string_buffer(program, len(program))
filter = ctypes.create_string_buffer(struct.pack("HxxxxxxP", len(program) // 8, ctypes.addressof(buffer)))
assert libc.prctl(38, 1, 0, 0, 0) == 0
assert libc.prctl(22, 2, filter, 0, 0) == 0, ctypes.get_errno()
"""


async def test_on_a_node_without_nftables_it_says_what_is_missing_and_works_on(
    world: World, agents: trio.Nursery
) -> None:
    pod = world.pod("web", "Pending")
    world.pod("apart", labels={MODE_LABEL: "none"})
    agents.start_soon(world.proxy.run, world.zds)
    process = world.process(NO_NFTABLES)
    try:
        await wait_until(lambda: "modprobe" in world.error("web"))
        assert "nf_tables" in world.error("web")
        assert world.annotation("web") == ""
        assert world.state(pod) is not State.REDIRECTED
        await wait_until(lambda: world.proxy.synced)
        assert process.poll() is None
        assert world.error("apart") == ""
        world.pod("more")
        await wait_until(lambda: "modprobe" in world.error("more"))
    finally:
        process.kill()
        logged = process.communicate()[1]
    assert '"level":"error"' in logged
    assert logged.count("Pod default/web:") == 1, "said once, not at every attempt"


async def test_a_second_agent_on_the_same_socket_is_refused(world: World, agents: trio.Nursery) -> None:
    await world.start(agents)
    process = world.process()
    logged = (await trio.to_thread.run_sync(process.communicate))[1]
    assert process.returncode == 1
    assert "another node agent listens" in logged
    await wait_until(lambda: world.proxy.synced)


async def test_it_waits_for_its_store(world: World, agents: trio.Nursery) -> None:
    pod = world.pod("web")
    objects = world.directory / "objects"
    objects.rename(world.directory / "elsewhere")
    agents.start_soon(world.proxy.run, world.zds)
    agents.start_soon(Agent(world.config()).run)
    with trio.move_on_after(0.3):
        await wait_until(lambda: world.zds.exists())
    assert not world.zds.exists(), "an empty snapshot would drop every pod"
    (world.directory / "elsewhere").rename(objects)
    await world.enabled("web")
    assert world.state(pod) is State.REDIRECTED


def test_an_agent_started_as_a_module_explains_itself() -> None:
    for module in ("cni", "cni.agent"):
        told = subprocess.run(
            [sys.executable, "-m", module, "--help"], capture_output=True, text=True, timeout=60, check=True
        ).stdout
        assert "--netns-dir" in told


async def test_exceptions_change_on_a_running_pod(world: World, agents: trio.Nursery) -> None:
    ports, ranges = (
        "traffic.sidecar.istio.io/excludeOutboundPorts",
        "traffic.sidecar.istio.io/excludeOutboundIPRanges",
    )
    pod = world.pod("web", annotations={ports: "5432"})
    await world.start(agents)
    await world.enabled("web")
    assert "elements = { 5432 }" in handles(pod)
    assert world.error("web") == ""
    enabled = {REDIRECTION_ANNOTATION: "enabled"}
    world.declare("web", pod.uid, annotations={ports: "5432,6379,x", ranges: "10.0.0.0/8", **enabled})
    await wait_until(lambda: "elements = { 5432, 6379 }" in handles(pod) and "10.0.0.0/8" in handles(pod))
    await wait_until(lambda: f"metadata.annotations[{ports}]: 'x' is not a port" in world.error("web"))
    assert world.annotation("web") == "enabled"
    before = handles(pod)
    world.declare("web", pod.uid, annotations={ports: "6379,5432", ranges: "10.0.0.0/8", **enabled})
    await wait_until(lambda: world.error("web") == "")
    assert handles(pod) == before, "the same rules in other words are left alone"
    world.declare("web", pod.uid, annotations=enabled)
    await wait_until(lambda: "excluded" not in handles(pod))
    assert world.state(pod) is State.REDIRECTED
