"""Cluster objects for tests, as the resolver would have made them: addresses given, pods ready."""

from collections.abc import Iterable

from ztunnel.embedded.view import View
from ztunnel.store.models import (
    Container,
    ContainerPort,
    Namespace,
    Object,
    ObjectMeta,
    Pod,
    PodCondition,
    PodIP,
    PodSpec,
    PodStatus,
    Service,
    ServicePort,
    ServiceSpec,
)


def pod(
    name: str,
    *addresses: str,
    ready: bool = True,
    labels: dict[str, str] | None = None,
    ports: Iterable[ContainerPort] = (ContainerPort(name="http", container_port=8080),),
    hostname: str = "",
    subdomain: str = "",
) -> Pod:
    """A pod labelled app=web unless said otherwise."""
    return Pod(
        metadata=ObjectMeta(name=name, namespace="default", labels=labels or {"app": "web"}),
        spec=PodSpec(
            containers=[Container(name="c", ports=list(ports))], hostname=hostname, subdomain=subdomain
        ),
        status=PodStatus(
            pod_ips=[PodIP(ip=address) for address in addresses],
            conditions=[PodCondition(type="Ready", status="True" if ready else "False")],
        ),
    )


def service(
    name: str,
    *ports: ServicePort,
    addresses: Iterable[str] = (),
    selector: dict[str, str] | None = None,
    publish_not_ready: bool = False,
) -> Service:
    """A Service that selects app=web; headless without addresses."""
    given = list(addresses) or ["None"]
    return Service(
        metadata=ObjectMeta(name=name, namespace="default"),
        spec=ServiceSpec(
            cluster_ip=given[0],
            cluster_ips=given,
            selector={"app": "web"} if selector is None else selector,
            ports=list(ports),
            publish_not_ready_addresses=publish_not_ready,
        ),
    )


def view_of(*objects: Object) -> View:
    """A view of these objects and the namespace default."""
    view = View()
    for obj in (Namespace(metadata=ObjectMeta(name="default")), *objects):
        view.put(obj)
    view.notify()
    return view
