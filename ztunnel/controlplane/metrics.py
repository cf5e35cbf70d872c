"""The control plane's metrics for Prometheus; names are istiod's where it has the metric."""

from collections.abc import Callable
from functools import partial
from typing import Final

import trio
from grpclib.const import Status

from ztunnel import __version__
from ztunnel.admin.server import Answer, Query
from ztunnel.controlplane.ca import CertificateService
from ztunnel.controlplane.resources import ADDRESS_TYPE, AUTHORIZATION_TYPE
from ztunnel.controlplane.webhook import Webhook
from ztunnel.controlplane.xds import DiscoveryService
from ztunnel.identity.ca import Authority
from ztunnel.telemetry.meters import Meters, Sample

TYPES: Final = {ADDRESS_TYPE: "wds", AUTHORIZATION_TYPE: "wads"}
"""How istiod calls the resource types in its metrics."""


class MetricsPage:
    """The page /metrics; one at a time is written, in a thread."""

    def __init__(self, meters: Meters) -> None:
        self._meters = meters
        self._writing = trio.Lock()

    async def page(self, method: str, query: Query) -> Answer:
        """The metrics, in the format that the request prefers."""
        async with self._writing:
            numbers = [
                (one.kind, one.name, one.told, one.labels, list(one.samples())) for one in self._meters
            ]
            write = partial(_write, numbers, query.headers.get("accept", ""))
            body, content_type = await trio.to_thread.run_sync(write)
        return Answer(body, content_type=content_type)


def _write(
    numbers: list[tuple[str, str, str, tuple[str, ...], list[Sample]]], accept: str
) -> tuple[bytes, str]:
    from ztunnel.telemetry.exposition import Family, exposition

    return exposition([Family(*one) for one in numbers], accept)


def control_metrics(
    discovery: DiscoveryService,
    certificates: CertificateService,
    authority: Callable[[], Authority],
    now: Callable[[], float],
) -> Meters:
    """The metrics of serving and signing."""
    meters = Meters()
    meters.read_gauge(
        "istio_build", "The version that runs", lambda: [(("pilot", __version__), 1)], ("component", "tag")
    )
    meters.read_gauge("pilot_info", "The version that runs", lambda: [((__version__,), 1)], ("version",))
    meters.read_gauge(
        "pilot_xds", "Clients that are connected", lambda: [((__version__,), discovery.clients)], ("version",)
    )
    meters.read_counter("pilot_xds_pushes", "Responses sent", lambda: _by_type(discovery.pushes), ("type",))
    meters.read_counter(
        "pilot_total_xds_rejects",
        "Responses that clients refused",
        lambda: _by_type(discovery.rejects),
        ("type",),
    )
    meters.read_counter(
        "citadel_server_csr_count", "Requests for certificates", lambda: [((), certificates.requests)]
    )
    meters.read_counter(
        "citadel_server_success_cert_issuance_count",
        "Certificates signed",
        lambda: [((), certificates.signed)],
    )
    for name, told, statuses in (
        (
            "citadel_server_authentication_failure_count",
            "Requests of callers that are not known",
            (Status.UNAUTHENTICATED,),
        ),
        (
            "citadel_server_csr_parsing_err_count",
            "Requests that cannot be read",
            (Status.INVALID_ARGUMENT,),
        ),
        (
            "citadel_server_id_extraction_err_count",
            "Requests for identities that the caller may not have",
            (Status.PERMISSION_DENIED,),
        ),
        (
            "citadel_server_csr_sign_err_count",
            "Requests that could not be decided or signed at that time",
            (Status.UNAVAILABLE,),
        ),
    ):
        meters.read_counter(name, told, partial(_refused, certificates, statuses))
    meters.read_gauge(
        "citadel_server_root_cert_expiry_timestamp",
        "When the first of the authority's certificates ends (Unix seconds)",
        lambda: [((), authority().not_after)],
    )
    meters.read_gauge(
        "citadel_server_root_cert_expiry_seconds",
        "Seconds until then",
        lambda: [((), authority().not_after - now())],
    )
    return meters


def webhook_metrics(meters: Meters, webhook: Webhook) -> None:
    """The metrics of the validating webhook."""
    for name, told, outcome in (
        ("galley_validation_passed", "Objects that are valid", "passed"),
        ("galley_validation_failed", "Objects that were refused", "failed"),
    ):
        meters.read_counter(name, told, partial(_judged, webhook, outcome), ("group", "version", "kind"))
    meters.read_counter(
        "galley_validation_http_error", "Reviews that could not be read", lambda: [((), webhook.malformed)]
    )


def _by_type(counts: dict[str, int]) -> list[Sample]:
    return [((TYPES.get(name, "other"),), count) for name, count in counts.items()]


def _refused(certificates: CertificateService, statuses: tuple[Status, ...]) -> list[Sample]:
    return [((), sum(certificates.refusals[one] for one in statuses))]


def _judged(webhook: Webhook, outcome: str) -> list[Sample]:
    return [(key[:3], count) for key, count in webhook.counts.items() if key[3] == outcome]
