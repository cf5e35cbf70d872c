"""The command line of the control plane: parsing and checking, no effects."""

import argparse
import os
import socket
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from ztunnel import durations
from ztunnel.controlplane.kube import options as cluster_options
from ztunnel.controlplane.kube.options import ClusterOptions
from ztunnel.controlplane.translate import Settings
from ztunnel.identity.ca import DEFAULT_LIFETIMES, Lifetimes
from ztunnel.identity.errors import SpiffeIdError
from ztunnel.identity.spiffe import check_trust_domain

_EXAMPLE = (
    """example:
  python -m ztunnel.controlplane --store run/objects --ca-dir run/ca --tokens run/tokens --listen 127.0.0.1:15012
  python -m ztunnel.controlplane --kubernetes --revision canary

The log goes to standard error: LOG_FORMAT=text|json, LOG_LEVEL=debug|info|warn|error.
Certificates of workloads live for DEFAULT_WORKLOAD_CERT_TTL (24h) where a request names no time, and for
MAX_WORKLOAD_CERT_TTL (48h) at most: requests for more are refused.

"""
    + cluster_options.ENVIRONMENT
)


class StartError(Exception):
    """The control plane cannot start as it was asked to; the message names the remedy."""


class Options(NamedTuple):
    """What the process was asked to be."""

    store: Path | None
    ca_dir: Path | None
    tokens: Path | None
    host: str
    port: int
    settings: Settings
    port_file: Path | None = None
    admin: str = ""
    lifetimes: Lifetimes = DEFAULT_LIFETIMES
    publish: Path | None = None
    token_keys: Path | None = None
    token_issuer: str = ""
    cluster: ClusterOptions | None = None
    """Given if it serves a Kubernetes cluster instead of a directory."""


