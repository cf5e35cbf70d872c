"""What is in a cluster for a mesh and not acted on is told; what is others' affair is not."""

from typing import Any, cast

from ztunnel.cli.kube.unused import unused
from ztunnel.store.kube.api import Api
from ztunnel.store.kube.errors import ApiError


class Server:
    """Groups, kinds and objects, as an API server lists them; kinds in `denied` may not be read."""

    def __init__(self, objects: dict[str, dict[str, list[dict[str, Any]]]], denied: str = "") -> None:
        self.objects = objects
        self.denied = denied

    def get_json(self, path: str) -> dict[str, Any]:
        if path == "/apis":
            groups: dict[str, list[dict[str, str]]] = {}
            for version in self.objects:
                groups.setdefault(version.partition("/")[0], []).append({"groupVersion": version})
            return {"groups": [{"name": name, "versions": versions} for name, versions in groups.items()]}
        return {"resources": [{"kind": kind} for kind in self.objects[path.removeprefix("/apis/")]]}

    def list(self, version: str, kind: str) -> list[dict[str, Any]]:
        if kind == self.denied:
            raise ApiError(403, "Forbidden", "no")
        return self.objects[version][kind]


def named(name: str, **spec: Any) -> dict[str, Any]:
    return {"metadata": {"namespace": "shop", "name": name}, "spec": spec}


OBJECTS = {
    "apps/v1": {"StatefulSet": [named("kubernetes-own")]},
    "install.istio.io/v1alpha1": {"IstioOperator": [named("settings")]},
    "security.istio.io/v1": {
        "RequestAuthentication": [named("jwt")],
        "AuthorizationPolicy": [named("acted-on")],
    },
    "security.istio.io/v1beta1": {"RequestAuthentication": [named("the-same-again")]},
    "networking.istio.io/v1beta1": {"VirtualService": [named("routes")], "Sidecar": []},
    "gateway.networking.k8s.io/v1": {
        "HTTPRoute": [
            named("mesh", parentRefs=[{"kind": "Service", "name": "web"}]),
            named("others", parentRefs=[{"name": "gateway"}]),
        ]
    },
}


def test_what_is_there_for_a_mesh_and_not_acted_on_is_told() -> None:
    found = {str(one.object): one for one in unused(cast(Api, Server(OBJECTS)))}
    assert set(found) == {
        "RequestAuthentication shop/jwt",
        "VirtualService shop/routes",
        "HTTPRoute shop/mesh",
    }
    assert found["RequestAuthentication shop/jwt"].message == "is not enforced by this version"
    assert {one.severity for one in found.values()} == {"warning"}


def test_kinds_that_may_not_be_read_are_left_out() -> None:
    found = [one.object for one in unused(cast(Api, Server(OBJECTS, "RequestAuthentication")))]
    assert "VirtualService shop/routes" in found
    assert not any("jwt" in name for name in found)
