"""Which kinds an API server serves, and under which paths; looked up once and remembered."""

import threading
from collections.abc import Callable
from typing import NamedTuple

import msgspec

from ztunnel.store.kube.errors import ApiError, NoSuchKind


class Resource(NamedTuple):
    """A kind as it is served: its plural in paths, whether its objects are in namespaces, its subresources."""

    plural: str
    namespaced: bool
    subresources: frozenset[str]


class _ApiResource(msgspec.Struct):
    name: str
    kind: str
    namespaced: bool = False


class _ApiResources(msgspec.Struct):
    resources: list[_ApiResource] = []


_decoder = msgspec.json.Decoder(_ApiResources)


class Discovery:
    """The kinds of each API version that anybody asked for. What is not served is asked for again each time."""

    def __init__(self, get: Callable[[str], bytes]) -> None:
        self._get = get
        self._known: dict[str, dict[str, Resource]] = {}
        self._lock = threading.Lock()

    def find(self, api_version: str, kind: str) -> Resource:
        """How a kind is served. Raises NoSuchKind, and ApiError where the server cannot be asked."""
        with self._lock:
            found = self._known.get(api_version, {}).get(kind)
        if found is not None:
            return found
        kinds = self._ask(api_version)
        with self._lock:
            self._known[api_version] = kinds
        if kind not in kinds:
            raise NoSuchKind(api_version, kind)
        return kinds[kind]

    def forget(self, api_version: str) -> None:
        """Ask again the next time: something of this version is no longer served."""
        with self._lock:
            self._known.pop(api_version, None)

    def _ask(self, api_version: str) -> dict[str, Resource]:
        try:
            data = self._get(base(api_version))
        except ApiError as error:
            if error.not_found:
                return {}
            raise
        try:
            listed = _decoder.decode(data).resources
        except msgspec.DecodeError:
            raise ApiError(0, "Garbled", f"the API server's list of {api_version} is not readable") from None
        subresources: dict[str, set[str]] = {}
        for resource in listed:
            plural, slash, part = resource.name.partition("/")
            if slash:
                subresources.setdefault(plural, set()).add(part)
        return {
            resource.kind: Resource(
                resource.name, resource.namespaced, frozenset(subresources.get(resource.name, ()))
            )
            for resource in listed
            if "/" not in resource.name
        }


def base(api_version: str) -> str:
    """The path of an API version: "v1" is /api/v1, "apps/v1" is /apis/apps/v1."""
    return f"/apis/{api_version}" if "/" in api_version else f"/api/{api_version}"
