"""What the proxies say about the connections they carried: their access logs, followed and added up.

ztunnel writes one JSON line when a connection has ended; the demo counts those of the client's side.
"""

import contextlib
from pathlib import Path

import msgspec


class Entry(msgspec.Struct, frozen=True):
    """One ended connection, with the fields of the access log that the demo reads."""

    scope: str = ""
    direction: str = ""
    source: str = msgspec.field(name="src.workload", default="")
    source_namespace: str = msgspec.field(name="src.namespace", default="")
    source_identity: str = msgspec.field(name="src.identity", default="")
    destination: str = msgspec.field(name="dst.workload", default="")
    destination_namespace: str = msgspec.field(name="dst.namespace", default="")
    destination_identity: str = msgspec.field(name="dst.identity", default="")
    service: str = msgspec.field(name="dst.service", default="")
    security: str = msgspec.field(name="connection_security_policy", default="")
    error: str = ""

    @property
    def mutual_tls(self) -> bool:
        """Whether both ends proved who they are."""
        return self.security == "mutual_tls"


class AccessLog:
    """Follows the logs of all node proxies of a mesh, from where they end now."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self._read: dict[Path, int] = {path: path.stat().st_size for path in self._files()}

    def _files(self) -> list[Path]:
        return sorted(self.directory.glob("ztunnel-node-*.log"))

    def skip(self) -> None:
        """Forget what was written until now."""
        self._read = {path: path.stat().st_size for path in self._files()}

    def entries(self) -> list[Entry]:
        """The connections logged since the last call, seen from the client's side, one entry each."""
        found = []
        for path in self._files():
            with path.open("rb") as file:
                file.seek(self._read.get(path, 0))
                data = file.read()
            complete = data.rfind(b"\n") + 1  # the last line may still be in the writing
            self._read[path] = self._read.get(path, 0) + complete
            for line in data[:complete].splitlines():
                # Lines that are no JSON (a traceback) or of other scopes are not for us.
                with contextlib.suppress(msgspec.DecodeError):
                    entry = msgspec.json.decode(line, type=Entry)
                    if entry.scope == "access" and entry.direction == "outbound":
                        found.append(entry)
        return found


class Traffic:
    """Who talked to whom: connections added up by the two identities."""

    def __init__(self, namespace: str = "default") -> None:
        self.namespace = namespace
        self.connections = 0
        self.mutual_tls = 0
        self.pairs: dict[tuple[str, str], int] = {}
        self.errors: dict[str, int] = {}

    def add(self, entry: Entry) -> None:
        """Count a connection between two pods of the namespace; others (DNS, the outside) are left out."""
        if entry.source_namespace != self.namespace or entry.destination_namespace != self.namespace:
            return
        self.connections += 1
        if entry.mutual_tls:
            self.mutual_tls += 1
            pair = (entry.source_identity, entry.destination_identity)
            self.pairs[pair] = self.pairs.get(pair, 0) + 1
        else:
            reason = entry.error or f"{entry.source} -> {entry.destination}: not mutual TLS"
            self.errors[reason] = self.errors.get(reason, 0) + 1

    @property
    def mtls_percent(self) -> float:
        """The share of connections that were mutual TLS, 0 to 100; 0 of none."""
        return round(100 * self.mutual_tls / self.connections, 2) if self.connections else 0.0

    def identities(self) -> list[dict[str, object]]:
        """The pairs as plain data, sorted by their names."""
        return [
            {"source": source, "destination": destination, "connections": count}
            for (source, destination), count in sorted(self.pairs.items())
        ]
