"""The debug pages of a node's daemon: its control process and, by way of the channel, each of its workers."""

import os
from collections.abc import Iterator
from typing import Any

import msgspec
import trio

from ztunnel.admin.pages import JSON, Pages, encoded_list, json_answer
from ztunnel.admin.server import Answer, Send
from ztunnel.debug import memory, profile, tasks
from ztunnel.debug.filters import Filter, FilterError
from ztunnel.proxy.inspections import MOST_TAPS, Inspections
from ztunnel.proxy.inspections import Answer as WorkerAnswer

CONTROL = "control"
MOST_CONNECTIONS = 10_000  # of each worker in one answer, unless asked for others
SLACK = 5.0  # seconds beyond those of a profile for a worker to answer


def debug_pages(pages: Pages, node: str, inspections: Inspections) -> None:
    """Add the pages below /debug; `node` is the name that events of the tap bear."""
    show = _Debug(node, inspections)
    pages.page("/debug/tasks", show.tasks, "the tree of tasks of each process; ?format=json")
    pages.page(
        "/debug/memory",
        show.memory,
        "memory of each process; ?objects=N counts objects by type; POST ?trace=start|show|stop: tracemalloc",
    )
    pages.page(
        "/debug/profile",
        show.profile,
        "?seconds=N (5), format=text|collapsed|json, process=control|workers: where the time goes",
    )
    pages.page(
        "/debug/connections",
        show.connections,
        "open connections (JSON); ?namespace=, from=, to=, pod=, port=, direction=, limit=",
    )
    pages.page("/debug/tunnels", show.tunnels, "open tunnels (JSON); ?limit=")
    pages.page(
        "/debug/tap",
        show.tap,
        "connections as they begin and end, a line of JSON each, until you leave; filters as for connections",
    )


