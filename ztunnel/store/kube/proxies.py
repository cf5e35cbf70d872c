"""Through which HTTP proxy an API server is reached, by the rules of kubectl (Go's net/http).

A kubeconfig's `proxy-url` counts for its cluster whatever the environment says; else HTTPS_PROXY (HTTP_PROXY for
plaintext), but not for what NO_PROXY names, nor for this machine.
"""

import ipaddress
from collections.abc import Mapping
from urllib.parse import SplitResult, unquote, urlsplit

_PORTS = {"http": 80, "https": 443}


def proxy_for(server: str, given: str, environment: Mapping[str, str]) -> str:
    """The proxy's URL, with a scheme and a port; "" for none. `given` is the kubeconfig's own.

    Raises ValueError for a proxy that cannot be used; its message holds no password.
    """
    url = urlsplit(server)
    name = f"{url.scheme}_proxy"
    chosen = given
    if not given:
        chosen = environment.get(name) or environment.get(name.upper(), "")
        bypassed = environment.get("no_proxy") or environment.get("NO_PROXY", "")
        if not chosen or _is_local(url.hostname or "") or _bypasses(url, bypassed):
            return ""
    return _usable(chosen)


def credentials(proxy: str) -> str:
    """USER:PASSWORD in a proxy's URL, "" if there are none."""
    url = urlsplit(proxy)
    return f"{unquote(url.username)}:{unquote(url.password or '')}" if url.username else ""


def _usable(text: str) -> str:
    url = urlsplit(text if "://" in text else f"http://{text}")
    if url.scheme not in _PORTS:
        raise ValueError(f"the proxy is a {url.scheme}:// one: only http:// and https:// ones are supported")
    try:
        port = url.port or _PORTS[url.scheme]
    except ValueError:
        port = 0
    if not url.hostname or not port:
        raise ValueError("the proxy has no host and port that can be read: write it as http://HOST:PORT")
    host = f"[{url.hostname}]" if ":" in url.hostname else url.hostname
    user = f"{url.netloc.rpartition('@')[0]}@" if url.username else ""
    return f"{url.scheme}://{user}{host}:{port}"


def _is_local(host: str) -> bool:
    try:
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def _bypasses(url: SplitResult, rules: str) -> bool:
    """Whether NO_PROXY names the server: an address, a CIDR, a host (and those below it), each with a port or not."""
    host = (url.hostname or "").lower()
    port = url.port or _PORTS.get(url.scheme, 0)
    for rule in (part.strip().lower() for part in rules.split(",")):
        if rule == "*":
            return True
        if rule and _names(rule, host, port):
            return True
    return False


def _names(rule: str, host: str, port: int) -> bool:
    try:
        address = ipaddress.ip_address(host)
    except ValueError:
        address = None
    try:
        network = ipaddress.ip_network(rule.strip("[]"), strict=False)
    except ValueError:
        pass
    else:
        return address is not None and address in network
    name, colon, digits = rule.rpartition(":")
    if colon and digits.isdecimal():
        return int(digits) == port and bool(name) and _names(name, host, port)
    name = rule.removeprefix("*")
    if name.startswith("."):
        return host.endswith(name)
    return address is None and (host == name or host.endswith(f".{name}"))
