"""The worker's side of the debug pages: its tasks, memory, profile and connections, and the tap on its connections.

Nothing here is on the way of a byte. While nobody taps, a connection's begin and end each look at one attribute.
"""

import time
from collections.abc import AsyncIterator, Callable, Iterator
from typing import Any

import msgspec
import trio

from ztunnel.debug import memory, profile, tasks
from ztunnel.debug.filters import Filter
from ztunnel.proxy import messages
from ztunnel.proxy.context import Context, Ending, Pod
from ztunnel.proxy.inbound import Inbound, Plaintext
from ztunnel.proxy.outbound import Outbound
from ztunnel.proxy.pool import ClientTunnel
from ztunnel.proxy.reactor import Flushable
from ztunnel.proxy.relay import AppStream
from ztunnel.proxy.splice import Splice
from ztunnel.proxy.tunnel import Tunnel
from ztunnel.telemetry.access import ConnectionRecord
from ztunnel.telemetry.log import timestamp

SLICE = 50  # connections described before the reactor gets its turn: less than 1 ms
PART = 200  # connections in one message
MOST_PARTS_QUEUED = 1024 * 1024  # bytes under way to the control process, after which an answer waits
MOST_TAPPED_QUEUED = 4 * 1024 * 1024  # the same for the tap, after which events are counted instead
MOST_EVENTS = 2000  # of one turn of the reactor
STATES = ("connecting", "handshake", "open", "closing", "closed")

Send = Callable[[messages.Message], None]


class Inspector:
    """Answers Inspect messages, each by a task of its own, and taps the connections while it is told to."""

    def __init__(
        self,
        context: Context,
        send: Send,
        queued: Callable[[], int],
        recent: Callable[[], Iterator[dict[str, Any]]],
    ) -> None:
        """`send` puts a message into the channel, `queued` tells how many bytes wait there; `recent` are the
        connections judged lately."""
        self._context = context
        self._recent = recent
        self._send = send
        self._queued = queued
        self._in, self._out = trio.open_memory_channel[messages.Inspect](64)

    def inspect(self, message: messages.Inspect) -> None:
        """Take a question; the answer comes later, in parts."""
        try:
            self._in.send_nowait(message)
        except trio.WouldBlock:
            self._send(messages.Inspected(message.query, error="too many questions at once"))

    def tap(self, on: bool) -> None:
        """Report each connection that begins or ends from now on, or no more."""
        totals = self._context.totals
        totals.tap = _Tap(self._context, self._send, self._queued) if on else None

    async def run(self) -> None:
        """Answer until cancelled."""
        async with trio.open_nursery() as nursery:
            async for message in self._out:
                nursery.start_soon(self._answer, message)

    async def _answer(self, message: messages.Inspect) -> None:
        error = ""
        try:
            async for part in self._parts(message.what, message.options):
                while self._queued() > MOST_PARTS_QUEUED:
                    await trio.sleep(0.01)
                self._send(messages.Inspected(message.query, msgspec.json.encode(part), more=True))
        except (ValueError, profile.BusyError) as wrong:
            error = str(wrong)
        except Exception as defect:  # a page that cannot be made must not end the worker
            error = f"internal error: {type(defect).__name__}: {defect}"
        self._send(messages.Inspected(message.query, error=error))

    async def _parts(self, what: str, options: dict[str, str]) -> AsyncIterator[Any]:
        if what == "tasks":
            yield await tasks.describe()
        elif what == "memory":
            yield await memory.describe(int(options.get("objects", "0")), options.get("trace", ""))
        elif what == "profile":
            yield profile.as_list(await profile.sample(float(options.get("seconds", "5"))))
        elif what == "connections":
            limit = int(options.get("limit", "10000"))
            async for part in _in_parts(connections(self._context, Filter.parse(options)), limit):
                yield part
        elif what == "recent":
            async for part in _in_parts(self._recent(), int(options.get("limit", "10000"))):
                yield part
        elif what == "tunnels":
            async for part in _in_parts(tunnels(self._context), int(options.get("limit", "10000"))):
                yield part
        else:
            raise ValueError(f"{what!r} cannot be inspected")


async def _in_parts(found: Iterator[dict[str, Any] | None], limit: int) -> AsyncIterator[list[Any]]:
    """Lists of items; None among what is found stands for one that is not wanted."""
    part: list[Any] = []
    for number, one in enumerate(found, 1):
        if one is not None:
            part.append(one)
            limit -= 1
            if limit < 0:
                part[-1] = {"more": True}  # the rest is not counted: it would take as long as to show it
                break
        if len(part) >= PART:
            yield part
            part = []
        if number % SLICE == 0:
            await trio.lowlevel.checkpoint()
    if part:
        yield part


