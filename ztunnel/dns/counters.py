"""What the DNS counts: plain numbers, read by whoever makes metrics of them."""

from collections import Counter
from typing import NamedTuple


class Labels(NamedTuple):
    """What a query is counted under: type (packets.TYPE_NAMES), `udp` or `tcp`, the asking pod's canonical names."""

    query_type: str
    protocol: str
    service: str
    revision: str


class Counters:
    """Numbers since the start.

    `requests`, `upstream_requests` and `upstream_failures` are istio_dns_requests_total and so on. `faults` counts
    what has no place in those, by what it was: `malformed` queries, `looping` ones (our own, come back), `refused`
    ones (too many at a time), `repeated` ones (asked again while under way), `unmatched` answers (to nothing asked).
    """

    def __init__(self) -> None:
        self.requests: Counter[Labels] = Counter()
        self.upstream_requests: Counter[Labels] = Counter()
        self.upstream_failures: Counter[Labels] = Counter()
        self.faults: Counter[str] = Counter()

    def describe(self) -> dict[str, int]:
        """The sums, for people."""
        return {
            "requests": self.requests.total(),
            "upstream_requests": self.upstream_requests.total(),
            "upstream_failures": self.upstream_failures.total(),
            **self.faults,
        }
