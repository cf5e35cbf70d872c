"""Log lines: their two forms, levels, and that nothing a peer names itself becomes a line or a field of its own."""

import json
import logging
import os
from collections.abc import Callable

import pytest

from ztunnel.telemetry.log import LEVELS, PIPE_BUF, Logger, adopt_standard_logging, fields, timestamp

Reader = Callable[[], list[str]]


@pytest.fixture
def pipe() -> tuple[int, Reader]:
    """A descriptor to log to, and a way to read the lines."""
    read, write = os.pipe()
    os.set_blocking(read, False)

    def lines() -> list[str]:
        try:
            return os.read(read, 1 << 20).decode().removesuffix("\n").split("\n")
        except BlockingIOError:
            return []

    return write, lines


def test_json_is_one_object_a_line(pipe: tuple[int, Reader]) -> None:
    fd, lines = pipe
    Logger("info", json=True, fd=fd, worker="1").info("xds", "synced", workloads=3, nothing=None)
    (line,) = lines()
    event = json.loads(line)
    assert event.pop("time").endswith("Z")
    assert event == {"level": "info", "scope": "xds", "message": "synced", "worker": "1", "workloads": 3}


def test_text_is_time_level_scope_message_and_fields(pipe: tuple[int, Reader]) -> None:
    fd, lines = pipe
    Logger("info", fd=fd).warn("worker", "is slow", pod="default/web", why="two words", empty="", number=0)
    (line,) = lines()
    assert line.split(" ", 1)[1] == 'warn  worker is slow pod=default/web why="two words" empty="" number=0'


@pytest.mark.parametrize("as_json", [True, False])
@pytest.mark.parametrize(
    "text", ["a\nb", "a\r\x1b[31mb", "a\x85b\u2028c", 'quoted " name', "x=1 y=2", "\udcff"]
)
def test_no_text_breaks_the_line(pipe: tuple[int, Reader], as_json: bool, text: str) -> None:
    fd, lines = pipe
    logger = Logger("info", json=as_json, fd=fd)
    logger.info("access", "connection complete", name=text)
    (line,) = lines()
    if as_json:
        assert json.loads(line)["name"] == text
    else:
        assert line.isprintable()
        assert "name=x=1" not in line
    assert "\x1b" not in line


def test_levels(pipe: tuple[int, Reader]) -> None:
    fd, lines = pipe
    logger = Logger("warn", fd=fd)
    for level in LEVELS:
        if level != "off":
            logger.log(level, "x", level)
    assert [line.split()[3] for line in lines()] == ["warn", "error"]
    logger.set_level("off")
    logger.error("x", "unheard")
    assert lines() == []
    with pytest.raises(ValueError, match="loud"):
        logger.set_level("loud")


def test_a_closed_log_does_not_end_the_proxy() -> None:
    read, write = os.pipe()
    os.close(write)
    Logger("info", fd=write).error("x", "into nowhere")
    os.close(read)


def test_workers_log_as_their_daemon_does(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in Logger("debug", json=True).environment().items():
        monkeypatch.setenv(name, value)
    worker = Logger.from_environment(worker="0")
    assert (worker.level, worker.json, worker.context) == ("debug", True, {"worker": "0"})


@pytest.mark.parametrize(("name", "value"), [("LOG_LEVEL", "loud"), ("LOG_FORMAT", "xml")])
def test_a_setting_that_cannot_be_used_is_named(
    monkeypatch: pytest.MonkeyPatch, name: str, value: str
) -> None:
    monkeypatch.setenv(name, value)
    with pytest.raises(ValueError, match=rf"^{name}: '{value}'"):
        Logger.from_environment()


def test_the_standard_librarys_logging_goes_the_same_way(pipe: tuple[int, Reader]) -> None:
    fd, lines = pipe
    root = logging.getLogger()
    handlers, level = root.handlers, root.level
    try:
        adopt_standard_logging(Logger("info", json=True, fd=fd))
        try:
            raise RuntimeError("a cause")
        except RuntimeError:
            logging.getLogger("ztunnel.inpod.zds").exception("it %s", "failed", extra=fields(uid="u-1"))
        logging.getLogger("ztunnel.inpod.zds").debug("unheard")
    finally:
        root.handlers = handlers
        root.setLevel(level)
    (line,) = lines()
    event = json.loads(line)
    assert (event["level"], event["scope"], event["message"]) == ("error", "inpod.zds", "it failed")
    assert event["uid"] == "u-1"
    assert event["error"] == "RuntimeError: a cause"
    assert "Traceback" in event["traceback"]


def test_a_message_of_several_lines_is_one_line_of_text(pipe: tuple[int, Reader]) -> None:
    fd, lines = pipe
    Logger("info", fd=fd).info("xds", "push\nforged", node="node-1", error="a b\nc", empty="")
    (line,) = lines()
    assert line.endswith(r'info  xds push\nforged node=node-1 error="a b\nc" empty=""')


def test_times_are_utc_with_microseconds() -> None:
    assert timestamp(0) == "1970-01-01T00:00:00.000000Z"
    assert timestamp(1700000000.25) == "2023-11-14T22:13:20.250000Z"


def test_gathered_lines_are_written_together_in_their_order(pipe: tuple[int, Reader]) -> None:
    fd, lines = pipe
    logger = Logger("info", fd=fd)
    asked: list[None] = []
    logger.gather(lambda: asked.append(None))
    for number in range(3):
        logger.line("info", "access", "connection complete", f" n={number}")
    assert (lines(), len(asked)) == ([], 1)
    logger.flush()
    assert [line[-1] for line in lines()] == ["0", "1", "2"]
    logger.flush()
    assert lines() == []
    logger.line("info", "access", "connection complete", " n=3")
    assert len(asked) == 2
    logger.warn("worker", "not gathered", n=4)
    logger.line("info", "access", "connection complete", " n=5")
    assert len(asked) == 3
    logger.flush()
    assert [line[-1] for line in lines()] == ["3", "4", "5"]


def test_no_more_is_gathered_than_a_pipe_takes_in_one_piece(monkeypatch: pytest.MonkeyPatch) -> None:
    written: list[bytes] = []

    def write(fd: int, data: bytes) -> int:
        written.append(data)
        return len(data)

    monkeypatch.setattr(os, "write", write)
    logger = Logger("info", json=True, fd=99)
    asked: list[None] = []
    logger.gather(lambda: asked.append(None))
    sizes = [100, 5000, 100, 4000, *[1300] * 10]
    for number, size in enumerate(sizes):
        logger.line("info", "access", "connection complete", f',"n":{number},"x":"{"x" * size}"')
    logger.flush()
    assert [json.loads(line)["n"] for line in b"".join(written).splitlines()] == list(range(len(sizes)))
    assert all(len(piece) <= PIPE_BUF or piece.count(b"\n") == 1 for piece in written)
    assert len(written) < len(sizes)
    assert all(piece.endswith(b"\n") for piece in written)


def test_what_the_level_hides_is_not_gathered(pipe: tuple[int, Reader]) -> None:
    fd, lines = pipe
    logger = Logger("warn", fd=fd)
    logger.gather(lambda: None)
    logger.line("info", "access", "connection complete", "")
    logger.flush()
    assert lines() == []
