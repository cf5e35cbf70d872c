"""The routes that one pod's connections asked for, until the mesh changes where they lead.

Rule: bounded. A program that scans ports asks for as many destinations as it likes; the oldest are forgotten.
"""

from collections.abc import Callable
from random import Random
from typing import NamedTuple

from ztunnel.inpod.sockets import INBOUND_HBONE_PORT, host_port
from ztunnel.mesh.balance import Balance
from ztunnel.mesh.route import Endpoint, Route

MOST = 4096
"""Routes of one pod; about 1 KiB each."""


class Way(NamedTuple):
    """An endpoint, and the texts that each connection to it needs."""

    endpoint: Endpoint
    address: str
    """Of the application, with its port: what the tunnel is asked for, and the access log shows."""
    hbone_address: str
    """Of the proxy in front of it; empty where there is none."""


class Ways:
    """A route, prepared: what one connection after the other needs of it is made once."""

    __slots__ = ("_balance", "_ways", "route")

    def __init__(self, route: Route) -> None:
        self.route = route
        self._ways: list[Way | None] = [None] * len(route.endpoints)
        self._balance = Balance([one.weight for one in route.endpoints]) if route.endpoints else None

    def choose(self, rng: Random) -> Way:
        """The way of the next connection. Raises ValueError if there is none: the route is an error."""
        if self._balance is None:
            raise ValueError("no endpoints to choose from: a Route without any carries an error")
        index = self._balance.choose(rng) if len(self._ways) > 1 else 0
        way = self._ways[index]
        if way is None:
            way = self._ways[index] = _way(self.route.endpoints[index])
        return way


def _way(endpoint: Endpoint) -> Way:
    return Way(
        endpoint,
        endpoint.authority or host_port(endpoint.address, endpoint.port),
        host_port(endpoint.address, INBOUND_HBONE_PORT) if endpoint.hbone else "",
    )


class RouteCache:
    """Routes by destination (2 bytes port, packed address), each findable by its tags."""

    __slots__ = ("_routes", "_tagged", "get")

    def __init__(self) -> None:
        self._routes: dict[bytes, Ways] = {}
        self._tagged: dict[str, set[bytes]] = {}
        self.get: Callable[[bytes], Ways | None] = self._routes.get

    def __len__(self) -> int:
        return len(self._routes)

    @property
    def tags(self) -> int:
        """How many tags are known."""
        return len(self._tagged)

    def remember(self, key: bytes, route: Route) -> None:
        """Keep a route; the oldest one goes if there are MOST."""
        self._forget(key)
        if len(self._routes) >= MOST:
            self._forget(next(iter(self._routes)))
        self._routes[key] = Ways(route)
        for tag in route.tags:
            self._tagged.setdefault(tag, set()).add(key)

    def forget(self, tag: str) -> None:
        """Forget the routes with this tag."""
        for key in self._tagged.pop(tag, ()):
            self._forget(key)

    def clear(self) -> None:
        """Forget all."""
        self._routes.clear()
        self._tagged.clear()

    def _forget(self, key: bytes) -> None:
        ways = self._routes.pop(key, None)
        for tag in ways.route.tags if ways is not None else ():
            keys = self._tagged.get(tag)
            if keys is not None:
                keys.discard(key)
                if not keys:
                    del self._tagged[tag]