class _Debug:
    def __init__(self, node: str, inspections: Inspections) -> None:
        self._node = node
        self._inspections = inspections

    async def tasks(self, method: str, query: dict[str, str]) -> Answer:
        found = {CONTROL: await tasks.describe()}
        answers = await self._inspections.ask("tasks")
        found |= {_name(one): one.items[0] for one in answers if one.items}
        if query.get("format") == "json":
            return json_answer(found | _errors(answers))
        lines = [f"{process}\n{tasks.as_text(tree)}\n" for process, tree in found.items()]
        return Answer(("".join(lines) + _told(answers)).encode())

    async def memory(self, method: str, query: dict[str, str]) -> Answer:
        objects, trace = query.get("objects", "0"), query.get("trace", "")
        if not objects.isdigit():
            return _refused(f"objects: {objects!r}: how many types to list")
        if trace and method != "POST":
            return Answer(b"use POST for trace=: it slows the processes down\n", 405)
        try:
            own = await memory.describe(int(objects), trace)
        except ValueError as error:
            return _refused(str(error))
        answers = await self._inspections.ask("memory", {"objects": objects, "trace": trace}, 30)
        found: dict[str, Any] = {CONTROL: {"pid": os.getpid()} | own}
        found |= {_name(one): one.items[0] for one in answers if one.items}
        return json_answer(found | _errors(answers))

    async def profile(self, method: str, query: dict[str, str]) -> Answer:
        style, whose = query.get("format", "text"), query.get("process", "")
        if style not in ("text", "collapsed", "json"):
            return _refused(f"format: {style!r}: text, collapsed or json")
        if whose not in ("", CONTROL, "workers"):
            return _refused(f"process: {whose!r}: control or workers, or leave it out for all")
        try:
            seconds = float(query.get("seconds", "5"))
        except ValueError:
            return _refused(f"seconds: {query['seconds']!r}: a number")
        found: dict[str, Any] = {}
        answers: list[WorkerAnswer] = []
        failed: list[str] = []

        async def own() -> None:
            try:
                found[CONTROL] = await profile.sample(seconds)
            except (ValueError, profile.BusyError) as error:
                failed.append(str(error))

        async def theirs() -> None:
            answers.extend(await self._inspections.ask("profile", {"seconds": str(seconds)}, seconds + SLACK))

        if not 0 < seconds <= profile.LONGEST:
            return _refused(f"seconds: {seconds:g}: more than 0, at most {profile.LONGEST:g}")
        async with trio.open_nursery() as nursery:
            if whose in ("", CONTROL):
                nursery.start_soon(own)
            if whose in ("", "workers"):
                nursery.start_soon(theirs)
        if failed:
            return Answer(f"{failed[0]}\n".encode(), 409)
        found |= {_name(one): profile.from_list(one.items[0]) for one in answers if one.items}
        if style == "json":
            lists = {process: profile.as_list(stacks) for process, stacks in found.items()}
            return json_answer(lists | _errors(answers))
        write = profile.collapsed if style == "collapsed" else profile.as_text
        text = ("" if style == "collapsed" else "\n").join(
            write(process, stacks) for process, stacks in found.items()
        )
        return Answer((text + ("" if style == "collapsed" else _told(answers))).encode())

    async def connections(self, method: str, query: dict[str, str]) -> Answer:
        try:
            wanted = Filter.parse(query)
        except FilterError as error:
            return _refused(str(error))
        return await self._listed("connections", wanted.query(), query)

    async def tunnels(self, method: str, query: dict[str, str]) -> Answer:
        return await self._listed("tunnels", {}, query)

    async def _listed(self, what: str, options: dict[str, str], query: dict[str, str]) -> Answer:
        limit = query.get("limit", str(MOST_CONNECTIONS))
        if not limit.isdigit():
            return _refused(f"limit: {limit!r}: how many to show at most, of each worker")
        answers = await self._inspections.ask(what, options | {"limit": limit}, 30)
        pieces = [msgspec.json.encode({"node": self._node})[:-1] + f',"{what}":'.encode()]
        await encoded_list(_numbered(answers), pieces)
        more = [_name(one) for one in answers if any("more" in item for part in one.items for item in part)]
        rest = {"limited": more} | _errors(answers)
        pieces.append(b"," + msgspec.json.encode(rest)[1:] + b"\n")
        return Answer(tuple(pieces), content_type=JSON)

    async def tap(self, method: str, query: dict[str, str]) -> Answer:
        try:
            wanted = Filter.parse(query)
        except FilterError as error:
            return _refused(str(error))
        everything = wanted == Filter()
        node = msgspec.json.encode(self._node)

        async def produce(send: Send) -> None:
            with self._inspections.tap() as tap:
                await send(b'{"event":"tapping","node":%b}\n' % node)
                while True:
                    try:
                        worker, lines, lost = await tap.next()
                    except trio.EndOfChannel:
                        return
                    head = b'{"node":%b,"worker":%d,' % (node, worker)
                    out = [
                        head + line[1:]
                        for line in lines.splitlines(keepends=True)
                        if everything or wanted.matches(msgspec.json.decode(line))
                    ]
                    if lost:
                        out.append(
                            b'{"event":"lost","node":%b,"worker":%d,"count":%d}\n' % (node, worker, lost)
                        )
                    if out:
                        await send(b"".join(out))

        if self._inspections.draining:
            return Answer(b"this proxy is draining: new connections are the next one's\n", 503)
        if self._inspections.full:
            return Answer(f"{MOST_TAPS} taps are open on this node; end one of them\n".encode(), 503)
        return Answer(content_type="application/x-ndjson", stream=produce)


def _numbered(answers: list[WorkerAnswer]) -> Iterator[dict[str, Any]]:
    for one in answers:
        for part in one.items:
            for item in part:
                if "more" not in item:
                    yield {"worker": one.worker} | item


def _name(answer: WorkerAnswer) -> str:
    return f"worker-{answer.worker}"


def _errors(answers: list[WorkerAnswer]) -> dict[str, Any]:
    found = {_name(one): one.error for one in answers if one.error}
    return {"errors": found} if found else {}


def _told(answers: list[WorkerAnswer]) -> str:
    return "".join(f"{_name(one)}: {one.error}\n" for one in answers if one.error)


def _refused(why: str) -> Answer:
    return Answer(f"{why}\n".encode(), 400)
