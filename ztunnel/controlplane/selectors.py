"""Which Services select a pod, without looking at every Service of its namespace."""

from ztunnel.controlplane import translate
from ztunnel.store.models import Pod, Service

_Pair = tuple[str, str, str]  # namespace, label, value


class Selectors:
    """Each Service that selects anything stands under one of the labels that it asks for."""

    def __init__(self) -> None:
        self._by_label: dict[_Pair, dict[str, Service]] = {}

    def replace(self, old: Service | None, new: Service | None) -> None:
        """Put a Service in, take one out, or put it in another's place (of the same name)."""
        if old is not None and (pair := _pair(old)) is not None:
            services = self._by_label[pair]
            del services[old.name]
            if not services:
                del self._by_label[pair]
        if new is not None and (pair := _pair(new)) is not None:
            self._by_label.setdefault(pair, {})[new.name] = new

    def of(self, pod: Pod) -> list[Service]:
        """The Services that select the pod."""
        return [
            service
            for label, value in pod.metadata.labels.items()
            for service in self._by_label.get((pod.namespace, label, value), {}).values()
            if translate.selects(service, pod)
        ]


def _pair(service: Service) -> _Pair | None:
    """Where a Service stands; None for one that selects nothing."""
    selector = service.spec.selector
    if not selector or not translate.is_service(service):
        return None
    label = min(selector)
    return service.namespace, label, selector[label]
