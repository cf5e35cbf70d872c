"""The node daemon's settings, read from the environment under the names that Istio's ztunnel uses."""

import contextlib
import ipaddress
import os
import re
import resource
import socket
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from ztunnel import durations

_QUANTITY = re.compile(r"(\d+)(Ki|Mi|Gi)?")
_BYTES = {"Ki": 1 << 10, "Mi": 1 << 20, "Gi": 1 << 30, None: 1}
RESOLV_CONF = Path("/etc/resolv.conf")
LEAST_SECRET_TTL = 10  # seconds
LEAST_BUFFERS = 1 << 20  # bytes
# What a proxy needs beside what waits for slow readers: 77 MB with 100 pods, and room for handshakes that come at once.
WITHOUT_BUFFERS = 96 << 20  # bytes


class SettingError(ValueError):
    """An environment variable has a value that cannot be used; the message names it and what would be right."""


def _seconds(environment: Mapping[str, str], name: str, default: str) -> float:
    try:
        return durations.parse(environment.get(name, default))
    except ValueError as error:
        raise SettingError(f"{name}: {error}") from None


def _secret_ttl(environment: Mapping[str, str]) -> int:
    """Seconds that certificates are asked for, 0 for what the authority gives by itself. Raises SettingError."""
    if "SECRET_TTL" not in environment:
        return 0
    seconds = int(_seconds(environment, "SECRET_TTL", ""))
    if seconds < LEAST_SECRET_TTL:
        raise SettingError(
            f"SECRET_TTL: {environment['SECRET_TTL']!r} is less than {LEAST_SECRET_TTL}s: a certificate is renewed at "
            "half of its life, and a renewal that fails needs time for another try; 24h is usual"
        )
    return seconds


def most_files() -> int:
    """How many files a process may have open, as far as it may raise that itself."""
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    return hard if hard != resource.RLIM_INFINITY else 1 << 20


def _count(environment: Mapping[str, str], name: str, default: int) -> int:
    """A number of at least 1. Raises SettingError."""
    text = environment.get(name, str(default))
    if not text.isdecimal() or int(text) < 1:
        raise SettingError(f"{name}: {text!r} is not a number of at least 1")
    return int(text)


def _quantity(environment: Mapping[str, str], name: str, default: str, least: int) -> int:
    """Bytes of `256Mi` or a plain number, at least `least`. Raises SettingError."""
    text = environment.get(name, default)
    match = _QUANTITY.fullmatch(text)
    size = int(match[1]) * _BYTES[match[2]] if match is not None else -1
    if size < least:
        raise SettingError(f"{name}: {text!r} is not a number of bytes such as 256Mi, of at least {least}")
    return size


def _workers(environment: Mapping[str, str]) -> int:
    """How many worker processes. Raises SettingError."""
    workers = environment.get("ZTUNNEL_WORKER_THREADS", "2")
    if not workers.isdecimal() or not 1 <= int(workers) <= 64:
        raise SettingError(f"ZTUNNEL_WORKER_THREADS: {workers!r} is not a number of workers from 1 to 64")
    return int(workers)


def _buffer_limit(environment: Mapping[str, str]) -> int:
    """Bytes that may wait for slow readers, a worker. Raises SettingError.

    What is not said follows from MEMORY_LIMIT, that of the container: half of what is left of it, since the kernel
    keeps about as much of the same connections in its own buffers, and counts it to the container.
    """
    limit = _quantity(environment, "MEMORY_LIMIT", "0", 0)
    default = 256 << 20
    if limit:
        shared = max(0, limit - WITHOUT_BUFFERS) // 2 // _workers(environment)
        default = min(default, max(shared, 8 * LEAST_BUFFERS))
    return _quantity(environment, "BUFFER_LIMIT", str(default), LEAST_BUFFERS)


