"""The resources of one xDS type: versions, one encoded copy of each, the names they answer to, and who listens.

Knows nothing of Kubernetes, streams or clients; all in memory, all synchronous.
"""

import hashlib
from collections.abc import Callable, Iterator, Mapping
from typing import Final, NamedTuple

from google.protobuf.any_pb2 import Any as AnyMessage
from google.protobuf.message import Message

from ztunnel.wire.xds_pb2 import DeltaDiscoveryResponse, Resource

ADDRESS_TYPE: Final = "type.googleapis.com/istio.workload.Address"
WAYPOINT_POLICY_TYPE: Final = "type.googleapis.com/ambient.waypoint.Policy"
AUTHORIZATION_TYPE: Final = "type.googleapis.com/istio.security.Authorization"

Changes = Mapping[str, frozenset[str]]
"""Names of changed resources, each with all the names it answered to before or answers to now."""


class Entry(NamedTuple):
    """One resource, ready to send: `encoded` is it as a field of a DeltaDiscoveryResponse.

    Serialized messages may be concatenated (protobuf encoding, "Last One Wins": repeated fields add up), so the
    bytes made once here go into every client's response as they are.
    """

    name: str
    version: str
    aliases: tuple[str, ...]
    groups: tuple[str, ...]
    """Resources that this one comes along with when they are asked for by name: a workload with its services."""
    encoded: bytes

    @property
    def names(self) -> frozenset[str]:
        """Every name under which asking brings this resource."""
        return frozenset((self.name, *self.aliases, *self.groups))


def entry(
    name: str, message: Message, type_url: str, aliases: tuple[str, ...] = (), groups: tuple[str, ...] = ()
) -> Entry:
    """The entry of a message. Its version is a digest of the content, so it survives restarts of this process."""
    value = message.SerializeToString(deterministic=True)
    digest = hashlib.blake2b("\0".join(aliases).encode() + b"\0\0" + value, digest_size=10)
    resource = Resource(
        name=name,
        version=digest.hexdigest(),
        aliases=aliases,
        resource=AnyMessage(type_url=type_url, value=value),
    )
    encoded = DeltaDiscoveryResponse(resources=[resource]).SerializeToString()
    return Entry(name, resource.version, aliases, groups, encoded)


class ResourceSet:
    """All resources of one type, as they are now."""

    def __init__(self, type_url: str) -> None:
        self.type_url = type_url
        self.revision = 0
        """Counts the updates that changed something."""
        self._entries: dict[str, Entry] = {}
        self._by_alias: dict[str, tuple[str, ...]] = {}  # nearly always one
        self._members: dict[str, set[str]] = {}  # group -> its resources, possibly very many
        self._listeners: list[Callable[[Changes], None]] = []

    def __len__(self) -> int:
        return len(self._entries)

    def __contains__(self, name: str) -> bool:
        return name in self._entries

    def __iter__(self) -> Iterator[str]:
        return iter(self._entries)

    def get(self, name: str) -> Entry | None:
        """The resource of exactly this name."""
        return self._entries.get(name)

    def find(self, asked: str) -> set[str]:
        """Names of the resources that belong in the answer to `asked`: a name or alias, and what comes along."""
        found = set(self._by_alias.get(asked, ()))
        if asked in self._entries:
            found.add(asked)
        for name in tuple(found):
            found.update(self._members.get(name, ()))
        return found

    def update(self, entries: Mapping[str, Entry | None]) -> Changes:
        """Replace (or with None: remove) resources by name and tell the listeners what differs, if anything does."""
        changes: dict[str, frozenset[str]] = {}
        for name, new in entries.items():
            old = self._entries.get(name)
            if old == new:
                continue
            changes[name] = (old.names if old else frozenset()) | (new.names if new else frozenset())
            if old is not None:
                self._unlink(old)
            if new is None:
                del self._entries[name]
            else:
                self._entries[name] = new
                self._link(new)
        if changes:
            self.revision += 1
            for listener in tuple(self._listeners):
                listener(changes)
        return changes

    def listen(self, listener: Callable[[Changes], None]) -> Callable[[], None]:
        """Call `listener` with every later change; returns the function that ends that."""
        self._listeners.append(listener)
        return lambda: self._listeners.remove(listener)

    def _link(self, new: Entry) -> None:
        for alias in new.aliases:
            self._by_alias[alias] = (*self._by_alias.get(alias, ()), new.name)
        for group in new.groups:
            self._members.setdefault(group, set()).add(new.name)

    def _unlink(self, old: Entry) -> None:
        for alias in old.aliases:
            rest = tuple(name for name in self._by_alias[alias] if name != old.name)
            if rest:
                self._by_alias[alias] = rest
            else:
                del self._by_alias[alias]
        for group in old.groups:
            members = self._members[group]
            members.discard(old.name)
            if not members:
                del self._members[group]
