"""Objects in a cluster that somebody wrote for a mesh, and that this version does not act on."""

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from ztunnel.store.kinds import FOREIGN, Foreign, of_a_mesh
from ztunnel.store.kube.errors import ApiError
from ztunnel.store.models import reference
from ztunnel.store.problems import Problem

if TYPE_CHECKING:
    from ztunnel.store.kube.api import Api

_GATEWAY_API = "gateway.networking.k8s.io"


def unused(api: "Api") -> Iterator[Problem]:
    """A warning for each. Kinds that the user may not read are left out. Raises ApiError.

    Of the Gateway API those that are for Services are told: those of Gateways are other controllers' affair.
    """
    for version, kind in _served(api):
        try:
            items = api.list(version, kind.kind)
        except ApiError as error:
            if error.forbidden or error.not_found:
                continue
            raise
        for item in items:
            if kind.group != _GATEWAY_API or _for_a_service(item):
                metadata = item["metadata"]
                ref = reference(kind.kind, metadata.get("namespace", ""), metadata["name"])
                yield Problem(ref, "", kind.consequence, "do not rely on it", "warning")


def _served(api: "Api") -> Iterator[tuple[str, Foreign]]:
    """The kinds for meshes that are not acted on, as far as the cluster has them, with the first version of each."""
    wanted: dict[str, list[Foreign]] = {}
    for kind in FOREIGN.values():
        if of_a_mesh(kind.group):
            wanted.setdefault(kind.group, []).append(kind)
    for group in api.get_json("/apis").get("groups") or ():
        left = wanted.get(group["name"], [])
        for version in (each["groupVersion"] for each in group["versions"]):
            if not left:
                break
            present = {each["kind"] for each in api.get_json(f"/apis/{version}").get("resources") or ()}
            yield from ((version, kind) for kind in left if kind.kind in present)
            left = [kind for kind in left if kind.kind not in present]


def _for_a_service(route: dict[str, Any]) -> bool:
    """Whether a route is about traffic within a mesh."""
    parents = (route.get("spec") or {}).get("parentRefs") or ()
    return any(parent.get("kind") in ("Service", "ServiceEntry") for parent in parents)
