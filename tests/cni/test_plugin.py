"""The CNI plugin, built as it is for hosts: without an agent, with one of the test's, and with the agent's own end."""

import json
import os
import random
import socket
import struct
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import trio
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from cni.attach import TRY_LATER, Answer, PluginServer, Question, error
from cni.plugin.build import BuildError, build

PREVIOUS = '{"cniVersion":"1.0.0","ips":[{"address":"10.1.2.3/24"}],  "dns":{} }'
ARGUMENTS = "IgnoreUnknown=1;K8S_POD_NAMESPACE=shop;K8S_POD_NAME=web-0;K8S_POD_UID=u-1"
LIMIT = 30


@pytest.fixture(scope="session")
def plugin(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build(tmp_path_factory.mktemp("plugin") / "ambient-cni")


@pytest.fixture(scope="session")
def checked(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same source with the compiler's checks of memory and arithmetic."""
    return build(tmp_path_factory.mktemp("plugin") / "checked", checked=True)


def config(place: Path, previous: str = PREVIOUS, **more: Any) -> bytes:
    whole = {
        "cniVersion": "1.0.0",
        "name": "net",
        "type": "ambient-cni",
        "socket": str(place / "agent"),
    } | more
    head = json.dumps(whole)[:-1]
    return f'{head}, "prevResult": {previous}}}'.encode()


def run(plugin: Path, command: str, stdin: bytes, **environment: str) -> subprocess.CompletedProcess[bytes]:
    given = {
        "CNI_COMMAND": command,
        "CNI_ARGS": ARGUMENTS,
        "CNI_CONTAINERID": "c",
        "CNI_NETNS": "/n",
        "CNI_IFNAME": "e",
    }
    return subprocess.run(
        [plugin],
        input=stdin,
        capture_output=True,
        timeout=LIMIT,
        env={**given, "ASAN_OPTIONS": "detect_leaks=0", **environment},
        check=False,
    )


Reply = Callable[[socket.socket, bytes], None]


@pytest.fixture
def agent(tmp_path: Path) -> Iterator[Callable[[Reply], list[bytes]]]:
    """Starts an agent that does what it is told with each question; the list of the questions."""
    listeners: list[socket.socket] = []
    threads: list[threading.Thread] = []

    def start(reply: Reply) -> list[bytes]:
        listener = socket.socket(socket.AF_UNIX)
        listener.bind(str(tmp_path / "agent"))
        listener.listen()
        listeners.append(listener)
        questions: list[bytes] = []

        def serve() -> None:
            while True:
                try:
                    connection, _ = listener.accept()
                except OSError:
                    return
                with connection:
                    (length,) = struct.unpack("!I", connection.recv(4, socket.MSG_WAITALL))
                    question = connection.recv(length, socket.MSG_WAITALL) if length else b""
                    questions.append(question)
                    reply(connection, question)

        threads.append(threading.Thread(target=serve, daemon=True))
        threads[-1].start()
        return questions

    yield start
    for listener in listeners:
        listener.shutdown(socket.SHUT_RDWR)
        listener.close()
    for thread in threads:
        thread.join(LIMIT)
        assert not thread.is_alive()


def says(status: int, body: bytes = b"") -> Reply:
    return lambda connection, _: connection.sendall(struct.pack("!II", status, len(body)) + body)


def failure(done: subprocess.CompletedProcess[bytes]) -> dict[str, Any]:
    assert done.returncode == 1, done
    told = json.loads(done.stdout)
    assert told["cniVersion"] == "1.0.0"
    return dict(told)


def test_it_is_small_and_needs_nothing_of_its_host(plugin: Path) -> None:
    assert plugin.stat().st_size < 1 << 20
    assert plugin.stat().st_mode & 0o777 == 0o755
    headers = subprocess.run(["ldd", plugin], capture_output=True, text=True, check=False)
    assert "not a dynamic executable" in headers.stdout + headers.stderr


def test_a_compiler_that_fails_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CC", "/bin/false")
    with pytest.raises(BuildError, match="/bin/false"):
        build(tmp_path / "plugin")
    assert list(tmp_path.iterdir()) == []


def test_it_says_which_versions_it_speaks(plugin: Path) -> None:
    done = run(plugin, "VERSION", b'{"cniVersion":"0.4.0"}')
    assert json.loads(done.stdout) == {
        "cniVersion": "0.4.0",
        "supportedVersions": ["0.3.0", "0.3.1", "0.4.0", "1.0.0", "1.1.0"],
    }
    assert done.returncode == 0
    assert json.loads(run(plugin, "VERSION", b"").stdout)["cniVersion"] == "1.0.0", "people give none"


def test_more_than_any_configuration_has_is_refused(plugin: Path) -> None:
    told = failure(run(plugin, "ADD", b" " * (9 << 20)))
    assert (told["code"], told["details"]) == (5, "File too large")


@pytest.mark.parametrize("command", ["CHECK", "GC", "STATUS"])
def test_commands_that_change_nothing_succeed(plugin: Path, tmp_path: Path, command: str) -> None:
    done = run(plugin, command, config(tmp_path))
    assert (done.returncode, done.stdout) == (0, b"")


@pytest.mark.parametrize("command", ["", "FROB"])
def test_an_unknown_command_is_refused(plugin: Path, tmp_path: Path, command: str) -> None:
    assert failure(run(plugin, command, config(tmp_path)))["code"] == 4


def test_without_a_command_people_are_told_what_it_is(plugin: Path) -> None:
    done = subprocess.run([plugin], input=b"{}", capture_output=True, env={}, timeout=LIMIT, check=False)
    assert json.loads(done.stdout)["code"] == 4
    assert b"container runtimes call it" in done.stderr


def test_the_agent_is_asked_and_its_yes_passes_the_result_on_unchanged(
    plugin: Path, tmp_path: Path, agent: Callable[[Reply], list[bytes]]
) -> None:
    questions = agent(says(0))
    done = run(plugin, "ADD", config(tmp_path))
    assert (done.returncode, done.stdout.decode()) == (0, PREVIOUS + "\n")
    head, _, rest = questions[0].partition(b"\0\0")
    assert rest == config(tmp_path)
    assert dict(entry.split(b"=", 1) for entry in head.split(b"\0")) == {
        b"CNI_COMMAND": b"ADD",
        b"CNI_ARGS": ARGUMENTS.encode(),
        b"CNI_CONTAINERID": b"c",
        b"CNI_NETNS": b"/n",
        b"CNI_IFNAME": b"e",
    }


def test_what_the_agent_says_is_printed(
    plugin: Path, tmp_path: Path, agent: Callable[[Reply], list[bytes]]
) -> None:
    large = b"x" * 300_000
    agent(says(1, large))
    done = run(plugin, "ADD", config(tmp_path))
    assert (done.returncode, done.stdout) == (1, large)


def test_a_pod_waits_while_the_agent_is_away(plugin: Path, tmp_path: Path) -> None:
    told = failure(run(plugin, "ADD", config(tmp_path)))
    assert told["code"] == TRY_LATER
    assert "pod shop/web-0 waits for the mesh" in told["msg"]
    assert "istio-cni-node" in told["details"]


def test_an_agent_that_restarts_is_waited_for(
    plugin: Path, tmp_path: Path, agent: Callable[[Reply], list[bytes]]
) -> None:
    done: list[subprocess.CompletedProcess[bytes]] = []
    thread = threading.Thread(target=lambda: done.append(run(plugin, "ADD", config(tmp_path))))
    thread.start()
    time.sleep(0.3)  # long enough for the plugin to find nobody; it would pass without, too
    agent(says(0))
    thread.join(LIMIT)
    assert done[0].returncode == 0


@pytest.mark.parametrize(
    "reply",
    [
        lambda connection, _: None,
        lambda connection, _: connection.sendall(b"\0\0\0"),
        lambda connection, _: connection.sendall(struct.pack("!II", 0, 100) + b"{"),
        lambda connection, _: connection.sendall(struct.pack("!II", 0, 1 << 31)),
        lambda connection, _: connection.sendall(struct.pack("!II", 7, 0)),
    ],
    ids=["nothing", "half a head", "half a body", "too long", "unknown status"],
)
def test_a_pod_waits_where_the_agent_ends_in_mid_sentence(
    plugin: Path, tmp_path: Path, agent: Callable[[Reply], list[bytes]], reply: Reply
) -> None:
    agent(reply)
    assert failure(run(plugin, "ADD", config(tmp_path)))["code"] == TRY_LATER


def test_pods_of_exempt_namespaces_start_without_the_agent(plugin: Path, tmp_path: Path) -> None:
    exempt = config(tmp_path, exempt_namespaces=["istio-system", "shop"])
    done = run(plugin, "ADD", exempt)
    assert (done.returncode, done.stdout.decode()) == (0, PREVIOUS + "\n")
    assert (
        failure(run(plugin, "ADD", config(tmp_path, exempt_namespaces=["sho", "shopp"])))["code"] == TRY_LATER
    )


def test_what_is_no_pod_passes(plugin: Path, tmp_path: Path) -> None:
    assert run(plugin, "ADD", config(tmp_path), CNI_ARGS="").returncode == 0
    assert run(plugin, "ADD", config(tmp_path), CNI_ARGS="A=1;K8S_POD_NAME=x").returncode == 0


@pytest.mark.parametrize("previous", ["null", "[]", '"text"'])
def test_it_must_follow_another_plugin(plugin: Path, tmp_path: Path, previous: str) -> None:
    told = failure(run(plugin, "ADD", config(tmp_path, previous), CNI_ARGS=""))
    assert told["code"] == 7
    assert ".conflist" in told["details"]


def test_the_end_of_a_pod_never_fails(
    plugin: Path, tmp_path: Path, agent: Callable[[Reply], list[bytes]]
) -> None:
    assert run(plugin, "DEL", config(tmp_path)).returncode == 0
    assert run(plugin, "DEL", b"").returncode == 0
    assert run(plugin, "DEL", b'{"socket":').returncode == 0
    assert run(plugin, "DEL", b" " * (9 << 20)).returncode == 0
    # One that says nothing is not waited for any longer than a second.
    released = threading.Event()

    def say_nothing(connection: socket.socket, question: bytes) -> None:
        released.wait(LIMIT)

    questions = agent(say_nothing)
    began = time.monotonic()
    assert run(plugin, "DEL", config(tmp_path)).returncode == 0
    assert time.monotonic() - began < LIMIT / 2
    released.set()
    assert b"CNI_COMMAND=DEL" in questions[0]


@pytest.mark.parametrize(
    "stdin", [b"", b"[]", b"{", b'{"a":1', b'{"a" 1}', b'{"a":1}}', b'{"a":[1}', b'{"a":"\\"}', b"\0"]
)
def test_a_configuration_that_is_no_object_is_refused(checked: Path, stdin: bytes) -> None:
    assert failure(run(checked, "ADD", stdin))["code"] == 6


def test_nesting_has_an_end(checked: Path, tmp_path: Path) -> None:
    deep = "[" * 200 + "]" * 200
    assert run(checked, "ADD", config(tmp_path, f'{{"a":{deep}}}'), CNI_ARGS="").returncode == 0
    deep = "[" * 100_000 + "]" * 100_000
    assert failure(run(checked, "ADD", config(tmp_path, f'{{"a":{deep}}}'), CNI_ARGS=""))["code"] == 6


def test_long_socket_names_and_pod_names_are_survived(checked: Path, tmp_path: Path) -> None:
    long = config(tmp_path, socket="/" + "x" * 5000)
    assert failure(run(checked, "ADD", long))["code"] == TRY_LATER
    told = failure(
        run(checked, "ADD", long, CNI_ARGS=f"K8S_POD_NAMESPACE={'n' * 9000};K8S_POD_NAME={'p' * 9000}")
    )
    assert told["code"] == TRY_LATER
    odd = failure(run(checked, "ADD", long, CNI_ARGS='K8S_POD_NAMESPACE=a"\\b\n;K8S_POD_NAME=ü'))
    assert 'a"\\b\n/' in odd["msg"]


JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats(allow_nan=False)
    | st.text(alphabet='{}[]",:\\ aü\n\t', max_size=8),
    lambda inner: (
        st.lists(inner, max_size=4)
        | st.dictionaries(st.text(alphabet='{"}prevResult\\', max_size=10), inner, max_size=4)
    ),
    max_leaves=12,
)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    st.dictionaries(st.text(max_size=4), JSON, max_size=3),
    st.dictionaries(st.text(max_size=4), JSON, max_size=3),
    st.booleans(),
)
def test_any_result_is_passed_on_byte_for_byte(
    checked: Path, others: dict[str, Any], previous: dict[str, Any], ascii_only: bool
) -> None:
    others.pop("prevResult", None)
    inner = json.dumps(previous, ensure_ascii=ascii_only, indent=random.choice([None, 1]))
    around = json.dumps(others, ensure_ascii=ascii_only)[:-1]
    whole = f'{around}{"," if others else ""}"prevResult" : {inner} ,"z":"}}"}}'
    done = run(checked, "ADD", whole.encode(), CNI_ARGS="")
    assert done.stdout.decode() == inner + "\n", done
    assert done.returncode == 0


