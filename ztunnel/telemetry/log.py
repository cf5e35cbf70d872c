"""Structured log lines on standard error: one line an event, JSON or text, each written by one system call.

Rule: no secret is ever a field. Lines of several processes that share the descriptor do not mix: the file is opened
for appending and a line is (part of) a single write.
"""

import json
import logging
import os
import re
import select
import sys
import time
from collections.abc import Callable, Iterator
from functools import lru_cache
from typing import Any

import msgspec

from ztunnel.telemetry.sink import Sink

PIPE_BUF = select.PIPE_BUF  # bytes that a pipe takes in one piece

LEVELS = {"trace": 5, "debug": 10, "info": 20, "warn": 30, "error": 40, "off": 100}
_SCOPE = re.compile(r"[\w.-]+", re.ASCII)
_encoder = msgspec.json.Encoder(enc_hook=str)


def quoted(text: str) -> str:
    """The text as JSON has it."""
    return _encode(text).decode()


def _encode(event: dict[str, Any] | str) -> bytes:
    try:
        return _encoder.encode(event)
    except UnicodeEncodeError:  # lone surrogates, as in file names that are no UTF-8
        return json.dumps(event, default=str).encode()


def timestamp(now: float | None = None) -> str:
    """`now` (seconds of the epoch; the present if None) as RFC 3339 in UTC with microseconds."""
    seconds = time.time() if now is None else now
    whole = int(seconds)
    return f"{_second(whole)}.{int((seconds - whole) * 1e6):06d}Z"


@lru_cache(maxsize=16)
def _second(whole: int) -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(whole))


def _quoted(value: object) -> str:
    text = str(value)
    # What peers name themselves ends up here: nothing of it may be taken for another line or another field.
    if text and text.isprintable() and all(c not in text for c in ' "='):
        return text
    return json.dumps(text)


def render(as_json: bool, fields: dict[str, Any]) -> str:
    """Fields as the part of a line that they are, for `Logger.line`; None values are left out."""
    present = {k: v for k, v in fields.items() if v is not None}
    if not as_json:
        return "".join([f" {k}={_quoted(v)}" for k, v in present.items()])
    return f",{_encode(present)[1:-1].decode()}" if present else ""


def parse_levels(text: str) -> tuple[str, dict[str, str]]:
    """The levels of `debug`, `info,access:off` or `access:debug`: that of all scopes ("" if none), and of each named.

    Raises ValueError, which says what would be right.
    """
    default = ""
    scopes: dict[str, str] = {}
    for part in text.split(","):
        scope, colon, level = part.strip().rpartition(":")
        level = {"warning": "warn"}.get(level.lower(), level.lower())
        if level not in LEVELS:
            raise ValueError(f"log level {level!r} is not one of {', '.join(LEVELS)}")
        if not colon:
            default = level
        elif _SCOPE.fullmatch(scope) is None:
            raise ValueError(
                f"{part.strip()!r} names no scope; write LEVEL or SCOPE:LEVEL, such as access:off"
            )
        else:
            scopes[scope] = level
    return default, scopes


