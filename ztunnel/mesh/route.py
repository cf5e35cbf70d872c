"""What a routing decision says: the values that the control process hands to its workers, and nothing else."""

from typing import NamedTuple


class Endpoint(NamedTuple):
    """Where a connection may go.

    `address` (text) and `port` are the workload's own, also where a tunnel leads there (`hbone`: then to port
    15008 of that address, and the peer must prove `identity`, a SPIFFE id). `service` is a hostname; it,
    `identity`, `workload` and `namespace` are empty where there is none. `weight` is its share, 1 or more.
    `authority` is what the tunnel is asked for where that is not the endpoint itself: a waypoint's, for what is
    behind it.
    """

    address: str
    port: int
    hbone: bool
    identity: str
    workload: str
    namespace: str
    service: str
    weight: int = 1
    authority: str = ""


class Route(NamedTuple):
    """Endpoints to choose from, or an `error` for operators: then the connection is refused.

    The route holds until one of its `tags` is among those that a change of the mesh returns. `service` is the hostname
    that was asked for, `service_key` its key "namespace/hostname". For waypoints: `status` is the HTTP status that an
    error is answered with, `subject` the number under which the policies of the destination are known.
    """

    endpoints: tuple[Endpoint, ...]
    service: str
    error: str
    tags: tuple[str, ...]
    service_key: str = ""
    status: int = 0
    subject: int = 0
