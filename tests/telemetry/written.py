"""Logs that other processes are writing while a test reads them."""

from pathlib import Path


def whole_lines(log: Path) -> list[bytes]:
    """The lines of a log so far, without their ends. One that is still being written is not there yet."""
    *lines, _ = log.read_bytes().split(b"\n")
    return lines