class Logger:
    """Writes events of at least `level` to the descriptor `fd`, as JSON objects or `time level scope message k=v`."""

    def __init__(
        self, level: str = "info", json: bool = False, fd: int | None = None, **context: str
    ) -> None:
        self.fd = 2 if fd is None else fd
        self._sink = Sink(self.fd)
        self.json = json
        self.context: dict[str, Any] = dict(context)
        self._context = render(json, self.context)
        self.threshold = 0  # of the scopes that have none of their own
        self.access_threshold = 0
        self._scopes: dict[str, str] = {}
        self.level = "info"
        self.set_level(level)
        self._soon: Callable[[], None] | None = None
        self._gathered: list[bytes] = []
        self._size = 0  # bytes of what is gathered

    @classmethod
    def from_environment(cls, **context: str) -> "Logger":
        """LOG_LEVEL (info) and LOG_FORMAT (json or text; text) decide. Raises ValueError, naming the variable."""
        level = os.environ.get("LOG_LEVEL", "").strip() or "info"
        try:
            parse_levels(level)
        except ValueError:
            raise ValueError(
                f"LOG_LEVEL: {level!r} is no level; use one of {', '.join(LEVELS)}, or with exceptions: info,access:off"
            ) from None
        style = os.environ.get("LOG_FORMAT", "").strip().lower() or "text"
        if style not in ("text", "json"):
            raise ValueError(f"LOG_FORMAT: {style!r} is no format; use text or json")
        return cls(level, style == "json", None, **context)

    def environment(self) -> dict[str, str]:
        """What makes a child process log as this does, read by `from_environment`."""
        return {"LOG_LEVEL": self.levels, "LOG_FORMAT": "json" if self.json else "text"}

    def set_level(self, levels: str) -> None:
        """Change the levels at run time: `LEVEL` for all scopes, or a list with `SCOPE:LEVEL` in it.

        Without a LEVEL in it the other scopes keep theirs. Raises ValueError for what `parse_levels` does not take.
        """
        default, scopes = parse_levels(levels)
        if default:
            self.level = default
            self.threshold = LEVELS[default]
            self._scopes = {}
        self._scopes |= scopes
        self.access_threshold = self.threshold_of("access")

    @property
    def levels(self) -> str:
        """All levels in the form that `set_level` takes."""
        return ",".join([self.level, *(f"{scope}:{level}" for scope, level in sorted(self._scopes.items()))])

    @property
    def lowest(self) -> int:
        """The threshold of the scope of which most is heard."""
        return min([self.threshold, *(LEVELS[level] for level in self._scopes.values())])

    def threshold_of(self, scope: str) -> int:
        """The threshold of a scope: its own, or that of the part before a dot (`xds` for `xds.client`)."""
        if self._scopes:
            name = scope
            while name:
                level = self._scopes.get(name)
                if level is not None:
                    return LEVELS[level]
                name = name.rpartition(".")[0]
        return self.threshold

    @property
    def dropped(self) -> int:
        """Lines that could not be written, so far."""
        return self._sink.dropped

    def never_wait(self) -> None:
        """Drop lines rather than wait for a log that nobody reads (see Sink)."""
        self._sink.never_wait()

    def log(self, level: str, scope: str, message: str, fields: dict[str, Any] | None = None) -> None:
        """Write one event. `fields` holds strings, numbers and the like; None values are left out."""
        if LEVELS[level] < (self.threshold_of(scope) if self._scopes else self.threshold):
            return
        extra = {k: v for k, v in fields.items() if v is not None} if fields else {}
        if self.json:
            event = {"time": timestamp(), "level": level, "scope": scope, "message": message}
            line = _encode(event | self.context | extra) + b"\n"
        else:
            words = "".join(f" {k}={_quoted(v)}" for k, v in (self.context | extra).items())
            # A line break in what a peer chose must not look like a line of ours.
            told = message.replace("\n", "\\n")
            line = f"{timestamp()} {level:5} {scope} {told}{words}\n".encode(errors="backslashreplace")
        self._write(line)

    def gather(self, soon: Callable[[], None]) -> None:
        """From now on let `line` keep what it is told until `flush`, and write several lines at once.

        `soon()` is called when the first one is kept: to have `flush` called within milliseconds. The order of lines is
        kept. No more is gathered than a pipe takes in one piece, so that lines of several processes do not mix.
        """
        self._soon = soon

    def flush(self) -> None:
        """Write what was gathered."""
        if self._gathered:
            lines = b"".join(self._gathered)
            self._gathered.clear()
            self._size = 0
            self._put(lines)

    def line(self, level: str, scope: str, message: str, fields: str) -> None:
        """As `log`, for the same line again and again: `fields` are rendered (`render(self.json, ...)`).

        Level, scope and message are letters and spaces.
        """
        if LEVELS[level] < (self.threshold_of(scope) if self._scopes else self.threshold):
            return
        if self.json:
            line = (
                f'{{"time":"{timestamp()}","level":"{level}","scope":"{scope}","message":"{message}"'
                f"{self._context}{fields}}}\n"
            )
        else:
            line = f"{timestamp()} {level:5} {scope} {message}{self._context}{fields}\n"
        encoded = line.encode(errors="backslashreplace")
        if self._soon is None:
            self._put(encoded)
            return
        self._size += len(encoded)
        if not self._gathered:
            self._soon()
        elif self._size > PIPE_BUF:
            size = len(encoded)
            self.flush()
            self._size = size
        self._gathered.append(encoded)

    def _write(self, line: bytes) -> None:
        self.flush()
        self._put(line)

    def _put(self, lines: bytes) -> None:
        self._sink.write(lines)

    def debug(self, scope: str, message: str, **fields: Any) -> None:
        """Log at level debug."""
        self.log("debug", scope, message, fields)

    def info(self, scope: str, message: str, **fields: Any) -> None:
        """Log at level info."""
        self.log("info", scope, message, fields)

    def warn(self, scope: str, message: str, **fields: Any) -> None:
        """Log at level warn."""
        self.log("warn", scope, message, fields)

    def error(self, scope: str, message: str, **fields: Any) -> None:
        """Log at level error."""
        self.log("error", scope, message, fields)


def fatal(message: str, remedy: str = "") -> "int":
    """Print one line for the person who started the program; returns the exit code to use (2)."""
    print(f"error: {message}" + (f"; {remedy}" if remedy else ""), file=sys.stderr, flush=True)
    return 2


class StandardHandler(logging.Handler):
    """Lets the standard library's `logging` (rooms and libraries that use it) write through a Logger."""

    def __init__(self, logger: Logger) -> None:
        super().__init__()
        self._logger = logger

    def emit(self, record: logging.LogRecord) -> None:
        """Write one record; its `fields` (see there) and its traceback, if any, become fields of the line."""
        number = record.levelno
        level = "error" if number >= 40 else "warn" if number >= 30 else "info" if number >= 20 else "debug"
        try:
            fields: dict[str, Any] = dict(getattr(record, "fields", {}))
            if record.exc_info and record.exc_info[1] is not None:
                fields["error"] = f"{type(record.exc_info[1]).__name__}: {record.exc_info[1]}"
                fields["traceback"] = self.format_traceback(record)
            self._logger.log(level, record.name.removeprefix("ztunnel."), record.getMessage(), fields)
        except Exception:
            self.handleError(record)

    @staticmethod
    def format_traceback(record: logging.LogRecord) -> str:
        """The record's traceback as text."""
        return logging.Formatter().formatException(record.exc_info) if record.exc_info else ""


def leaves(group: BaseExceptionGroup[BaseException]) -> Iterator[BaseException]:
    """The exceptions in a group, and in the groups in it."""
    for error in group.exceptions:
        if isinstance(error, BaseExceptionGroup):
            yield from leaves(error)
        else:
            yield error


def fields(**values: object) -> dict[str, Any]:
    """For the `extra` of a call of the standard `logging`: the structured values of the line."""
    return {"fields": values}


def adopt_standard_logging(logger: Logger) -> None:
    """Send everything that uses `logging` to `logger`, which decides the level."""
    root = logging.getLogger()
    root.handlers = [StandardHandler(logger)]
    root.setLevel(logging.DEBUG if logger.lowest < 20 else logging.INFO)
    for noisy in ("asyncio", "grpclib", "hpack", "pyroute2"):
        logging.getLogger(noisy).setLevel(logging.WARNING)
