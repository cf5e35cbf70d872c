"""The tree of trio's tasks, and where each of them waits: for a process that does not do what it should."""

from collections.abc import Iterator
from types import CodeType, FrameType
from typing import Any

import trio

MOST_TASKS = 5000  # described in one answer; a proxy has dozens
DEEPEST = 12  # frames of a task, the innermost
SLICE = 50  # tasks described before others get their turn: about 1 ms


async def describe() -> list[dict[str, Any]]:
    """Every task of this trio run: `depth` in the tree, `name`, `where` (innermost frame last), parents first.

    Of more than MOST_TASKS the rest is left out; the last item says how many.
    """
    root = trio.lowlevel.current_root_task()
    found: list[dict[str, Any]] = []
    left_out = 0
    for number, (depth, task) in enumerate([] if root is None else list(_walk(root))):
        if number >= MOST_TASKS:
            left_out += 1
            continue
        found.append({"depth": depth, "name": task.name, "where": where(task.coro)})
        if number % SLICE == SLICE - 1:
            await trio.lowlevel.checkpoint()
    if left_out:
        found.append({"depth": 0, "name": f"and {left_out} more", "where": []})
    return found


def _walk(root: trio.lowlevel.Task) -> Iterator[tuple[int, trio.lowlevel.Task]]:
    """The tasks below `root`, each after its parent; no recursion, as the tree may be deep."""
    waiting = [(0, root)]
    while waiting:
        depth, task = waiting.pop()
        yield depth, task
        children = [child for nursery in task.child_nurseries for child in nursery.child_tasks]
        waiting += [
            (depth + 1, child) for child in sorted(children, key=lambda child: child.name, reverse=True)
        ]


def where(awaited: Any) -> list[str]:
    """The places in which a suspended coroutine waits, the innermost last: `file.py:12 function`."""
    places: list[str] = []
    while awaited is not None:
        frame: FrameType | None = (
            getattr(awaited, "cr_frame", None)
            or getattr(awaited, "gi_frame", None)
            or getattr(awaited, "ag_frame", None)
        )
        if frame is None:
            break
        places.append(place(frame.f_code, frame.f_lineno))
        awaited = getattr(awaited, "cr_await", None) or getattr(awaited, "gi_yieldfrom", None)
    return places[-DEEPEST:]


def place(code: CodeType, line: int) -> str:
    """A line of code as people look for it: the last two parts of the file's name, the line, the function."""
    return f"{'/'.join(code.co_filename.rsplit('/', 2)[-2:])}:{line} {code.co_qualname}"


def as_text(tasks: list[dict[str, Any]]) -> str:
    """The tree, a line a task and one for each frame."""
    lines = []
    for task in tasks:
        indent = "  " * task["depth"]
        lines.append(f"{indent}{task['name']}")
        lines += [f"{indent}    at {frame}" for frame in task["where"]]
    return "".join(f"{line}\n" for line in lines)
