"""The Services of a pod are found by its labels: the same ones that a look at every Service finds."""

import random

from tests.controlplane.objects import pod, service
from ztunnel.controlplane import translate
from ztunnel.controlplane.selectors import Selectors
from ztunnel.store.models import Pod, Service

LABELS = ("app", "tier", "track")
VALUES = ("a", "b", "c")


def names(selectors: Selectors, of: Pod) -> list[str]:
    return sorted(found.name for found in selectors.of(of))


def test_every_service_that_selects_a_pod_is_found_once() -> None:
    choice = random.Random(5)
    selectors = Selectors()
    services: dict[str, Service] = {}
    for _ in range(300):
        name = f"s-{choice.randrange(20)}"
        selector = {label: choice.choice(VALUES) for label in choice.sample(LABELS, choice.randrange(4))}
        new = service(name, selector=selector) if choice.random() < 0.8 else None
        selectors.replace(services.pop(name, None), new)
        if new is not None:
            services[name] = new
        one = pod("p", labels={label: choice.choice(VALUES) for label in LABELS})
        assert names(selectors, one) == sorted(
            each.name for each in services.values() if translate.selects(each, one)
        )


def test_other_namespaces_and_other_kinds_of_services_select_nothing() -> None:
    selectors = Selectors()
    selectors.replace(None, service("here", selector={"app": "a"}))
    selectors.replace(None, service("alias", selector={"app": "a"}, type="ExternalName"))
    assert names(selectors, pod("p", labels={"app": "a"})) == ["here"]
    assert names(selectors, pod("p", labels={"app": "a"}, namespace="there")) == []
