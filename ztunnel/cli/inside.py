"""Running a module of this package where the mesh lives: with its capabilities, its mounts, and a node's network.

An ordinary user's mesh is in namespaces of its own; what looks at its pods has to be started by the mesh itself.
"""

import os
import sys
import threading
from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

from ztunnel.cli.errors import UserError

if TYPE_CHECKING:
    from ztunnel.embedded.client import MeshClient

FABRIC = "fabric"


class Done(NamedTuple):
    """How it ended."""

    code: int
    stdout: bytes
    stderr: bytes


def command(module: str, *arguments: str) -> list[str]:
    """The command line that runs a module with this interpreter."""
    return [sys.executable, "-P", "-m", module, *arguments]


def run(client: "MeshClient", argv: Sequence[str], given: bytes = b"", timeout: float = 30.0) -> Done:
    """Run a program in the fabric's namespace of the mesh, to its end. Raises UserError where that takes too long."""
    pipes = [os.pipe() for _ in range(3)]
    out: dict[int, bytes] = {}
    ended: list[int | BaseException] = []

    def feed() -> None:
        with os.fdopen(pipes[0][1], "wb") as stream:
            try:
                stream.write(given)
            except BrokenPipeError:
                pass

    def read(number: int) -> None:
        with os.fdopen(pipes[number][0], "rb") as stream:
            out[number] = stream.read()

    def ask() -> None:
        try:
            ended.append(client.exec_on_node(FABRIC, argv, streams=[pipes[0][0], pipes[1][1], pipes[2][1]]))
        except BaseException as error:
            ended.append(error)
        finally:
            for fd in (pipes[0][0], pipes[1][1], pipes[2][1]):
                os.close(fd)

    threads = [threading.Thread(target=work, daemon=True) for work in (feed, ask)]
    threads += [threading.Thread(target=read, args=(number,), daemon=True) for number in (1, 2)]
    for thread in threads:
        thread.start()
    for thread in threads[1:]:
        thread.join(timeout)
        if thread.is_alive():
            raise UserError(f"{' '.join(argv[3:])} did not end within {timeout:.0f} s", "see: ambient status")
    (code,) = ended
    if isinstance(code, BaseException):
        raise code
    return Done(code, out[1], out[2])
