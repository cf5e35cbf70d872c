"""A cluster's objects for the verbs: asked for when they are needed, decoded into the mesh's own types."""

from typing import TYPE_CHECKING, Any

import msgspec

from ztunnel.store.decode import decode, without_nulls
from ztunnel.store.kube.errors import ApiError, NoSuchKind
from ztunnel.store.models import K, Key, Object, group_of, key_of
from ztunnel.store.problems import Problem

if TYPE_CHECKING:
    from ztunnel.store.kube.api import Api

Items = list[dict[str, Any]]


class ClusterObjects:
    """Lists are kept for as long as this lives, which is one run of a verb."""

    def __init__(self, api: "Api") -> None:
        self.api = api
        self._lists: dict[tuple[type[Object], str], list[Any]] = {}
        self.raw: dict[Key, dict[str, Any]] = {}
        """The objects that were asked for, as the API server has them, without what it notes for itself."""
        self.problems: dict[Key, list[Problem]] = {}

    def list(self, kind: type[K], namespace: str | None = None) -> list[K]:
        """Those of a kind, of all namespaces or of one; none where the cluster has no such kind. Raises ApiError."""
        everything = self._lists.get((kind, ""))
        if everything is not None and namespace:
            return [obj for obj in everything if obj.namespace == namespace]
        where = namespace if namespace and kind.NAMESPACED else ""
        known = self._lists.get((kind, where))
        if known is None:
            known = [obj for item in self._raw(kind, where) if (obj := self.typed(kind, item)) is not None]
            self._lists[kind, where] = known
        return list(known)

    def get(self, kind: type[K], namespace: str, name: str) -> K | None:
        """One of them. Raises ApiError."""
        for version in (kind.API_VERSION, *kind.API_VERSIONS):
            item = self.api.get(version, kind.KIND, namespace if kind.NAMESPACED else "", name)
            if item is not None:
                return self.typed(kind, item)
        return None

    def find(self, key: Key) -> Object | None:
        """One, by its key. Raises ApiError."""
        from ztunnel.store.kinds import KINDS

        kind = KINDS.get(key.kind)
        if kind is None or group_of(kind.API_VERSION) != key.group:
            return None
        return self.get(kind, key.namespace, key.name)

    def forget(self) -> None:
        """Ask again the next time."""
        self._lists.clear()
        self.raw.clear()
        self.problems.clear()

    def _raw(self, kind: type[Object], namespace: str) -> Items:
        for version in (kind.API_VERSION, *kind.API_VERSIONS):
            try:
                return self.api.list(version, kind.KIND, namespace)
            except NoSuchKind:
                continue
            except ApiError as error:
                if error.not_found:
                    return []
                raise
        return []

    def typed(self, kind: type[K], item: dict[str, Any]) -> K | None:
        """A typed object, or None, and a problem, where it is none."""
        metadata = item.get("metadata", {})
        metadata.pop("managedFields", None)
        self.raw[key_of(kind, metadata.get("namespace", ""), metadata.get("name", ""))] = item
        if not kind.RESTRICTS:
            # The API server has judged it by a schema of its own: only what of it concerns the mesh is looked at.
            try:
                return msgspec.convert(without_nulls(item), kind)
            except msgspec.ValidationError as error:
                key = key_of(kind, metadata.get("namespace", ""), metadata.get("name", ""))
                self.problems[key] = [
                    Problem(str(key), "", str(error), "is this cluster newer than the mesh?")
                ]
                return None
        decoded = decode(item)
        if decoded.key is not None:
            self.problems[decoded.key] = [
                Problem(str(decoded.key), "", str(fault), fault.remedy, fault.severity)
                for fault in decoded.faults
            ]
        return decoded.obj if isinstance(decoded.obj, kind) else None