@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.data())
def test_no_input_breaks_it(checked: Path, tmp_path: Path, data: st.DataObject) -> None:
    """What is broken is refused in good form, and what is not is passed on: never a crash, nor a read out of bounds."""
    text = bytearray(config(tmp_path, exempt_namespaces=["shop"]))
    for _ in range(data.draw(st.integers(1, 6))):
        place = data.draw(st.integers(0, len(text) - 1))
        text[place : place + data.draw(st.integers(0, 3))] = data.draw(
            st.binary(max_size=3) | st.sampled_from([b'"', b"{", b"}", b"\\", b"[", b"]", b","])
        )
        if not text:
            break
    done = run(checked, "ADD", bytes(text), CNI_ARGS="")
    assert done.returncode in (0, 1), done
    assert done.stderr == b""
    if done.returncode:
        told = json.loads(done.stdout)
        assert told["code"] in (6, 7)


def test_what_is_no_address_is_left_out() -> None:
    ips = [{"address": "10.1.2.3/24"}, {"address": "fd00::3/64"}, {"address": "x"}, {"address": 7}, {}, None]
    assert Question({}, {"prevResult": {"ips": ips}}).addresses == ("10.1.2.3", "fd00::3")
    assert Question({}, {"prevResult": {"ips": {}}}).addresses == ()


