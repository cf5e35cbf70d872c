"""The checks that only a cluster has: facts in, outcomes out."""

from typing import Any

from ztunnel.cli.checks.facts import NodeFacts
from ztunnel.cli.checks.outcome import Result
from ztunnel.cli.kube.checks import CHECKS, ClusterFacts


def page(*pods: dict[str, Any]) -> NodeFacts:
    return NodeFacts("node1", {"problems": [], "ztunnels": 1, "pods": list(pods)})


def pod(name: str, **changed: Any) -> dict[str, Any]:
    return {"namespace": "default", "name": name, "wanted": True, "joined": True, "problem": "", **changed}


def test_pods_that_start_or_end_are_not_told_as_outside_the_mesh() -> None:
    (check,) = [each for each in CHECKS if each.name.startswith("the kernel redirects")]
    facts = ClusterFacts(
        agents=[page(pod("in"), pod("starts", joined=False), pod("not", wanted=False, joined=False))]
    )
    assert check.judge(facts).result is Result.OK
    facts.agents.append(page(pod("lost", joined=False, problem="it is about to join")))
    assert check.judge(facts).details == ["default/lost on node1: it is about to join"]
