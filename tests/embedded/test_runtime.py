"""Pods with real programs: started, found ready, started again, kept waiting for the mesh, ended with all they made."""

import contextlib
import os
import signal
import sys
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from functools import partial
from pathlib import Path
from typing import Any

import msgspec
import pytest
import trio

from ztunnel.embedded.environment import VariableError, command_line, environment, expand
from ztunnel.embedded.network import Network
from ztunnel.embedded.runtime import Runtime
from ztunnel.embedded.view import View
from ztunnel.inpod import netns
from ztunnel.store.directory import DirectoryStore, object_file
from ztunnel.store.models import (
    Container,
    ContainerPort,
    EnvVar,
    EnvVarSource,
    Namespace,
    Object,
    ObjectFieldSelector,
    ObjectMeta,
    Pod,
    PodIP,
    PodSpec,
    PodStatus,
    to_json,
)
from ztunnel.store.problems import Problem

SHELL = ["/bin/sh", "-c"]


class TestEnvironment:
    """Variables and their expansion."""

    pod = Pod(
        metadata=ObjectMeta(name="web-1", namespace="shop", uid="u1", labels={"app": "web"}),
        spec=PodSpec(node_name="node-2"),
        status=PodStatus(pod_ips=[PodIP(ip="10.244.2.9"), PodIP(ip="fd00:10:244:2::9")]),
    )

    @pytest.mark.parametrize(
        ("text", "expected"),
        [
            ("$(A)", "1"),
            ("x$(A)y$(B)", "x1y2"),
            ("$(MISSING)", "$(MISSING)"),
            ("$$(A)", "$(A)"),
            ("$$$(A)", "$1"),
            ("$A $", "$A $"),
            ("$(A", "$(A"),
        ],
    )
    def test_expansion_is_that_of_kubernetes(self, text: str, expected: str) -> None:
        assert expand(text, {"A": "1", "B": "2"}) == expected

    def test_the_pods_name_and_place_then_its_own_variables_in_order(self) -> None:
        container = Container(
            name="c",
            command=["serve"],
            args=["$(URL)", "$(HOME)"],
            env=[EnvVar(name="HOST", value="$(POD_IP)"), EnvVar(name="URL", value="http://$(HOST)/")],
        )
        variables = environment(self.pod, container, {"HOME": "/root", "SECRET": "x"})
        assert variables["POD_NAME"] == variables["HOSTNAME"] == "web-1"
        assert (variables["POD_NAMESPACE"], variables["NODE_NAME"]) == ("shop", "node-2")
        assert "SECRET" not in variables, "the supervisor's own environment is not the pod's"
        assert command_line(container, variables) == ["serve", "http://10.244.2.9/", "/root"]

    def test_fields_of_the_pod(self) -> None:
        def value(path: str) -> str:
            source = EnvVarSource(field_ref=ObjectFieldSelector(field_path=path))
            container = Container(name="c", env=[EnvVar(name="X", value_from=source)])
            return environment(self.pod, container, {})["X"]

        assert value("metadata.labels['app']") == "web"
        assert value("status.podIPs") == "10.244.2.9,fd00:10:244:2::9"
        assert value("spec.serviceAccountName") == "default"
        with pytest.raises(
            VariableError, match=r"container c: env X: fieldPath spec.x is unknown; known are"
        ):
            value("spec.x")


