"""The demo's programs for real, on the loopback address: the shop's roles, and the visitors that measure it."""

import contextlib
import json
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from ztunnel.cli.demo.http1 import Client, HttpError, encode, read_message

MARKER = "AMBIENT-MARKER-test"

Start = Callable[..., int]


@pytest.fixture
def start() -> Iterator[Start]:
    """Starts a role of the bookshop as a process and returns its port."""
    with contextlib.ExitStack() as stack:

        def run(role: str, *arguments: str) -> int:
            process = subprocess.Popen(
                [sys.executable, "-P", "-m", "ztunnel.cli.demo.bookshop", role, "--port", "0", *arguments],
                stdout=subprocess.PIPE,
                text=True,
            )
            stack.enter_context(process)
            stack.callback(process.kill)
            assert process.stdout is not None
            line = process.stdout.readline()
            assert "listening on port" in line
            return int(line.split()[-1])

        yield run


def visit(url: str, *arguments: str, marker: str = MARKER) -> list[dict[str, Any]]:
    done = subprocess.run(
        [sys.executable, "-P", "-m", "ztunnel.cli.demo.loadgen", url, "--marker", marker, *arguments],
        stdout=subprocess.PIPE,
        text=True,
        timeout=60,
        check=True,
    )
    return [json.loads(line) for line in done.stdout.splitlines()]


def shop(start: Start) -> int:
    ratings = start("ratings")
    reviews = start("reviews", "--version", "v2", "--calls", f"localhost:{ratings}")
    details = start("details")
    return start("productpage", "--calls", f"127.0.0.1:{details}", f"localhost:{reviews}")


def test_a_page_holds_what_the_other_services_said_and_the_marker(start: Start) -> None:
    client = Client("localhost", shop(start))
    status, body = client.get("/", {"x-bookshop-marker": MARKER})
    client.close()
    page = json.loads(body)
    assert status == 200
    assert page["service"] == "productpage"
    assert page["127.0.0.1"]["author"] == "William Shakespeare"
    assert page["localhost"]["version"] == "v2"
    assert page["localhost"]["localhost"]["ratings"] == {"Reviewer1": 5, "Reviewer2": 4}
    assert body.count(MARKER.encode()) == 4


def test_a_service_that_is_down_is_named_in_the_answer(start: Start) -> None:
    with socket.create_server(("127.0.0.1", 0)) as closed:
        port = closed.getsockname()[1]
    page = start("productpage", "--calls", f"127.0.0.1:{port}")
    client = Client("127.0.0.1", page)
    status, body = client.get("/", {})
    assert status == 502
    assert f"productpage cannot reach 127.0.0.1:{port}" in json.loads(body)["error"]
    assert client.get("/health", {})[0] == 200
    client.close()


def test_one_connection_carries_many_requests_and_both_families_are_served(start: Start) -> None:
    port = start("details")
    for host in ("127.0.0.1", "::1") if socket.has_dualstack_ipv6() else ("127.0.0.1",):
        with socket.create_connection((host, port), timeout=10) as connection:
            stream = connection.makefile("rb")
            for number in range(3):
                connection.sendall(
                    encode("GET / HTTP/1.1", {"Host": "details", "x-bookshop-marker": str(number)})
                )
                answer = read_message(stream)
                assert answer is not None
                assert json.loads(answer.body)["marker"] == str(number)
            connection.sendall(encode("GET / HTTP/1.1", {"Host": "details", "Connection": "close"}))
            assert read_message(stream) is not None
            assert read_message(stream) is None


def test_the_shop_leaves_when_the_visitor_does_and_survives_rubbish(start: Start) -> None:
    port = start("ratings")
    for rubbish in (b"\x16\x03\x01\0\0\0", b"GET / HTTP/1.1\r\nno colon\r\n\r\n", b"x" * 100_000):
        with socket.create_connection(("127.0.0.1", port), timeout=10) as connection:
            with contextlib.suppress(OSError):
                connection.sendall(rubbish)
                connection.shutdown(socket.SHUT_WR)
            with contextlib.suppress(ConnectionResetError):
                assert connection.recv(100) == b""
    with socket.create_connection(("127.0.0.1", port), timeout=10) as connection:
        connection.sendall(encode("POST / HTTP/1.1", {}, b"x"))
        answer = read_message(connection.makefile("rb"))
        assert answer is not None
        assert answer.start == "HTTP/1.1 405 Method Not Allowed"


def test_visitors_count_and_measure_every_request(start: Start) -> None:
    port = shop(start)
    arguments = ("--requests", "60", "--connections", "3", "--per-connection", "7", "--report", "0.05")
    *progress, last = visit(f"http://localhost:{port}/", *arguments, "--seconds", "30")
    assert last["done"] is True
    assert (last["requests"], last["failures"], last["errors"]) == (60, 0, {})
    assert 0 < last["p50_ms"] <= last["p99_ms"] < 10_000
    assert last["requests_per_second"] == pytest.approx(60 / last["seconds"], rel=0.1)
    assert [line["requests"] for line in progress] == sorted(line["requests"] for line in progress)
    assert not any("done" in line for line in progress)


def test_visitors_stop_when_their_time_is_up_and_when_told(start: Start) -> None:
    port = start("ratings")
    last = visit(f"http://127.0.0.1:{port}/", "--seconds", "0.4")[-1]
    assert last["requests"] > 0
    assert last["seconds"] < 10
    command = [sys.executable, "-P", "-m", "ztunnel.cli.demo.loadgen", f"http://127.0.0.1:{port}/"]
    command += ["--marker", MARKER, "--seconds", "60", "--report", "0.05"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    with process:
        assert process.stdout is not None
        process.stdout.readline()
        process.terminate()
        last = json.loads(process.stdout.read().splitlines()[-1])
    assert last["done"] is True
    assert last["failures"] == 0


def test_visitors_report_failures_with_their_reasons(start: Start) -> None:
    with socket.create_server(("127.0.0.1", 0)) as closed:
        port = closed.getsockname()[1]
    last = visit(f"http://127.0.0.1:{port}/", "--requests", "3", "--connections", "1")[-1]
    assert (last["requests"], last["failures"]) == (3, 3)
    assert list(last["errors"].values()) == [3]
    assert "refused" in next(iter(last["errors"]))
    shop_without_details = start("productpage", "--calls", f"127.0.0.1:{port}")
    last = visit(f"http://127.0.0.1:{shop_without_details}/", "--requests", "2", "--connections", "1")[-1]
    assert last["failures"] == 2
    assert next(iter(last["errors"])).startswith("HTTP 502")


def test_a_get_is_sent_again_only_where_the_server_closed_an_idle_connection() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        server.settimeout(10)
        client = Client("127.0.0.1", server.getsockname()[1])
        answers: list[int] = []

        def answer_once() -> None:
            connection, _ = server.accept()
            with connection:
                read_message(connection.makefile("rb"))
                connection.sendall(encode("HTTP/1.1 200 OK", {}, b"hello"))
                answers.append(1)

        def serve() -> None:
            answer_once()
            answer_once()
            connection, _ = server.accept()
            connection.close()

        thread = threading.Thread(target=serve)
        thread.start()
        assert client.get("/", {}) == (200, b"hello")
        assert client.get("/", {}) == (200, b"hello")
        client.close()
        with pytest.raises((HttpError, OSError)):
            client.get("/", {})
        thread.join(10)
    assert len(answers) == 2
