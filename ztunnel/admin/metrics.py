"""The metrics of a node's daemon: where each comes from, and the pages that Prometheus reads."""

from collections import Counter
from functools import partial
from typing import TYPE_CHECKING, Final

from ztunnel import process1
from ztunnel.admin.server import Answer, Handler, Query
from ztunnel.dns.counters import Labels
from ztunnel.telemetry import labels
from ztunnel.telemetry.meters import Meters, Sample
from ztunnel.telemetry.node import PATHS, NodeMetrics
from ztunnel.telemetry.traffic import TrafficMetrics

DNS_LABELS: Final = (
    "request_query_type",
    "request_protocol",
    "source_canonical_service",
    "source_canonical_revision",
)

if TYPE_CHECKING:
    from ztunnel.admin.node import Proxy
    from ztunnel.daemon import Daemon


def node_metrics(daemon: "Daemon") -> NodeMetrics:
    """The metrics of this daemon; each part of it may add its own to `meters`."""
    metrics = proxy_metrics(daemon)
    meters = metrics.meters
    meters.read_gauge(
        "workload_manager_active_proxy_count",
        "Pods that are served (unstable)",
        lambda: [((), len(daemon.workers.pods))],
    )
    meters.read_gauge(
        "workload_manager_pending_proxy_count",
        "Pods that wait for their certificate or their listeners (unstable)",
        lambda: [((), daemon.pending)],
    )
    dns_metrics(meters, daemon)
    return metrics


def proxy_metrics(daemon: "Proxy") -> NodeMetrics:
    """The metrics that each proxy has."""
    settings = daemon.settings
    workers, xds = daemon.workers, daemon.xds
    traffic = TrafficMetrics(daemon.state, settings.network, settings.cluster_id, daemon.logger)
    workers.collection.sink = traffic
    metrics = NodeMetrics(traffic, workers.collect)
    meters = metrics.meters
    meters.read_counter(
        "istio_xds_message",
        "Responses received from the control plane (unstable)",
        lambda: [((url,), count) for url, count in xds.received.items()],
        ("url",),
    )
    meters.read_counter(
        "istio_xds_connection_terminations",
        "Connections to the control plane that ended, or were not made (unstable)",
        lambda: [((reason,), count) for reason, count in xds.terminations.items()],
        ("reason",),
    )
    meters.read_counter(
        "ztunnel_worker_restarts",
        "Worker processes that ended and were replaced",
        lambda: [((), sum(one["restarts"] for one in workers.describe()))],
    )
    meters.read_counter(
        "ztunnel_restarts",
        "Times that the control process died and was started again in its container",
        lambda: [((), process1.restarts())],
    )
    meters.read_counter(
        "ztunnel_log_lines_dropped",
        "Log lines that could not be written without waiting",
        lambda: [((), workers.collection.dropped + daemon.logger.dropped)],
    )
    return metrics


def dns_metrics(meters: Meters, daemon: "Daemon") -> None:
    """The metrics of DNS capture."""
    counters = daemon.dns.counters
    counted = (
        ("istio_dns_requests", "DNS queries of pods (unstable)", counters.requests),
        (
            "istio_dns_upstream_requests",
            "DNS queries sent on to a pod's own server (unstable)",
            counters.upstream_requests,
        ),
        (
            "istio_dns_upstream_failures",
            "DNS queries that such a server did not answer (unstable)",
            counters.upstream_failures,
        ),
    )  # fmt: skip
    for name, told, numbers in counted:
        meters.read_counter(name, told, partial(_known, numbers), DNS_LABELS)
    meters.read_counter(
        "ztunnel_dns_faults",
        "DNS packets that were no query to answer, by what was wrong",
        lambda: [((fault,), count) for fault, count in counters.faults.items()],
        ("fault",),
    )


def _known(numbers: Counter[Labels]) -> list[Sample]:
    return [(tuple(value or labels.UNKNOWN for value in key), count) for key, count in numbers.items()]


def metrics_pages(metrics: NodeMetrics) -> dict[str, Handler]:
    """The pages of the metrics' port."""

    async def page(method: str, query: Query) -> Answer:
        if method not in ("GET", "HEAD"):
            return Answer(b"use GET to read the metrics\n", 405)
        headers = query.headers
        body, content_type, encoding = await metrics.page(
            headers.get("accept", ""), headers.get("accept-encoding", "")
        )
        extra = (("content-encoding", encoding),) if encoding else ()
        return Answer(body, content_type=content_type, headers=(*extra, ("vary", "accept, accept-encoding")))

    return dict.fromkeys(PATHS, page)