def connections(context: Context, wanted: Filter) -> Iterator[dict[str, Any] | None]:
    """The open connections; may be walked slowly, while others begin and end. None for each that is not wanted."""
    for pod in tuple(context.pods.values()):
        for one in tuple(pod.connections):
            if not isinstance(one, Ending) or one.over_:
                continue
            described = describe(one.record) | _live(one)
            yield described if wanted.matches(described) else None


def tunnels(context: Context) -> Iterator[dict[str, Any]]:
    """The tunnels of both directions."""
    for pod in tuple(context.pods.values()):
        for one in tuple(pod.tunnels):
            if isinstance(one, Tunnel):
                yield _tunnel(pod, one)


def _tunnel(pod: Pod, one: Tunnel) -> dict[str, Any]:
    return {
        "direction": "outbound" if isinstance(one, ClientTunnel) else "inbound",
        "pod": f"{pod.namespace}/{pod.name}",
        "peer": one.peer_label(),
        "state": STATES[one.state],
        "streams": len(one.streams),
        "unsent": one.unsent,
        "draining": one.going or (isinstance(one, ClientTunnel) and not one.usable),
    }


def describe(record: ConnectionRecord) -> dict[str, Any]:
    """What a connection's record says, by the names of the access log; what is not known is left out."""
    found: dict[str, Any] = {
        "direction": record.direction,
        "src.addr": record.src_addr,
        "src.workload": record.src_workload,
        "src.namespace": record.src_namespace,
        "src.identity": record.src_identity,
        "dst.addr": record.dst_addr,
        "dst.hbone_addr": record.dst_hbone_addr,
        "dst.service": record.dst_service,
        "dst.workload": record.dst_workload,
        "dst.namespace": record.dst_namespace,
        "dst.identity": record.dst_identity,
        "connection_security_policy": "mutual_tls" if record.mutual_tls else "unknown",
    }
    return {name: value for name, value in found.items() if value}


def _live(one: Ending) -> dict[str, Any]:
    """What the record is told only at the end: bytes so far, as the client sees them, and what it waits for."""
    live = getattr(one, "live", None)
    if live is not None:  # a waypoint's
        told: dict[str, Any] = live()
        return told
    record = one.record
    sent, received, state = record.sent, record.received, "connecting"
    carrier: object = None
    if isinstance(one, Outbound):
        carrier = one.relay
    elif isinstance(one, Inbound):
        carrier = one.stream
    elif isinstance(one, Plaintext):
        carrier = one.splice
    if isinstance(carrier, AppStream):
        there, back = carrier.to_peer, carrier.to_app
        sent, received = (there, back) if isinstance(one, Outbound) else (back, there)
        state = ("connecting", "waiting", "open", "over")[carrier.state]
    elif isinstance(carrier, Splice):
        sent, received = carrier.downstream.taken, carrier.upstream.taken
        state = ("connecting", "waiting", "open", "over")[carrier.state]
    return {
        "bytes_sent": sent,
        "bytes_recv": received,
        "buffered": getattr(one, "buffered", 0),
        "seconds": round(record.age, 3),
        "state": state,
    }


class _Tap(Flushable):
    """Called at each connection's begin and end: gathers them, and sends what one turn of the reactor brought."""

    __slots__ = ("_context", "_lines", "_lost", "_queued", "_send")

    def __init__(self, context: Context, send: Send, queued: Callable[[], int]) -> None:
        self._context = context
        self._send = send
        self._queued = queued
        self._lines: list[bytes] = []
        self._lost = 0

    def __call__(self, record: ConnectionRecord, event: str, error: str = "") -> None:
        if len(self._lines) >= MOST_EVENTS:
            self._lost += 1
            return
        told: dict[str, Any] = {"event": event, "time": timestamp(time.time())} | describe(record)
        if event == "closed":
            told["bytes_sent"] = record.sent
            told["bytes_recv"] = record.received
            told["seconds"] = round(record.age, 6)
        if error:
            told["error"] = error
        self._lines.append(msgspec.json.encode(told) + b"\n")
        self._context.reactor.dirty.add(self)

    def flush(self) -> None:
        lines, self._lines = self._lines, []
        if self._queued() > MOST_TAPPED_QUEUED:
            self._lost += len(lines)
            return
        lost, self._lost = self._lost, 0
        self._send(messages.Tapped(b"".join(lines), lost))