def parse(arguments: Sequence[str] | None = None) -> Options:
    """The options in `arguments` (default: the process's). Exits 0 for --help, 2 for usage that is wrong."""
    parser = argparse.ArgumentParser(
        prog="python -m ztunnel.controlplane",
        description="The mesh's control plane: serves workloads and services (xDS) and signs certificates.",
        epilog=_EXAMPLE,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--store", type=Path, metavar="DIR", help="the cluster's objects")
    parser.add_argument(
        "--ca-dir",
        type=Path,
        metavar="DIR",
        help="the certificate authority, made there if absent",
    )
    parser.add_argument(
        "--tokens",
        type=Path,
        metavar="DIR",
        help="who is which node: a file a node, its name the node's, in it the token",
    )
    parser.add_argument(
        "--token-keys",
        type=Path,
        metavar="FILE",
        help="or by service account tokens: the keys (JWKS) that sign them; audience istio-ca, bound to a node",
    )
    parser.add_argument(
        "--token-issuer",
        default="https://kubernetes.default.svc.cluster.local",
        metavar="URL",
        help="who issues them, default %(default)s",
    )
    parser.add_argument(
        "--listen",
        metavar="HOST:PORT",
        help="default 127.0.0.1:15012, in a cluster all addresses; port 0: any free one",
    )
    parser.add_argument(
        "--publish",
        type=Path,
        metavar="DIR",
        help="where root-cert.pem and ca-crl.pem are put for node proxies, default published/ in --ca-dir",
    )
    parser.add_argument("--trust-domain", metavar="NAME", help="default cluster.local")
    parser.add_argument("--cluster-id", metavar="NAME", help="default Kubernetes")
    parser.add_argument("--network", metavar="NAME", help="the workloads' network, default none")
    parser.add_argument(
        "--root-namespace",
        metavar="NAME",
        help="where the policies of the whole mesh are, default istio-system, in a cluster --namespace",
    )
    parser.add_argument(
        "--port-file", type=Path, metavar="PATH", help="write the port listened on to this file"
    )
    parser.add_argument(
        "--admin",
        default="",
        metavar="ADDRESS",
        help="admin pages: unix:PATH, or HOST:PORT on loopback; default none",
    )
    cluster_options.add_arguments(parser)
    given = parser.parse_args(arguments)
    if given.kubernetes:
        for flag in ("store", "ca_dir", "tokens", "token_keys", "publish"):
            if getattr(given, flag) is not None:
                parser.error(
                    f"--{flag.replace('_', '-')} is not used with --kubernetes; leave one of them out"
                )
    elif given.store is None or given.ca_dir is None:
        parser.error("the following arguments are required: --store, --ca-dir (or --kubernetes)")
    elif (given.tokens is None) == (given.token_keys is None):
        parser.error("give --tokens or --token-keys: how the nodes' proxies prove who they are")
    try:
        cluster = cluster_options.read(given, os.environ) if given.kubernetes else None
        settings = _settings(given, cluster, os.environ if given.kubernetes else {})
        check_trust_domain(settings.trust_domain)
        anywhere = cluster_options.anywhere() if given.kubernetes else "127.0.0.1"
        host, port = _listen_address(given.listen or f"{anywhere}:15012")
        _check_name("--cluster-id", settings.cluster_id)
        _check_name("--network", settings.network or "none")
        _check_name("--root-namespace", settings.root_namespace)
        lifetimes = _lifetimes(os.environ)
    except SpiffeIdError as error:
        parser.error(f"--trust-domain: {error}")
    except ValueError as error:
        parser.error(str(error))
    return Options(
        store=given.store,
        ca_dir=given.ca_dir,
        tokens=given.tokens,
        host=host,
        port=port,
        settings=settings,
        port_file=given.port_file,
        admin=given.admin,
        lifetimes=lifetimes,
        publish=given.publish,
        token_keys=given.token_keys,
        token_issuer=given.token_issuer,
        cluster=cluster,
    )


def _settings(
    given: argparse.Namespace, cluster: ClusterOptions | None, environment: Mapping[str, str]
) -> Settings:
    namespace = "istio-system" if cluster is None else cluster.namespace
    return Settings(
        given.cluster_id or environment.get("CLUSTER_ID") or "Kubernetes",
        given.trust_domain or environment.get("TRUST_DOMAIN") or "cluster.local",
        given.network or environment.get("NETWORK") or "",
        given.root_namespace or environment.get("ROOT_NAMESPACE") or namespace,
    )


def _lifetimes(environment: Mapping[str, str]) -> Lifetimes:
    """How long certificates live. Raises ValueError naming the variable."""
    seconds = []
    for name, default in (
        ("DEFAULT_WORKLOAD_CERT_TTL", DEFAULT_LIFETIMES.default),
        ("MAX_WORKLOAD_CERT_TTL", DEFAULT_LIFETIMES.most),
    ):
        try:
            seconds.append(int(durations.parse(environment[name])) if environment.get(name) else default)
        except ValueError as error:
            raise ValueError(f"{name}: {error}") from None
    try:
        return Lifetimes(*seconds)
    except ValueError as error:
        raise ValueError(f"DEFAULT_WORKLOAD_CERT_TTL, MAX_WORKLOAD_CERT_TTL: {error}") from None


def check_directories(options: Options) -> None:
    """Raise StartError for a directory that has to be there and is not."""
    for flag, path, content in (
        ("--store", options.store, "the objects to serve"),
        ("--tokens", options.tokens, "a token file for each node"),
    ):
        if path is not None and not path.is_dir():
            raise StartError(f"{flag} {path}: no such directory; make it and put in {content}")


def bind(options: Options) -> socket.socket:
    """A TCP socket bound to the address to listen on, not listening yet. Raises StartError."""
    where = f"{options.host}:{options.port}"
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(
            options.host, options.port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
    except OSError as error:
        raise StartError(
            f"--listen {where}: the host is not known ({error.strerror}); use an IP address of this machine"
        ) from None
    listener = socket.socket(family, kind, protocol)
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        # Inherited by accepted sockets: a client whose machine vanished is noticed within two minutes.
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, 60)
        listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, 15)
        listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPCNT, 4)
        listener.setblocking(False)
        listener.bind(address)
    except OSError as error:
        listener.close()
        raise StartError(
            f"--listen {where}: {error.strerror}; stop what listens there, or choose another address or port"
        ) from None
    return listener


def _check_name(flag: str, text: str) -> None:
    if not text or "/" in text or not text.isprintable():
        raise ValueError(
            f"{flag}: {text!r} cannot be part of a resource name; use letters, digits, '-' and '.'"
        )


def _listen_address(text: str) -> tuple[str, int]:
    host, colon, port = text.rpartition(":")
    if host.startswith("[") and host.endswith("]"):
        host = host[1:-1]
    elif ":" in host:
        host = ""
    if not (colon and host and port.isascii() and port.isdigit() and int(port) <= 65535):
        raise ValueError(f"--listen: {text!r} is not HOST:PORT; write it as 127.0.0.1:15012 or [::1]:15012")
    return host, int(port)
