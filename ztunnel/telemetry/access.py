"""The record of one proxied connection: filled as it goes, and accounted exactly once, however it ended.

Who talks to whom repeats from one connection to the next, so those parts of the line are made once and looked up:
a line takes 2.5 us and a call of write(2), where encoding a dictionary of all fields takes 8.
"""

import time
from collections.abc import Callable
from functools import lru_cache

from ztunnel.telemetry.counting import CLOSED, FAILED, NONE, OPENED, RECEIVED, SENT, Counts, Key
from ztunnel.telemetry.log import Logger, quoted, render

OUTBOUND = "outbound"
INBOUND = "inbound"
WAYPOINT = "waypoint"


class Totals:
    """What a worker has proxied so far; shown by the admin page, never reset.

    `tap` is who hears of each connection as it begins and ends: tap(record, event, error). Nobody, mostly.
    """

    __slots__ = ("bytes_received", "bytes_sent", "closed", "failed", "opened", "tap")

    def __init__(self) -> None:
        self.opened = 0
        self.closed = 0
        self.failed = 0
        self.bytes_sent = 0
        self.bytes_received = 0
        self.tap: Callable[..., None] | None = None


class ConnectionRecord:
    """Who talked to whom, how much, how long, and why it ended. Field names are those of Istio's ztunnel.

    `sent` and `received` are bytes as the client sees them, whoever reports. For the metrics: `peer` is the address of
    the other end's workload, `service_key` the service "namespace/hostname" that was asked for (outbound), `port` the
    application's (inbound). `dry_run` says what policies that are
    not enforced would have done otherwise.
    """

    __slots__ = (
        "_done",
        "_started",
        "_told",
        "counts",
        "direction",
        "dry_run",
        "dst_addr",
        "dst_hbone_addr",
        "dst_identity",
        "dst_namespace",
        "dst_service",
        "dst_workload",
        "logger",
        "mutual_tls",
        "peer",
        "port",
        "received",
        "sent",
        "service_key",
        "src_addr",
        "src_identity",
        "src_namespace",
        "src_workload",
        "totals",
    )

    def __init__(
        self, logger: Logger, totals: Totals, direction: str, src_addr: str, counts: Counts | None = None
    ) -> None:
        """`counts` are those of the pod whose connection it is; without any it is in no metric."""
        self.logger = logger
        self.totals = totals
        self.counts = counts
        self.direction = direction
        self.src_addr = src_addr
        self.src_workload = ""
        self.src_namespace = ""
        self.src_identity = ""
        self.dst_addr = ""
        self.dst_hbone_addr = ""
        self.dst_service = ""
        self.dst_workload = ""
        self.dst_namespace = ""
        self.dst_identity = ""
        self.mutual_tls = False
        self.peer = ""
        self.service_key = ""
        self.port = 0
        self.dry_run = ""
        self.sent = 0
        self.received = 0
        self._started = time.monotonic()
        self._done = False
        self._told: tuple[int, int] | None = None  # bytes that the metrics have of it while it is open
        totals.opened += 1

    @property
    def done(self) -> bool:
        """Whether `finish` was called."""
        return self._done

    @property
    def age(self) -> float:
        """Seconds since it was accepted."""
        return time.monotonic() - self._started

    def established(self) -> None:
        """Both ends are there, and bytes flow."""
        tap = self.totals.tap
        if tap is not None:
            tap(self, "opened")

    def _key(self, flag: str) -> Key:
        direction = self.direction
        identity = self.dst_identity if direction == OUTBOUND else self.src_identity
        return (direction, self.peer, identity, self.service_key, self.port, self.mutual_tls, flag)

    def progress(self, sent: int, received: int) -> None:
        """Count what the connection, which is open still, has moved so far; whom it is with is known."""
        told = self._told
        counts = self.counts
        if counts is None or self._done or told == (sent, received):
            return
        entry = counts.entry(self._key(NONE))
        if told is None:
            entry[OPENED] += 1
            told = (0, 0)
        entry[SENT] += sent - told[0]
        entry[RECEIVED] += received - told[1]
        self._told = (sent, received)

    def _count(self, flag: str, failed: bool) -> None:
        """Opening and bytes have no flag: when they are counted nobody knows yet how the connection ends."""
        counts = self.counts
        if counts is None:
            return
        key = self._key(NONE)
        entry = counts.entry(key)
        told = self._told
        if told is None:
            entry[OPENED] += 1
            entry[SENT] += self.sent
            entry[RECEIVED] += self.received
        else:
            entry[SENT] += self.sent - told[0]
            entry[RECEIVED] += self.received - told[1]
        if flag != NONE:
            entry = counts.entry((*key[:-1], flag))
        entry[CLOSED] += 1
        if failed:
            entry[FAILED] += 1

    def finish(self, error: BaseException | str | None = None) -> None:
        """Write the access log line and count the connection; only the first call counts.

        The error's `flag`, if it has one, is the response flag of the metrics and of the line.
        """
        if self._done:
            return
        self._done = True
        totals = self.totals
        totals.closed += 1
        totals.bytes_sent += self.sent
        totals.bytes_received += self.received
        flag = NONE
        if error is None:
            self._count(NONE, False)
        else:
            totals.failed += 1
            flag = getattr(error, "flag", NONE)
            self._count(flag, True)
        if totals.tap is not None:
            totals.tap(self, "closed", "" if error is None else str(error) or type(error).__name__)
        logger = self.logger
        if logger.access_threshold > (40 if error is not None else 20):
            return
        json = logger.json
        milliseconds = (time.monotonic() - self._started) * 1000
        policy = "mutual_tls" if self.mutual_tls else "unknown"
        if json:
            source = f',"src.addr":{quoted(self.src_addr)}'
            counts = (
                f',"direction":"{self.direction}","bytes_sent":{self.sent},"bytes_recv":{self.received},'
                f'"duration":"{milliseconds:.0f}ms","connection_security_policy":"{policy}"'
            )
        else:
            source = render(json, {"src.addr": self.src_addr})
            counts = (
                f" direction={self.direction} bytes_sent={self.sent} bytes_recv={self.received}"
                f" duration={milliseconds:.0f}ms connection_security_policy={policy}"
            )
        fields = (
            source
            + _source(json, self.src_workload, self.src_namespace, self.src_identity)
            + _destination(
                json,
                self.dst_addr,
                self.dst_hbone_addr,
                self.dst_service,
                self.dst_workload,
                self.dst_namespace,
                self.dst_identity,
            )
            + counts
        )
        if self.dry_run:
            fields += render(json, {"dry_run": self.dry_run})
        if error is None:
            logger.line("info", "access", "connection complete", fields)
        else:
            flags = None if flag == NONE else flag
            why = render(json, {"response_flags": flags, "error": str(error) or type(error).__name__})
            logger.line("error", "access", "connection complete", fields + why)


@lru_cache(maxsize=1024)
def _source(json: bool, workload: str, namespace: str, identity: str) -> str:
    return render(
        json,
        {
            "src.workload": workload or None,
            "src.namespace": namespace or None,
            "src.identity": identity or None,
        },
    )


@lru_cache(maxsize=1024)
def _destination(
    json: bool, address: str, hbone_address: str, service: str, workload: str, namespace: str, identity: str
) -> str:
    return render(
        json,
        {
            "dst.addr": address,
            "dst.hbone_addr": hbone_address or None,
            "dst.service": service or None,
            "dst.workload": workload or None,
            "dst.namespace": namespace or None,
            "dst.identity": identity or None,
        },
    )