async def test_the_agents_end_answers_it(plugin: Path, tmp_path: Path) -> None:
    heard: list[Question] = []

    async def handle(question: Question) -> Answer:
        heard.append(question)
        return error(question, TRY_LATER, "not yet") if len(heard) > 1 else Answer()

    server = PluginServer(tmp_path / "agent", handle)
    async with trio.open_nursery() as nursery:
        await nursery.start(server.run)
        assert server.listening
        assert (tmp_path / "agent").stat().st_mode & 0o777 == 0o600
        done = await trio.to_thread.run_sync(run, plugin, "ADD", config(tmp_path))
        assert (done.returncode, done.stdout.decode()) == (0, PREVIOUS + "\n")
        assert heard[0].command == "ADD"
        assert heard[0].argument("K8S_POD_NAME") == "web-0"
        assert heard[0].addresses == ("10.1.2.3",)
        assert heard[0].namespace_file == "/n"
        told = failure(await trio.to_thread.run_sync(run, plugin, "ADD", config(tmp_path)))
        assert (told["code"], told["msg"]) == (TRY_LATER, "ambient-cni: not yet")
        nursery.cancel_scope.cancel()
    assert not (tmp_path / "agent").exists()


@pytest.mark.parametrize(
    "sent",
    [b"", b"\0", struct.pack("!I", 1 << 30), struct.pack("!I", 4) + b"\0\0{]", struct.pack("!I", 9) + b"A=1"],
)
async def test_the_agents_end_survives_what_is_no_question(tmp_path: Path, sent: bytes) -> None:
    async def handle(question: Question) -> Answer:
        raise AssertionError("this is no question")

    server = PluginServer(tmp_path / "agent", handle)
    async with trio.open_nursery() as nursery:
        await nursery.start(server.run)
        for _ in range(2):
            stream = await trio.open_unix_socket(os.fspath(tmp_path / "agent"))
            await stream.send_all(sent)
            await stream.send_eof()
            with trio.fail_after(LIMIT):
                answer = b""
                while part := await stream.receive_some():
                    answer += part
            assert json.loads(answer[8:])["code"] == 6
            await stream.aclose()
        nursery.cancel_scope.cancel()
