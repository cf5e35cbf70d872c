"""What the CNI plugin is answered: real namespaces and rules, with an API server and a ztunnel of the test's."""

import json
import os
import socket
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any, cast

import msgspec
import pytest
import trio

from cni import joining, places, rules
from cni.agent import Agent, Config
from cni.attach import TRY_LATER, Answer, Question
from cni.counting import STEPS, Counters
from cni.joining import MIRRORED, Joining
from cni.pages import Pages, outside
from cni.places import Runtime
from cni.probes import HostProbes
from cni.reporting import Annotations, Events, Reporter
from cni.rules import Settings, State
from cni.ruleset import RulesetError
from tests.cni.conftest import wait_until
from tests.cni.test_agent import TinyProxy
from ztunnel.embedded.testing import Lab, LabPod
from ztunnel.store.directory import DirectoryStore
from ztunnel.store.kube.api import Api, ApiError
from ztunnel.store.membership import MODE_LABEL, REDIRECTION_ANNOTATION
from ztunnel.store.models import Container, Namespace, ObjectMeta, Pod, PodIP, PodSpec, PodStatus

pytestmark = pytest.mark.e2e
LIMIT = 30.0
PLAIN = Settings()


class Server:
    """An API server's answers, and what was written to it and said of objects."""

    def __init__(self) -> None:
        self.objects: dict[str, Any] = {}
        self.failure: ApiError | None = None
        self.patches: list[dict[str, Any]] = []
        self.events: list[tuple[str, str, str]] = []

    def put(self, obj: Pod | Namespace) -> None:
        kind = "namespaces" if isinstance(obj, Namespace) else f"namespaces/{obj.namespace}/pods"
        self.objects[f"/api/v1/{kind}/{obj.name}"] = obj

    def request(self, method: str, path: str, **options: Any) -> bytes:
        if self.failure is not None:
            raise self.failure
        if path not in self.objects:
            raise ApiError(404, "NotFound", f"{path} not found")
        return msgspec.json.encode(self.objects[path])

    def patch(
        self, version: str, kind: str, space: str, name: str, merge: dict[str, Any], part: str = ""
    ) -> None:
        assert (version, kind, part) == ("v1", "Pod", "status")
        if self.failure is not None:
            raise self.failure
        self.patches.append(merge["metadata"])

    def event(self, about: dict[str, str], *, reason: str, message: str, type: str = "") -> None:  # noqa: A002
        self.events.append((about["name"], reason, message))


class NoProbes(HostProbes):
    """Notes whose probes shall pass; the rules have tests of their own."""

    async def admit(self, uid: str, addresses: Any) -> None:
        if addresses:
            self.admitted[uid] = tuple(addresses)

    async def dismiss(self, uid: str) -> None:
        self.admitted.pop(uid, None)

    def __init__(self) -> None:
        super().__init__()
        self.admitted: dict[str, tuple[str, ...]] = {}
        self.problem = ""


class World:
    """A node with an agent, whose store is a directory: what it hears of comes when the test writes it there."""

    def __init__(self, lab: Lab, directory: Path) -> None:
        self.lab = lab
        (directory / "objects").mkdir()
        self.store = DirectoryStore(directory / "objects")
        self.server = Server()
        api = cast(Api, self.server)
        self.counters = Counters()
        self.probes = NoProbes()
        self.places = Runtime(directory / "netns")
        self.events = Events(api)
        self.reporter = Reporter(self.events, self.counters, self.probes, Annotations(api), "node-1")
        self.agent = Agent(
            Config("node-1", Path(), Path(), directory / "zds", patience=LIMIT, grace=0.0, reconcile_interval=600.0),
            store=self.store, places=self.places, writer=Annotations(api), observer=self.reporter,
        )  # fmt: skip
        self.proxy = TinyProxy()
        self.zds = directory / "zds"
        self.joining = Joining(self.agent, api, self.places, self.probes, self.counters)

    @asynccontextmanager
    async def running(self, *, proxy: bool = True) -> AsyncIterator[trio.Nursery]:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self.events.run)
            await nursery.start(self.agent.run)
            if proxy:
                nursery.start_soon(self.proxy.run, self.zds)
            yield nursery
            nursery.cancel_scope.cancel()

    def namespace(self, mode: str) -> Namespace:
        return Namespace(metadata=ObjectMeta(name="shop", labels={MODE_LABEL: mode} if mode else {}))

    def pod(self, uid: str, name: str = "web", **labels: str) -> Pod:
        return Pod(
            metadata=ObjectMeta(name=name, namespace="shop", uid=uid, labels=labels),
            spec=PodSpec(node_name="node-1", service_account_name="clerk", containers=[Container(name="c")]),
            status=PodStatus(phase="Pending"),
        )

    def state(self, pod: LabPod) -> State:
        descriptor = pod.open()
        try:
            return rules.state(descriptor, PLAIN)
        finally:
            os.close(descriptor)


