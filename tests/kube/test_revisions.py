"""Two control planes side by side: the nodes and namespaces move from one to the other, and nobody's request fails."""

import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from tests.kube.lab import Lab
from tests.kube.sample import PORT, Sample, ambient, install, sample

pytestmark = [pytest.mark.kube, pytest.mark.timeout(600)]

SYSTEM = "istio-system"
ASK = (
    "rm -f /tmp/enough; asked=0; failed=0; while [ ! -e /tmp/enough ]; do asked=$((asked + 1)); "
    "curl -s -m 20 -o /dev/null {url} || failed=$((failed + 1)); done; echo $asked $failed"
)


class Asked:
    """How many requests, each with a connection of its own, were made during the block, and how many had no answer."""

    requests = 0
    failures = 0


@contextmanager
def asking(app: Sample) -> Iterator[Asked]:
    """Ask without a pause until the block ends."""
    asked = Asked()
    answers: list[str] = []
    url = f"http://{app.address('reviews')}:{PORT}/"

    def ask() -> None:
        answers.append(app.run("sh", "-c", ASK.format(url=url), timeout=400))

    thread = threading.Thread(target=ask)
    thread.start()
    try:
        yield asked
    finally:
        app.run("touch", "/tmp/enough")
        thread.join()
    (answer,) = answers
    asked.requests, asked.failures = map(int, answer.split())


@pytest.fixture
def app(cluster: Lab) -> Iterator[Sample]:
    """The mesh with its default control plane, and an application in it; neither is there at the end."""
    with sample(cluster, "default") as made:
        install(cluster)
        try:
            with made.joined():
                yield made
        finally:
            ambient(cluster, "uninstall", "--purge", "-y")


def test_a_move_to_a_new_control_plane_and_the_removal_of_the_old_one_fail_no_request(
    cluster: Lab, app: Sample
) -> None:
    lives = app.lives()
    with asking(app) as asked:
        install(cluster, "--revision", "next")
        ambient(cluster, "check", "--wait", "120")
        cluster.kubectl("label", "namespace", "default", "istio.io/rev=next")
        ambient(cluster, "uninstall", "--revision", "default", "-y")
    assert asked.failures == 0
    assert asked.requests > 50
    assert app.lives() == lives
    planes = cluster.kubectl("get", "deployment", "-n", SYSTEM, "-o", "name").split()
    assert planes == ["deployment.apps/istiod-next"]
    ambient(cluster, "check", "--wait", "120")  # the proxies connect to what is left, in their own time
    clients = json.loads(ambient(cluster, "proxy-status", "-o", "json"))["clients"]
    assert {client["node"] for client in clients} == {"node1", "node2"}

    # It serves whoever names no revision now, too.
    cluster.kubectl("label", "namespace", "default", "istio.io/rev-")
    ambient(cluster, "waypoint", "apply", "--namespace", "default", "--name", "heirs", "--wait")
    gateway = json.loads(cluster.kubectl("get", "gateway", "heirs", "-n", "default", "-o", "json"))
    (programmed,) = [one for one in gateway["status"]["conditions"] if one["type"] == "Programmed"]
    assert programmed["status"] == "True"
    ambient(cluster, "waypoint", "delete", "heirs", "--namespace", "default")
