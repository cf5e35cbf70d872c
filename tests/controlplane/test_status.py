"""The status of policies: written beside others' conditions, and not again where it says so already."""

from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from typing import Any

import pytest
import trio

from tests.store.kube.server import Answer, Fake, Request, failure, serving
from ztunnel.controlplane.policy_registry import PolicyObject
from ztunnel.controlplane.policy_status import Finding
from ztunnel.controlplane.status import StatusWriter
from ztunnel.store.kube.store import KubernetesStore
from ztunnel.store.models import AuthorizationPolicy, Condition, ObjectMeta, PolicyStatus

LIMIT = 60.0  # seconds
OTHERS = {"type": "Audited", "status": "True", "reason": "Done", "message": "by somebody else"}
FINDING = Finding(True, "Accepted", "enforced by ztunnel: all rules")
RESOURCES = [{"name": "authorizationpolicies", "kind": "AuthorizationPolicy", "namespaced": True}]


class Server:
    """Keeps one policy as an API server does."""

    def __init__(self, *conditions: dict[str, Any], generation: int = 1) -> None:
        self.version = 1
        self.generation = generation
        self.conditions = list(conditions)
        self.meanwhile: list[dict[str, Any]] = []  # what others write just before the next patch
        self.patches = 0

    def __call__(self, request: Request) -> Answer:
        if request.path == "/apis/security.istio.io/v1":
            return Answer(body={"resources": RESOURCES})
        if request.method == "PATCH":
            assert request.path.endswith("/status")
            if self.meanwhile:
                self.conditions, self.meanwhile = [*self.conditions, *self.meanwhile], []
                self.version += 1
            if request.json["metadata"]["resourceVersion"] != str(self.version):
                return failure(409, "Conflict", "the object has been modified")
            self.patches += 1
            self.version += 1
            self.conditions = request.json["status"]["conditions"]
        metadata = {
            "name": "p",
            "namespace": "default",
            "uid": "u",
            "generation": self.generation,
            "resourceVersion": str(self.version),
        }
        return Answer(body={"metadata": metadata, "status": {"conditions": self.conditions}})

    def condition(self) -> dict[str, Any]:
        (found,) = [one for one in self.conditions if one["type"] == "ZtunnelAccepted"]
        return found


@pytest.fixture
def server() -> Server:
    return Server()


@pytest.fixture
def fake(server: Server) -> Iterator[Fake]:
    with serving(server) as fake:
        yield fake


@asynccontextmanager
async def writing(fake: Fake, *told: tuple[PolicyObject, Finding]) -> AsyncIterator[StatusWriter]:
    writer = StatusWriter(KubernetesStore(fake.api()))
    writer.put(told)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(writer.run)
        with trio.fail_after(LIMIT):
            yield writer
        nursery.cancel_scope.cancel()


async def written(writer: StatusWriter) -> None:
    while writer.waits:
        await trio.sleep(0.01)


def policy(generation: int = 1, *conditions: Condition) -> AuthorizationPolicy:
    metadata = ObjectMeta(name="p", namespace="default", uid="u", generation=generation)
    return AuthorizationPolicy(metadata=metadata, spec={}, status=PolicyStatus(conditions=list(conditions)))


async def test_conditions_that_others_wrote_meanwhile_stay(server: Server, fake: Fake) -> None:
    server.conditions = [OTHERS]  # it is not in what we knew of the policy
    server.meanwhile = [{**OTHERS, "type": "Reviewed"}]  # and this comes between reading and writing
    async with writing(fake, (policy(), FINDING)) as writer:
        await written(writer)
    assert [one["type"] for one in server.conditions] == ["Audited", "Reviewed", "ZtunnelAccepted"]
    assert server.conditions[0] == OTHERS
    assert server.patches == 1


async def test_what_another_replica_wrote_is_not_written_again(server: Server, fake: Fake) -> None:
    """A replica that begins to lead still has everything to write of what it knew the status of before."""
    then = "2026-01-02T03:04:05Z"
    server.conditions = [
        {
            "type": "ZtunnelAccepted",
            "status": "True",
            "reason": "Accepted",
            "message": FINDING.message,
            "lastTransitionTime": then,
            "observedGeneration": 1,
        }
    ]
    events: list[Finding] = []
    async with writing(fake, (policy(), FINDING)) as writer:
        writer.told = lambda _, finding: events.append(finding)
        await written(writer)
    assert (server.patches, events) == (0, [])
    assert server.condition()["lastTransitionTime"] == then


async def test_a_new_generation_is_told_even_where_nothing_else_changed(server: Server, fake: Fake) -> None:
    async with writing(fake, (policy(), FINDING)) as writer:
        await written(writer)
        before = server.condition()
        server.generation = 2
        known = Condition(
            type="ZtunnelAccepted",
            status="True",
            reason="Accepted",
            message=FINDING.message,
            observed_generation=1,
        )
        writer.put([(policy(2, known), FINDING)])
        await written(writer)
        assert server.condition() == {**before, "observedGeneration": 2}
        # Of what is already another generation nothing is said: it is about to be judged.
        server.generation = 3
        writer.put([(policy(2), Finding(False, "Invalid", "wrong"))])
        await written(writer)
    assert server.condition() == {**before, "observedGeneration": 2}
