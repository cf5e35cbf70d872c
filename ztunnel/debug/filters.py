"""Which connections somebody wants to see: the filters of `ambient tap` and of the page /debug/connections. Pure."""

from collections.abc import Mapping
from ipaddress import ip_address
from typing import Any, NamedTuple, Self

KEYS = ("namespace", "from", "to", "pod", "port", "direction", "errors")


class FilterError(ValueError):
    """A filter that cannot be meant; the message names it and says what would be right."""


class Filter(NamedTuple):
    """All that is given must hold; the default lets everything through.

    A name is a workload's, the beginning of one before a `-` (a Deployment's), a Service's or its host name, a
    service account's SPIFFE id, or an address; `NAMESPACE/NAME` asks for the namespace as well.
    """

    namespace: str = ""  # of either end
    source: str = ""
    destination: str = ""
    pod: str = ""  # either end
    port: int = 0  # the destination's
    direction: str = ""
    errors: bool = False  # only what ended with an error

    @classmethod
    def parse(cls, query: Mapping[str, str]) -> Self:
        """From the query of a page; other keys are somebody else's. Raises FilterError."""
        port = query.get("port", "") or "0"
        if not (port.isascii() and port.isdigit() and int(port) < 65536):
            raise FilterError(f"port: {port!r}: a number below 65536")
        direction = query.get("direction", "")
        if direction not in ("", "inbound", "outbound"):
            raise FilterError(f"direction: {direction!r}: inbound or outbound")
        return cls(
            query.get("namespace", ""),
            query.get("from", ""),
            query.get("to", ""),
            query.get("pod", ""),
            int(port),
            direction,
            query.get("errors", "") not in ("", "0", "false"),
        )

    def query(self) -> dict[str, str]:
        """What `parse` makes this of."""
        found = {
            "namespace": self.namespace, "from": self.source, "to": self.destination, "pod": self.pod,
            "port": str(self.port or ""), "direction": self.direction, "errors": "1" if self.errors else "",
        }  # fmt: skip
        return {key: value for key, value in found.items() if value}

    def matches(self, one: Mapping[str, Any]) -> bool:
        """Whether this connection (fields as in the access log) is wanted."""
        if self.direction and one.get("direction") != self.direction:
            return False
        if self.errors and not one.get("error"):
            return False
        if self.namespace and self.namespace not in (one.get("src.namespace"), one.get("dst.namespace")):
            return False
        if self.port and not str(one.get("dst.addr", "")).endswith(f":{self.port}"):
            return False
        if self.source and not _is(one, "src", self.source):
            return False
        if self.destination and not _is(one, "dst", self.destination):
            return False
        return not self.pod or _is(one, "src", self.pod) or _is(one, "dst", self.pod)


def _is(one: Mapping[str, Any], end: str, wanted: str) -> bool:
    """Whether this end of the connection is what `wanted` names."""
    if wanted == one.get(f"{end}.identity"):
        return True
    address = str(one.get(f"{end}.addr", "")).rpartition(":")[0].strip("[]")
    if address and _same_address(address, wanted):
        return True
    namespace, slash, name = wanted.rpartition("/")
    if (
        slash
        and namespace not in ("deploy", "deployment", "pod")
        and namespace != one.get(f"{end}.namespace")
    ):
        return False
    workload = str(one.get(f"{end}.workload", ""))
    if workload and (workload == name or workload.startswith(f"{name}-")):
        return True
    service = str(one.get(f"{end}.service", ""))
    return bool(service) and name in (service, service.partition(".")[0])


def _same_address(address: str, wanted: str) -> bool:
    if address == wanted:
        return True
    try:
        return ip_address(address) == ip_address(wanted)
    except ValueError:
        return False