class Machine:
    """A runtime on two nodes, the objects it works on, and what it reported."""

    def __init__(self, state: Path) -> None:
        self.state = state
        self.objects = state / "objects"
        (self.objects / "Pod" / "default").mkdir(parents=True)
        self.store = DirectoryStore(self.objects)
        self.view = View()
        self.network = Network(state / "netns", 2)
        self.problems: dict[str, Problem] = {}
        self.told: list[str] = []
        self.runtime = Runtime(state, self.store, self.view, self.network, self.report)
        self._hosts = 1

    def report(self, key: str, problem: Problem | None) -> None:
        if problem is None:
            self.problems.pop(key, None)
        elif self.problems.get(key) != problem:
            self.problems[key] = problem
            self.told.append(str(problem))

    def put(self, obj: Object) -> None:
        path = self.objects / object_file(obj.key)
        path.parent.mkdir(parents=True, exist_ok=True)
        new = self.state / "new"
        new.write_bytes(to_json(obj))
        new.replace(path)

    def pod(self, name: str, *containers: Container, node: int = 1, **spec: Any) -> Pod:
        self._hosts += 1
        pod = Pod(
            metadata=ObjectMeta(name=name, namespace="default", uid=f"uid-{name}-{self._hosts}"),
            spec=PodSpec(containers=list(containers), node_name=f"node-{node}", **spec),
            status=PodStatus(
                pod_ips=[
                    PodIP(ip=f"10.244.{node}.{self._hosts}"),
                    PodIP(ip=f"fd00:10:244:{node}::{self._hosts}"),
                ]
            ),
        )
        self.put(pod)
        return pod

    def now(self, name: str) -> Pod:
        found = self.store.get(Pod, "default", name)
        assert found is not None
        return found

    async def until(self, condition: Callable[[], Any], what: str, limit: float = 10) -> Any:
        with trio.move_on_after(limit):
            while not (value := condition()):
                await trio.sleep(0.02)
            return value
        raise AssertionError(f"{what}: not so after {limit} s; problems {self.told}")

    async def ready(self, name: str) -> Pod:
        await self.until(lambda: self.now(name).ready, f"{name} is ready")
        return self.now(name)

    def log(self, name: str, container: str = "c") -> str:
        path = self.state / "logs" / "pods" / f"default_{name}_{container}.log"
        return path.read_text() if path.exists() else ""

    def processes(self, pod: Pod) -> list[int]:
        path = self.network.path(pod.metadata.uid)
        return netns.processes(path) if path.exists() else []


def sleepers(machine: Machine, pod: Pod, count: int) -> dict[str, int]:
    """The pids of a pod's `sleep` programs by how long they sleep, once there are so many and nothing else."""
    found = {}
    for pid in machine.processes(pod):
        with contextlib.suppress(OSError):
            words = Path(f"/proc/{pid}/cmdline").read_text().split("\0")
            found[words[1] if words[0] == "sleep" else f"?{pid}"] = pid
    return found if len(found) == count and not any(key.startswith("?") for key in found) else {}


def restarted(machine: Machine, times: int) -> bool:
    return machine.now("server").status.container_statuses[0].restart_count == times


def says(machine: Machine, name: str, words: str) -> bool:
    return machine.now(name).status.message.startswith(words)


@asynccontextmanager
async def machine_in(state: Path) -> AsyncIterator[Machine]:
    machine = Machine(state)
    machine.put(Namespace(metadata=ObjectMeta(name="default")))
    try:
        await trio.to_thread.run_sync(machine.network.start)
        async with trio.open_nursery() as nursery:
            await nursery.start(machine.view.run, machine.store)
            nursery.start_soon(machine.runtime.run)
            yield machine
            nursery.cancel_scope.cancel()
    finally:
        with trio.CancelScope(shield=True):
            await trio.to_thread.run_sync(machine.network.stop)


def script(text: str, *ports: ContainerPort, **fields: Any) -> Container:
    return Container(name="c", command=[*SHELL, text], ports=list(ports), **fields)