def _congestion_control(environment: Mapping[str, str], name: str) -> str:
    """The name of a congestion control that the kernel lets this process use, "" for the host's own choice."""
    wanted = environment.get(name, "")
    if wanted:
        with contextlib.closing(socket.socket(socket.AF_INET, socket.SOCK_STREAM)) as sock:
            try:
                sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_CONGESTION, wanted.encode())
            except OSError as error:
                raise SettingError(
                    f"{name}: {wanted!r}: {error.strerror}; the kernel offers those in "
                    "/proc/sys/net/ipv4/tcp_available_congestion_control"
                ) from None
    return wanted


def _flag(environment: Mapping[str, str], name: str, default: str) -> bool:
    """`true` or `false`. Raises SettingError."""
    text = environment.get(name, default).strip().lower()
    if text not in ("true", "false"):
        raise SettingError(f"{name}: {text!r} is neither true nor false")
    return text == "true"


def _servers(environment: Mapping[str, str], name: str, resolv_conf: Path) -> tuple[tuple[str, int], ...]:
    """DNS servers as address and port: those given, else those of resolv.conf(5) that a pod could reach, too.

    Given ones are `10.96.0.10`, `10.96.0.10:53` or `[fd00::a]:53`, with commas between. Raises SettingError.
    """
    found = []
    for text in filter(None, (each.strip() for each in environment.get(name, "").split(","))):
        bare = re.fullmatch(r"\[(.+)\](?::(\d+))?|([^:]+)(?::(\d+))?|(.+:.+:.*)", text)
        address, port = (bare[1] or bare[3] or bare[5], int(bare[2] or bare[4] or 53)) if bare else ("", 0)
        try:
            found.append((str(ipaddress.ip_address(address)), port))
        except ValueError:
            port = 0
        if not 0 < port < 65536:
            raise SettingError(
                f"{name}: {text!r} is not an IP address, perhaps with a port such as 10.96.0.10:53"
            )
    if found:
        return tuple(found)
    with contextlib.suppress(OSError):
        for words in map(str.split, resolv_conf.read_text(errors="replace").splitlines()):
            if len(words) > 1 and words[0] == "nameserver":
                with contextlib.suppress(ValueError):
                    address = str(ipaddress.ip_address(words[1]))
                    if not ipaddress.ip_address(address).is_loopback:
                        found.append((address, 53))
    return tuple(found)


