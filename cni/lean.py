"""Spares a process that needs little of its libraries the rest of them: of an agent's 45 MB 12.

To be called before any of them is imported, and in programs of their own only, never in a library: who imports the
same packages after that finds them without what they would have.
"""

import importlib.util
import sys
import types

_SOCKETS = "pyroute2.netlink.nlsocket"


def import_in_part() -> None:
    """Let the agent's modules of pyroute2 and urllib3 be imported without what only others need of them.

    Netlink's messages without pyroute2's own package, which imports all of it, a database too (8 MB), and without its
    sockets, which bring asyncio (2.5 MB); HTTP/1.1 without urllib3's look at the version of HTTP/2's library (1 MB).
    """
    _hollow("pyroute2")
    _hollow("urllib3", "http2")
    if _SOCKETS not in sys.modules:
        sockets = types.ModuleType(
            _SOCKETS, "Names of classes that others are derived from; nobody makes any."
        )
        for name in ("AsyncNetlinkSocket", "Marshal", "NetlinkSocket"):
            setattr(sockets, name, type(name, (), {}))
        sys.modules[_SOCKETS] = sockets


def _hollow(top: str, *below: str) -> None:
    """Let a package's modules be imported without what it imports itself."""
    name = ".".join((top, *below))
    spec = importlib.util.find_spec(top) if top not in sys.modules else None
    if spec is None or spec.submodule_search_locations is None:
        return
    package = types.ModuleType(name, "Its modules, without what the package imports.")
    package.__path__ = ["/".join((place, *below)) for place in spec.submodule_search_locations]
    sys.modules[name] = package
