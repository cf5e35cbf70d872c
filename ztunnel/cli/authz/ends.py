"""The two ends of a connection as the user names them: pods, Services, identities, addresses."""

from ipaddress import ip_address
from typing import TYPE_CHECKING, NamedTuple

from ztunnel.cli.errors import UserError

if TYPE_CHECKING:
    from ztunnel.cli.session import Mesh
    from ztunnel.store.models import Pod, Service, ServicePort

TRUST_DOMAIN = "cluster.local"
ANYWHERE = ("192.0.2.1", "2001:db8::1")
"""Addresses that nobody has (RFC 5737, RFC 3849): of callers whose address is not told."""

FROM = "POD, deploy/NAME, a SPIFFE id or principal (cluster.local/ns/NS/sa/NAME), or an address for plaintext from it"
TO = "POD, deploy/NAME, svc/NAME, or just the name of a Service"


class Caller(NamedTuple):
    """Who connects. `identity` is a SPIFFE id, "" without a tunnel; `addresses` as text, invented if `anywhere`."""

    told: str
    identity: str
    addresses: tuple[str, ...]
    anywhere: bool = False

    def address_like(self, other: str) -> str:
        """Its address of the same family as another one, else its first."""
        family = ip_address(other).version
        return next(
            (each for each in self.addresses if ip_address(each).version == family), self.addresses[0]
        )


class Destination(NamedTuple):
    """One pod and its port; `port` 0: it has none behind the Service's. `direct`: it is meant by its own address."""

    pod: "Pod"
    port: int
    direct: bool = False


def caller(mesh: "Mesh", namespace: str, given: str, address: str | None) -> Caller:
    """Who `--from` means; `address` replaces the one it has. Raises UserError."""
    from ztunnel.store.membership import in_mesh
    from ztunnel.store.models import Pod

    told = _address(given)
    if told:
        return Caller(f"plaintext from {told}", "", (_address(address) or told,))
    own = (_checked(address),) if address else ()
    identity = _identity(given)
    if identity:
        _, _, _, _, space, _, account = identity.split("/")
        pods = [
            pod for pod in mesh.objects.list(Pod, space) if pod.service_account == account and pod.addresses
        ]
        if own or pods:
            return Caller(identity, identity, own or tuple(pods[0].addresses))
        return Caller(identity, identity, ANYWHERE, anywhere=True)
    pod = mesh.pod(*_named(given, namespace))
    if not in_mesh(pod):
        return Caller(f"pod {pod.namespace}/{pod.name}, not in the mesh", "", own or _addresses(pod))
    identity = f"spiffe://{TRUST_DOMAIN}/ns/{pod.namespace}/sa/{pod.service_account}"
    return Caller(f"pod {pod.namespace}/{pod.name} ({identity})", identity, own or _addresses(pod))


def destinations(mesh: "Mesh", namespace: str, given: str, port: int) -> list[Destination]:
    """The pods that `--to` means: one, or those of a Service with their target ports. Raises UserError.

    A plain name is a pod's whole name, or a Service with this port, or the beginning of a pod's name, in this order.
    """
    from ztunnel.store.models import Pod, Service

    namespace, name = _named(given, namespace)
    kind, slash, rest = name.rpartition("/")
    if slash and kind.lower() in ("svc", "service", "services"):
        service = mesh.objects.get(Service, namespace, rest)
        if service is None:
            raise UserError(f'no Service "{rest}" in namespace {namespace}', "see: ambient get services -A")
        return _endpoints(mesh, service, port)
    service = None if mesh.objects.get(Pod, namespace, name) else mesh.objects.get(Service, namespace, name)
    if service is not None and any(each.port == port for each in service.spec.ports):
        return _endpoints(mesh, service, port)
    try:
        return [Destination(mesh.pod(namespace, name), port, direct=True)]
    except UserError:
        if service is None:
            raise
        return _endpoints(mesh, service, port)


def _endpoints(mesh: "Mesh", service: "Service", port: int) -> list[Destination]:
    from ztunnel.controlplane.translate import selects
    from ztunnel.store.models import Pod

    ports = [each for each in service.spec.ports if each.port == port and each.protocol == "TCP"]
    if not ports:
        known = ", ".join(str(each.port) for each in service.spec.ports) or "none"
        raise UserError(f"{service.ref} has no TCP port {port}", f"its ports are: {known}")
    pods = [
        pod for pod in mesh.objects.list(Pod, service.namespace) if selects(service, pod) and pod.addresses
    ]
    if not pods:
        raise UserError(f"{service.ref} has no pods", "see: ambient get services,pods")
    return [Destination(pod, _target(pod, ports[0])) for pod in pods]


def _target(pod: "Pod", port: "ServicePort") -> int:
    target = port.target_port
    if not isinstance(target, str):
        return target or port.port
    for container in pod.spec.containers:
        for each in container.ports:
            if each.name == target and each.protocol == port.protocol:
                return each.container_port
    return 0


def _named(given: str, namespace: str) -> tuple[str, str]:
    """Namespace and name; `NS/POD` names one of another namespace."""
    where, slash, name = given.partition("/")
    kinds = ("po", "pod", "pods", "deploy", "deployment", "deployments", "svc", "service", "services")
    return (where, name) if slash and where.lower() not in kinds else (namespace, given)


def _identity(given: str) -> str:
    words = given.removeprefix("spiffe://").split("/")
    if len(words) == 5 and words[1] == "ns" and words[3] == "sa" and all(words):
        return "spiffe://" + "/".join(words)
    if given.startswith("spiffe://"):
        raise UserError(
            f"{given} is no identity", "write spiffe://TRUST_DOMAIN/ns/NAMESPACE/sa/SERVICE_ACCOUNT"
        )
    return ""


def _address(given: str | None) -> str:
    try:
        return str(ip_address(given or ""))
    except ValueError:
        return ""


def _checked(given: str) -> str:
    address = _address(given)
    if not address:
        raise UserError(f"{given} is no IP address", "write it as 10.0.0.1 or fd00::1")
    return address


def _addresses(pod: "Pod") -> tuple[str, ...]:
    return tuple(pod.addresses) or ANYWHERE