@dataclass(frozen=True, kw_only=True, slots=True)
class WorkerSettings:
    """What a worker process reads itself, from the environment that it shares with the daemon.

    `pod_connections` and `pod_handshakes` are the most of one pod in a worker.
    `buffer_limit` is in bytes, a worker; `spin` in seconds; `gather`: let the kernel run a busy
    worker in its turn; `congestion_control` is that of tunnels, "" the host's.
    """

    trust_domain: str
    termination_grace: float
    streams_per_tunnel: int
    tunnel_idle: float
    buffer_limit: int
    spin: float
    gather: bool
    congestion_control: str
    pod_connections: int
    pod_handshakes: int

    @classmethod
    def from_environment(cls, environment: Mapping[str, str] = os.environ) -> "WorkerSettings":
        """Read the settings. Raises SettingError."""
        streams = environment.get("POOL_MAX_STREAMS_PER_CONNECTION", "100")
        if not streams.isdecimal() or int(streams) < 1:
            raise SettingError(f"POOL_MAX_STREAMS_PER_CONNECTION: {streams!r} is not a number of at least 1")
        spin = environment.get("ZTUNNEL_SPIN_MICROSECONDS", "0")
        if not spin.isdecimal() or int(spin) > 10_000:
            raise SettingError(f"ZTUNNEL_SPIN_MICROSECONDS: {spin!r} is not a number from 0 to 10000")
        gather = environment.get("ZTUNNEL_GATHER", "true")
        if gather not in ("true", "false"):
            raise SettingError(f"ZTUNNEL_GATHER: {gather!r} is neither true nor false")
        return cls(
            trust_domain=environment.get("TRUST_DOMAIN", "cluster.local"),
            termination_grace=_seconds(environment, "TERMINATION_GRACE_PERIOD", "30s"),
            streams_per_tunnel=int(streams),
            tunnel_idle=_seconds(environment, "POOL_UNUSED_RELEASE_TIMEOUT", "5m"),
            buffer_limit=_buffer_limit(environment),
            spin=int(spin) / 1_000_000,
            gather=gather == "true",
            congestion_control=_congestion_control(environment, "TUNNEL_CONGESTION_CONTROL"),
            pod_connections=_count(environment, "POD_CONNECTION_LIMIT", most_files() * 3 // 4),
            pod_handshakes=_count(environment, "POD_HANDSHAKE_LIMIT", 1024),
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class Settings:
    """All that the node daemon is told. Durations in seconds.

    `dns_upstream` are the DNS servers (address, port) for queries of which the kernel does not tell the server asked.
    `awaits_successor`: when told to end, serve on until another proxy listens (proxy/parting.py).
    """

    xds_address: str
    ca_address: str
    xds_root_ca: Path
    ca_root_ca: Path
    auth_token: Path
    cluster_id: str
    network: str
    node_name: str
    pod_name: str
    pod_namespace: str
    instance_ip: str
    trust_domain: str
    inpod_uds: str
    workers: int
    admin_address: str
    readiness_address: str
    metrics_address: str
    termination_grace: float
    secret_ttl: int
    dns_capture: bool = True
    dns_upstream: tuple[tuple[str, int], ...] = ()
    crl_path: Path | None = None
    awaits_successor: bool = False

    @classmethod
    def from_environment(cls, environment: Mapping[str, str] = os.environ) -> "Settings":
        """Read the settings, and look at those of the workers. Raises SettingError."""
        own = WorkerSettings.from_environment(environment)
        xds = environment.get("XDS_ADDRESS", "https://istiod.istio-system.svc:15012")
        root = environment.get("XDS_ROOT_CA", "./var/run/secrets/istio/root-cert.pem")
        return cls(
            xds_address=xds,
            ca_address=environment.get("CA_ADDRESS", xds),
            xds_root_ca=Path(root),
            ca_root_ca=Path(environment.get("CA_ROOT_CA", root)),
            auth_token=Path(environment.get("AUTH_TOKEN", "./var/run/secrets/tokens/istio-token")),
            cluster_id=environment.get("CLUSTER_ID", "Kubernetes"),
            network=environment.get("NETWORK", ""),
            node_name=environment.get("NODE_NAME", socket.gethostname()),
            pod_name=environment.get(
                "POD_NAME", f"ztunnel-{environment.get('NODE_NAME', socket.gethostname())}"
            ),
            pod_namespace=environment.get("POD_NAMESPACE", "istio-system"),
            instance_ip=environment.get("INSTANCE_IP", "127.0.0.1"),
            trust_domain=own.trust_domain,
            inpod_uds=environment.get("INPOD_UDS", "/var/run/ztunnel/ztunnel.sock"),
            workers=_workers(environment),
            admin_address=environment.get("ADMIN_ADDR", "127.0.0.1:15000"),
            readiness_address=environment.get("READINESS_ADDR", "0.0.0.0:15021"),
            metrics_address=environment.get("METRICS_ADDR", environment.get("STATS_ADDR", "0.0.0.0:15020")),
            termination_grace=own.termination_grace,
            dns_capture=_flag(environment, "ISTIO_META_DNS_CAPTURE", "true"),
            dns_upstream=_servers(environment, "DNS_UPSTREAM", RESOLV_CONF),
            secret_ttl=_secret_ttl(environment),
            crl_path=Path(environment["CRL_PATH"]) if environment.get("CRL_PATH") else None,
            awaits_successor=_flag(environment, "TERMINATION_AWAITS_SUCCESSOR", "false"),
        )
