"""The pages of a node's daemon about policies: which there are, whom they concern, and what was judged lately.

`/debug/connections/recent` is a JSON object: `node`, `recent` and, of workers that did not answer, `errors`. Each of
`recent` stands for all connections of the same peer to the same port with the same outcome, newest first:

| field | what |
|---|---|
| worker | number of the worker that judged |
| time | when the last one began, seconds of the epoch |
| count | how many there were since the worker remembers (5,000 different ones, then the oldest are forgotten) |
| direction | `inbound`: policies are about what comes to a pod |
| src_identity, src_addr | SPIFFE id (empty: plaintext) and address of the peer |
| src_workload | name of the peer's pod, as far as known |
| src_namespace | that of the identity, or of the pod that has the address |
| dst_workload, dst_namespace | the pod |
| dst_addr, dst_port | the address and port that was asked for |
| verdict | `allowed` or `denied` |
| policy, rule | "namespace/name" and the index of the rule that decided; empty and -1: none did |
| reason | the same in words |
| dry_run | what dry-run policies would have done otherwise; mostly empty |
"""

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import msgspec

from ztunnel.admin.pages import JSON, Pages, encoded_list
from ztunnel.admin.server import Answer
from ztunnel.mesh import policy as model
from ztunnel.mesh.model import packed_ip

if TYPE_CHECKING:
    from ztunnel.admin.node import Proxy

RECENT_TIMEOUT = 30.0  # seconds for a worker to answer


def policy_pages(pages: Pages, daemon: "Proxy") -> None:
    """Add the sections and the page."""
    show = _Policies(daemon)
    pages.dump.section("policies", show.policies)
    pages.dump.section("pod_policies", daemon.workers.policies.describe)
    pages.page("/debug/connections/recent", show.recent, "what policies said of connections lately (JSON)")


class _Policies:
    def __init__(self, daemon: "Proxy") -> None:
        self._daemon = daemon

    def policies(self) -> Iterator[dict[str, Any]]:
        return (_policy(one) for one in tuple(self._daemon.workers.policies.store.policies()))

    async def recent(self, method: str, query: dict[str, str]) -> Answer:
        answers = await self._daemon.workers.inspections.ask("recent", patience=RECENT_TIMEOUT)
        found = [
            {"worker": one.worker} | item
            for one in answers
            for part in one.items
            for item in part
            if "more" not in item
        ]
        found.sort(key=lambda item: -float(item["time"]))
        pieces = [msgspec.json.encode({"node": self._daemon.settings.node_name})[:-1] + b',"recent":']
        await encoded_list((self._named(one) for one in found), pieces)
        errors = {f"worker-{one.worker}": one.error for one in answers if one.error}
        pieces.append(b',"errors":' + msgspec.json.encode(errors) + b"}\n")
        return Answer(tuple(pieces), content_type=JSON)

    def _named(self, item: dict[str, Any]) -> dict[str, Any]:
        """With the name of the peer's pod, where only its address was known."""
        identity = item["src_identity"]
        item["src_namespace"] = identity.split("/")[4] if identity else ""
        if not item["src_workload"]:
            ip = packed_ip(item["src_addr"])
            workload = self._daemon.state.workload_by_address(self._daemon.settings.network, ip)
            if workload is not None:
                item["src_workload"], item["src_namespace"] = workload.name, workload.namespace
        return item


def _policy(policy: model.Authorization) -> dict[str, Any]:
    return {
        "name": policy.name,
        "namespace": policy.namespace,
        "action": policy.action.name,
        "scope": policy.scope.name,
        "dry_run": policy.dry_run,
        "rules": [
            [[_match(match) for match in clause.matches] for clause in rule.clauses] for rule in policy.rules
        ],
        "problem": policy.problem,
    }


def _match(match: model.Match) -> dict[str, list[Any]]:
    """The conditions of a match by field, each value as text (ports: numbers)."""
    shown: dict[str, list[Any]] = {}
    for name in model.Match.__struct_fields__:
        values = getattr(match, name)
        if values:
            shown[name] = [value if isinstance(value, int) else str(value) for value in values]
    return shown