@pytest.mark.e2e
class TestRuntime:
    """On real namespaces."""

    async def test_a_program_sees_what_a_container_sees(self, tmp_path: Path) -> None:
        async with machine_in(tmp_path) as machine:
            pod = machine.pod(
                "looker",
                script(
                    "hostname; cat /etc/resolv.conf /etc/hosts; pwd; echo name=$POD_NAME node=$NODE_NAME;"
                    " grep ^hosts: /etc/nsswitch.conf; grep CapBnd /proc/self/status; exec sleep 1000",
                    working_dir="/usr",
                ),
                node=2,
            )
            await machine.ready("looker")
            log = await machine.until(
                lambda: "CapBnd" in machine.log("looker") and machine.log("looker"), "its log"
            )
            assert log.startswith(
                "looker\nnameserver 10.96.0.10\nsearch default.svc.cluster.local svc.cluster.local"
            )
            assert "options ndots:5" in log
            assert "hosts: files dns" in log
            for address in pod.addresses:
                assert f"{address}\tlooker" in log
            assert "/usr\nname=looker node=node-2" in log
            assert int(log.split("CapBnd:")[1].split()[0], 16) & 1 << 12 == 0, "no CAP_NET_ADMIN"
            assert "10.96.0.10" not in Path("/etc/resolv.conf").read_text(), "the machine's is untouched"
            status = machine.now("looker").status
            assert (status.phase, status.host_ip) == ("Running", "10.99.0.12")

    async def test_ready_when_its_port_is_open_and_nobody_connected(self, tmp_path: Path) -> None:
        code = (
            "import os, socket, time\n"
            f"while not os.path.exists({str(tmp_path / 'go')!r}): time.sleep(0.01)\n"
            "listener = socket.create_server(('::1', 8080), family=socket.AF_INET6)\n"
            "print(listener.accept())\n"
        )
        async with machine_in(tmp_path) as machine:
            port = ContainerPort(container_port=8080)
            machine.pod("server", Container(name="c", command=[sys.executable, "-uc", code], ports=[port]))
            await machine.until(lambda: machine.now("server").status.phase == "Running", "it runs")
            assert not machine.now("server").ready
            (tmp_path / "go").touch()
            await machine.ready("server")
            assert machine.log("server") == ""

    async def test_a_killed_program_is_started_again_with_a_growing_pause(self, tmp_path: Path) -> None:
        async with machine_in(tmp_path) as machine:
            pod = machine.pod("server", script("echo started; exec sleep 1000"))
            await machine.ready("server")
            for restarts in (1, 2):
                (pid,) = machine.processes(pod)
                os.kill(pid, signal.SIGKILL)
                await machine.until(
                    partial(restarted, machine, restarts),
                    "restart",
                )
                await machine.ready("server")
            status = machine.now("server").status.container_statuses[0]
            assert status.last_state.terminated is not None
            assert (status.last_state.terminated.exit_code, status.last_state.terminated.signal) == (137, 9)
            assert machine.log("server") == "started\n" * 3
            assert len(machine.told) == 1, "one fault, told once"
            assert "Pod default/server: container c was ended by SIGKILL" in machine.told[0]

    async def test_what_a_program_started_ends_with_it(self, tmp_path: Path) -> None:
        async with machine_in(tmp_path) as machine:
            pod = machine.pod("server", script("setsid sleep 1000 & sleep 1001 & exec sleep 1002"))
            await machine.ready("server")
            before = await machine.until(lambda: sleepers(machine, pod, 3), "three programs")
            os.kill(before["1002"], signal.SIGKILL)

            def others() -> dict[str, int]:
                found = sleepers(machine, pod, 3)
                return found if set(found.values()).isdisjoint(before.values()) else {}

            await machine.until(others, "three others")

    async def test_what_cannot_run_says_why_and_the_rest_runs(self, tmp_path: Path) -> None:
        plain = tmp_path / "plain"
        plain.write_text("not executable")
        async with machine_in(tmp_path) as machine:
            machine.pod("missing", Container(name="c", command=["no-such-program"]))
            machine.pod("plain", Container(name="c", command=[str(plain)]))
            machine.pod("nowhere", script("true", working_dir="/no/such/directory"))
            machine.pod("zero", Container(name="c", command=["echo", "a\0b"]))
            machine.pod("exits", script("echo oops; exit 3"))
            machine.pod("fine", script("exec sleep 1000"))
            await machine.ready("fine")
            for name, words in {
                "missing": "container c: program not found: no-such-program; install it",
                "plain": f"container c: {plain} may not be executed",
                "nowhere": "container c: workingDir /no/such/directory: No such file",
                "zero": "container c: command, args or env cannot be given to a program: embedded null byte",
                "exits": "container c exited with code 3 (its output: ",
            }.items():
                await machine.until(partial(says, machine, name, words), words)
                assert any(f"Pod default/{name}: {words}" in told for told in machine.told)
            status = machine.now("exits").status.container_statuses[0]
            assert status.last_state.terminated is not None
            assert status.last_state.terminated.exit_code == 3

    async def test_programs_of_a_mesh_pod_wait_until_it_is_redirected(self, tmp_path: Path) -> None:
        async with machine_in(tmp_path) as machine:
            labels = {"istio.io/dataplane-mode": "ambient"}
            machine.put(Namespace(metadata=ObjectMeta(name="default", labels=labels)))
            pod = machine.pod("member", script("echo started; exec sleep 1000"))
            await machine.until(
                lambda: machine.now("member").status.message == "waiting for redirection",
                "it says that it waits",
            )
            assert machine.processes(pod) == []
            assert machine.network.path(pod.metadata.uid).exists(), "the agent needs it to redirect"
            redirected = {"metadata": {"annotations": {"ambient.istio.io/redirection": "enabled"}}}
            machine.store.patch(Pod, "default", "member", redirected)
            await machine.ready("member")
            assert machine.now("member").status.message == ""

    async def test_deleting_ends_everything_it_started_even_what_ignores_it(self, tmp_path: Path) -> None:
        async with machine_in(tmp_path) as machine:
            pod = machine.pod(
                "family",
                script("trap '' TERM; setsid sleep 1000 & setsid -f sleep 1001; sleep 1002; sleep 1003"),
                termination_grace_period_seconds=1,
            )
            await machine.ready("family")
            members = await machine.until(
                lambda: len(m := machine.processes(pod)) == 4 and m, "four processes"
            )
            machine.store.delete(Pod, "default", "family")
            await machine.until(lambda: not machine.network.path(pod.metadata.uid).exists(), "it is gone")
            for pid in members:
                assert not running(pid)
            await machine.until(
                lambda: not (tmp_path / "pods" / pod.metadata.uid).exists(), "its files are gone"
            )

    async def test_a_program_may_end_in_its_own_time(self, tmp_path: Path) -> None:
        async with machine_in(tmp_path) as machine:
            pod = machine.pod("polite", script("trap 'echo bye; exit 0' TERM; while :; do sleep 0.05; done"))
            await machine.ready("polite")
            machine.store.delete(Pod, "default", "polite")
            await machine.until(lambda: not machine.network.path(pod.metadata.uid).exists(), "it is gone")
            assert machine.log("polite") == "bye\n"

    async def test_a_changed_pod_is_replaced_also_at_the_same_address(self, tmp_path: Path) -> None:
        async with machine_in(tmp_path) as machine:
            pod = machine.pod("server", script("echo one; exec sleep 1000"))
            await machine.ready("server")
            other = msgspec.structs.replace(
                pod,
                metadata=msgspec.structs.replace(pod.metadata, uid="another"),
                spec=msgspec.structs.replace(pod.spec, containers=[script("echo two; exec sleep 1000")]),
            )
            machine.put(other)
            await machine.until(lambda: machine.log("server") == "two\n", "the other one runs")
            await machine.ready("server")
            assert not machine.network.path(pod.metadata.uid).exists()

    async def test_run_to_completion(self, tmp_path: Path) -> None:
        async with machine_in(tmp_path) as machine:
            machine.pod("done", script("true"), restart_policy="Never")
            machine.pod("failed", script("exit 1"), restart_policy="Never")
            await machine.until(lambda: machine.now("done").status.phase == "Succeeded", "done")
            await machine.until(lambda: machine.now("failed").status.phase == "Failed", "failed")

    async def test_nothing_is_left_when_the_runtime_ends(self, tmp_path: Path) -> None:
        async with machine_in(tmp_path) as machine:
            pods = [machine.pod(f"p{i}", script("sleep 1000 & sleep 1000"), node=1 + i % 2) for i in range(6)]
            for pod in pods:
                await machine.ready(pod.name)
            members = await machine.until(
                lambda: len(m := [pid for pod in pods for pid in machine.processes(pod)]) == 18 and m,
                "18 processes",
            )
        assert not any(running(pid) for pid in members)
        assert str(tmp_path) not in Path("/proc/self/mounts").read_text()
        assert not list((tmp_path / "pods").iterdir())


def running(pid: int) -> bool:
    """Whether the process exists and has not ended (a zombie has)."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except OSError:
        return False
