"""What a worker remembers of routes: found by destination, forgotten by tag, and never more than a bound."""

from ztunnel.mesh.route import Endpoint, Route
from ztunnel.proxy import routes
from ztunnel.proxy.routes import RouteCache


def route(*tags: str) -> Route:
    return Route((Endpoint("10.0.0.1", 80, False, "", "", "", ""),), "", "", tags)


def test_routes_are_forgotten_by_any_of_their_tags() -> None:
    cache = RouteCache()
    cache.remember(b"a", route("ip:1", "svc:x"))
    cache.remember(b"b", route("ip:2", "svc:x"))
    cache.remember(b"c", route("ip:3"))
    cache.forget("ip:1")
    assert cache.get(b"a") is None
    assert cache.get(b"b") is not None
    cache.forget("svc:x")
    assert cache.get(b"b") is None
    cache.forget("unknown")
    assert len(cache) == cache.tags == 1
    cache.clear()
    assert len(cache) == cache.tags == 0


def test_a_route_that_changed_is_not_found_by_its_old_tags() -> None:
    cache = RouteCache()
    cache.remember(b"a", route("old"))
    cache.remember(b"a", route("new"))
    cache.forget("old")
    found = cache.get(b"a")
    assert found is not None
    assert found.route == route("new")


def test_a_scan_of_all_ports_does_not_grow_it_without_bound() -> None:
    cache = RouteCache()
    for port in range(3 * routes.MOST):
        cache.remember(port.to_bytes(2, "big"), route("ip:1", f"port:{port}"))
    assert len(cache) == routes.MOST
    assert cache.tags == routes.MOST + 1
    assert cache.get((3 * routes.MOST - 1).to_bytes(2, "big")) is not None