def question(
    pod: LabPod | None, command: str = "ADD", uid: str = "", name: str = "web", sandbox: str = ""
) -> Question:
    arguments = f"K8S_POD_NAMESPACE=shop;K8S_POD_NAME={name};K8S_POD_UID={uid or (pod.uid if pod else '')}"
    environment = {
        "CNI_COMMAND": command,
        "CNI_ARGS": arguments,
        "CNI_CONTAINERID": sandbox or (pod.uid if pod else ""),
        "CNI_NETNS": f"/var/run/netns/{pod.uid}" if pod else "" if sandbox else "/var/run/netns/none",
    }
    return Question(environment, {"cniVersion": "1.0.0", "prevResult": {"ips": [{"address": "10.1.2.3/24"}]}})


def refusal(answer: Answer) -> str:
    assert answer.status == 1
    told = json.loads(answer.body)
    assert told["code"] == TRY_LATER
    return str(told["msg"])


@pytest.fixture
def world(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[World]:
    monkeypatch.setattr(places, "SCAN_PAUSE", 0.0)
    with Lab(tmp_path, nodes=1) as lab:
        yield World(lab, tmp_path)


async def test_a_pod_is_in_when_it_is_answered(world: World) -> None:
    web = world.lab.pod("web")
    world.server.put(world.namespace("ambient"))
    world.server.put(world.pod(web.uid))
    async with world.running():
        # Nothing of it has been heard yet.
        assert await world.joining.handle(question(web)) == Answer()
        assert world.state(web) is State.REDIRECTED
        assert web.uid in world.proxy.served
        assert world.probes.admitted[web.uid] == ("10.1.2.3",)
        await wait_until(lambda: world.server.patches, LIMIT)
        assert world.server.patches[0]["uid"] == web.uid
        assert world.server.patches[0]["annotations"][REDIRECTION_ANNOTATION] == "enabled"
        (keeper,) = world.agent.states()
        assert keeper.joined
        assert outside(keeper) == ""
        assert world.counters.adds == {"joined": 1}


async def test_one_whose_labels_do_not_ask_for_it_starts_outside(world: World) -> None:
    web, lone = world.lab.pod("web"), world.lab.pod("lone")
    world.server.put(world.namespace("ambient"))
    world.server.put(world.pod(web.uid, **{MODE_LABEL: "none"}))
    async with world.running():
        assert await world.joining.handle(question(web)) == Answer()
        assert world.state(web) is State.ABSENT
        world.server.put(world.namespace(""))
        world.server.put(world.pod(lone.uid, "lone"))
        assert await world.joining.handle(question(lone, name="lone")) == Answer()
        assert world.state(lone) is State.ABSENT
        assert world.proxy.served == {}
        assert world.counters.adds == {"outside": 2}


async def test_a_label_that_was_set_a_moment_ago_counts(world: World) -> None:
    """The watch is behind: it knows the pod and a namespace without the label."""
    web = world.lab.pod("web")
    world.store.apply(world.namespace(""))
    world.store.apply(world.pod(web.uid))
    world.server.put(world.namespace("ambient"))
    world.server.put(world.pod(web.uid))
    async with world.running():
        assert await world.joining.handle(question(web)) == Answer()
        assert world.state(web) is State.REDIRECTED
        # And it stays so when something older is heard in between.
        world.store.apply(world.pod(web.uid, app="web"))
        await wait_until(lambda: world.agent.pod("shop", "web") == world.store.get(Pod, "shop", "web"), LIMIT)
        world.store.apply(world.namespace("ambient"))
        await wait_until(lambda: world.agent.namespace("shop") == world.namespace("ambient"), LIMIT)
        assert world.state(web) is State.REDIRECTED


async def test_a_label_that_was_taken_away_counts_when_it_is_heard_of(world: World) -> None:
    web = world.lab.pod("web")
    world.store.apply(world.namespace("ambient"))
    world.store.apply(world.pod(web.uid))
    world.server.put(world.namespace("ambient"))
    world.server.put(world.pod(web.uid))
    async with world.running():
        assert await world.joining.handle(question(web)) == Answer()
        world.store.apply(world.namespace(""))
        await wait_until(lambda: world.state(web) is State.ABSENT, LIMIT)
        await wait_until(lambda: web.uid not in world.probes.admitted, LIMIT)


async def test_without_ztunnel_the_pod_waits_behind_its_rules(world: World) -> None:
    web = world.lab.pod("web")
    world.agent._node.patience = 0.05
    world.server.put(world.namespace("ambient"))
    world.server.put(world.pod(web.uid))
    async with world.running(proxy=False) as nursery:
        told = refusal(await world.joining.handle(question(web)))
        assert "pod shop/web waits for the mesh: ztunnel is not connected" in told
        assert world.state(web) is State.REDIRECTED
        await wait_until(lambda: world.server.events, LIMIT)
        assert world.server.events[0][:2] == ("web", "RedirectionFailed")
        (keeper,) = world.agent.states()
        assert "ztunnel" in outside(keeper)
        world.agent._node.patience = LIMIT
        nursery.start_soon(world.proxy.run, world.zds)
        assert await world.joining.handle(question(web)) == Answer()


async def test_a_ztunnel_that_refuses_is_quoted(world: World) -> None:
    web = world.lab.pod("web")
    world.proxy.refuse = "no certificate"
    world.server.put(world.namespace("ambient"))
    world.server.put(world.pod(web.uid))
    async with world.running():
        assert "no certificate" in refusal(await world.joining.handle(question(web)))


async def test_while_the_api_server_is_away_what_was_heard_counts(world: World) -> None:
    web, new = world.lab.pod("web"), world.lab.pod("new")
    world.store.apply(world.namespace("ambient"))
    world.store.apply(world.pod(web.uid))
    world.server.failure = ApiError(0, "Unreachable", "API server: cannot be reached")
    async with world.running():
        assert await world.joining.handle(question(web)) == Answer()
        assert world.state(web) is State.REDIRECTED
        told = refusal(await world.joining.handle(question(new, name="new")))
        assert "whether it belongs to the mesh is not known: API server: cannot be reached" in told
        assert world.state(new) is State.ABSENT


@pytest.mark.parametrize(
    ("prepare", "told"),
    [
        (lambda world, web: None, "the API server does not know it"),
        (lambda world, web: world.server.put(world.pod("another")), "another pod of this name"),
    ],
    ids=["deleted", "replaced"],
)
async def test_a_pod_that_is_gone_is_not_started(world: World, prepare: Any, told: str) -> None:
    web = world.lab.pod("web")
    world.server.put(world.namespace("ambient"))
    prepare(world, web)
    async with world.running():
        assert told in refusal(await world.joining.handle(question(web)))
        assert list(world.agent.states()) == []


async def test_a_namespace_that_cannot_be_seen_is_told(world: World) -> None:
    world.server.put(world.namespace("ambient"))
    world.server.put(world.pod("u"))
    async with world.running():
        assert "HostToContainer" in refusal(await world.joining.handle(question(None, uid="u")))


async def test_before_it_knows_the_node_it_lets_nobody_start(world: World) -> None:
    assert "the node agent starts" in refusal(await world.joining.handle(question(None)))


async def test_a_new_sandbox_of_the_same_pod_joins_anew(world: World) -> None:
    first, second = world.lab.pod("web"), world.lab.pod("second")
    world.server.put(world.namespace("ambient"))
    world.server.put(world.pod("u"))
    async with world.running():
        assert await world.joining.handle(question(first, uid="u")) == Answer()
        await world.joining.handle(question(first, "DEL", uid="u"))
        await wait_until(lambda: "u" not in world.proxy.served, LIMIT)
        assert await world.joining.handle(question(second, uid="u")) == Answer()
        assert world.state(second) is State.REDIRECTED
        # The old one's end comes late, and once more, and once more when its namespace is gone.
        await world.joining.handle(question(first, "DEL", uid="u"))
        await world.joining.handle(question(None, "DEL", uid="u", sandbox=first.uid))
        assert world.state(second) is State.REDIRECTED
        (keeper,) = world.agent.states()
        assert await world.places.find(keeper.goal) is not None
        assert "u" in world.proxy.served


async def test_the_end_of_a_static_pod_is_that_of_its_mirror(world: World) -> None:
    """The kubelet knows it by another uid than the API server."""
    web = world.lab.pod("web")
    world.server.put(world.namespace("ambient"))
    pod = world.pod("mirror")
    pod.metadata.annotations[MIRRORED] = web.uid
    world.server.put(pod)
    world.store.apply(pod)
    async with world.running():
        assert await world.joining.handle(question(web)) == Answer()
        assert "mirror" in world.proxy.served
        await world.joining.handle(question(web, "DEL"))
        await wait_until(lambda: world.proxy.served == {}, LIMIT)


async def test_a_pod_of_which_the_store_never_tells_is_forgotten_with_its_network(world: World) -> None:
    """It was deleted, and that was told, between the API server's answer and its being admitted."""
    web = world.lab.pod("web")
    world.server.put(world.namespace("ambient"))
    world.server.put(world.pod(web.uid))
    async with world.running():
        assert await world.joining.handle(question(web)) == Answer()
        await world.joining.handle(question(web, "DEL"))
        await wait_until(lambda: world.proxy.served == {} and world.probes.admitted == {}, LIMIT)
        assert list(world.agent.states()) == []
        # A new sandbox of it is as welcome as the first.
        again = world.lab.pod("again")
        assert await world.joining.handle(question(again, uid=web.uid)) == Answer()
        assert world.state(again) is State.REDIRECTED


async def test_rules_that_the_kernel_does_not_take_keep_the_pod_waiting(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Although ztunnel, which is asked at the same time, says yes."""
    web = world.lab.pod("web")
    world.server.put(world.namespace("ambient"))
    world.server.put(world.pod(web.uid))

    def refuse(namespace: int, settings: Settings) -> list[str]:
        raise RulesetError("nftables: no")

    async with world.running():
        with monkeypatch.context() as patched:
            patched.setattr(rules, "apply", refuse)
            assert "nftables: no" in refusal(await world.joining.handle(question(web)))
            assert world.state(web) is State.ABSENT
        assert await world.joining.handle(question(web)) == Answer()
        assert world.state(web) is State.REDIRECTED
        assert web.uid in world.proxy.served


async def test_a_pod_that_is_deleted_while_it_joins_holds_nobody_up(world: World) -> None:
    web = world.lab.pod("web")
    world.store.apply(world.namespace("ambient"))
    world.store.apply(world.pod(web.uid))
    world.server.put(world.namespace("ambient"))
    world.server.put(world.pod(web.uid))
    answers: list[Answer] = []
    async with world.running(proxy=False):
        async with trio.open_nursery() as nursery:

            async def ask() -> None:
                answers.append(await world.joining.handle(question(web)))

            nursery.start_soon(ask)
            await wait_until(lambda: world.state(web) is State.REDIRECTED, LIMIT)
            world.store.delete(Pod, "shop", "web")
        assert "it is gone" in refusal(answers[0])
        await wait_until(lambda: list(world.agent.states()) == [], LIMIT)
        assert world.probes.admitted == {}


async def test_other_commands_and_what_is_no_pod_pass(world: World) -> None:
    assert await world.joining.handle(Question({"CNI_COMMAND": "CHECK"}, {})) == Answer()
    assert await world.joining.handle(Question({"CNI_COMMAND": "ADD"}, {})) == Answer()
    assert await world.joining.handle(Question({"CNI_COMMAND": "DEL"}, {})) == Answer()


async def test_leaving_takes_every_pod_out_even_if_nothing_can_be_written(world: World) -> None:
    web = world.lab.pod("web")
    pod = world.pod(web.uid)
    world.store.apply(world.namespace("ambient"))
    world.store.apply(
        msgspec.structs.replace(pod, status=PodStatus(phase="Running", pod_ips=[PodIP(ip=web.ip4)]))
    )
    async with world.running():
        # Found by its address: the plugin has said nothing.
        await wait_until(
            lambda: web.uid in world.proxy.served and world.state(web) is State.REDIRECTED, LIMIT
        )
        world.server.failure = ApiError(403, "Forbidden", "no")
        with trio.fail_after(LIMIT):
            await world.agent.leave(LIMIT)
        assert world.state(web) is State.ABSENT
        assert world.proxy.served == {}
        assert world.probes.admitted == {}


async def test_pods_that_never_can_join_are_told_why_once(world: World) -> None:
    hosted = world.pod("h", "hosted")
    hosted = msgspec.structs.replace(hosted, spec=msgspec.structs.replace(hosted.spec, host_network=True))
    world.store.apply(world.namespace(""))
    world.store.apply(hosted)
    async with world.running():
        world.store.apply(world.namespace("ambient"))
        await wait_until(lambda: world.server.events, LIMIT)
        world.store.apply(world.namespace("ambient"))
        assert world.server.events[0][:2] == ("hosted", "RedirectionNotSupported")
        assert "hostNetwork" in world.server.events[0][2]
        assert [pod.name for pod, _ in world.reporter.unable()] == ["hosted"]
        world.store.delete(Pod, "shop", "hosted")
        await wait_until(lambda: world.reporter.unable() == [], LIMIT)
    assert len(world.server.events) == 1


async def test_the_pages_say_how_the_node_is(world: World) -> None:
    class Done:
        ready = True
        problem = ""

    web = world.lab.pod("web")
    world.server.put(world.namespace("ambient"))
    world.server.put(world.pod(web.uid))
    ports = []
    for _ in range(3):
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            ports.append(free.getsockname()[1])
    listening = [False]
    pages = Pages(
        world.agent, cast(Any, Done()), world.probes, world.reporter, world.counters, lambda: listening[0]
    )

    async def get(port: int, path: str) -> tuple[int, str]:
        stream = await trio.open_tcp_stream("127.0.0.1", port)
        async with stream:
            await stream.send_all(f"GET {path} HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n".encode())
            answer = b""
            while part := await stream.receive_some():
                answer += part
        head, _, body = answer.partition(b"\r\n\r\n")
        return int(head.split()[1]), body.decode()

    async with world.running() as nursery:
        nursery.start_soon(lambda: pages.run(host="127.0.0.1", ports=(ports[0], ports[1], ports[2])))
        await world.joining.handle(question(web))
        with trio.fail_after(LIMIT):
            while True:
                try:
                    status, body = await get(ports[0], "/readyz")
                    break
                except OSError:
                    await trio.sleep(0.01)
        assert (status, body) == (503, "the CNI plugin is not listened to\n")
        listening[0] = True
        assert await get(ports[0], "/readyz") == (200, "ok\n")
        assert (await get(ports[0], "/healthz"))[0] == 200
        assert (await get(ports[0], "/pods"))[0] == 404, "what pods there are is told on loopback only"
        _, text = await get(ports[1], "/metrics")
        lines = text.splitlines()
        for line in (
            "ztunnel_connected 1",
            "istio_cni_install_ready 1",
            "istio_cni_pods_in_mesh 1",
            "istio_cni_pods_outside_mesh 0",
            'istio_cni_plugin_requests_total{result="joined"} 1',
            'istio_cni_plugin_request_duration_seconds_bucket{le="+Inf"} 1',
            *(f'istio_cni_plugin_step_duration_seconds_count{{step="{step}"}} 1' for step in STEPS),
        ):
            assert line in lines
        page = json.loads((await get(ports[2], "/pods"))[1])
        assert page["problems"] == []
        assert [(pod["name"], pod["joined"], pod["problem"]) for pod in page["pods"]] == [("web", True, "")]


def test_the_time_for_a_pod_to_join_is_within_the_plugins() -> None:
    source = (Path(joining.__file__).parent / "plugin" / "ambient-cni.c").read_text()
    (limit,) = [int(line.split()[2]) for line in source.splitlines() if line.startswith("#define ADD_LIMIT")]
    assert limit / 1000 > joining.API_PATIENCE + joining.JOIN_PATIENCE
