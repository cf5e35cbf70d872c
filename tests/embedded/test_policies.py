"""Policies are resolved with the rest: kept as they are, with their status, and named where they protect nobody."""

import msgspec
import pytest

from tests.embedded.test_cluster_plan import of, planned, said
from ztunnel.embedded.plan import Plan
from ztunnel.store.models import AuthorizationPolicy, Condition, PolicyStatus

RESOURCES = """
apiVersion: v1
kind: Namespace
metadata: {name: shop, labels: {istio.io/dataplane-mode: ambient}}
---
apiVersion: v1
kind: Pod
metadata: {name: web, namespace: shop, labels: {app: web}}
spec: {containers: [{name: c, command: [x]}]}
---
apiVersion: v1
kind: Pod
metadata: {name: old, namespace: shop, labels: {app: old, istio.io/dataplane-mode: none}}
spec: {containers: [{name: c, command: [x]}]}
---
"""


def with_policy(
    spec: str, kind: str = "AuthorizationPolicy", namespace: str = "shop", before: Plan | None = None
) -> Plan:
    head = f"apiVersion: security.istio.io/v1\nkind: {kind}\nmetadata: {{name: p, namespace: {namespace}}}\n"
    return planned(f"{RESOURCES}{head}spec: {spec}\n", before)


@pytest.mark.parametrize(
    ("spec", "kind", "namespace", "message"),
    [
        ("{selector: {matchLabels: {app: web}}}", "AuthorizationPolicy", "shop", ""),
        ("{selector: {matchLabels: {app: wep}}}", "AuthorizationPolicy", "shop", "selects no pod of namespace shop"),
        ("{selector: {matchLabels: {app: wep}}}", "PeerAuthentication", "shop", "selects no pod of namespace shop"),
        ("{selector: {matchLabels: {app: wep}}}", "AuthorizationPolicy", "istio-system", "no pod of any namespace"),
        ("{selector: {matchLabels: {app: web}}}", "AuthorizationPolicy", "istio-system", ""),
        ("{selector: {matchLabels: {app: web}}}", "PeerAuthentication", "istio-system", "of namespace istio-system"),
        ("{selector: {matchLabels: {app: old}}}", "AuthorizationPolicy", "shop", "for old: not in the mesh"),
        ("{}", "AuthorizationPolicy", "shop", "not enforced for old: not in the mesh"),
        ("{mtls: {mode: STRICT}}", "PeerAuthentication", "istio-system", ""),
        ("{}", "AuthorizationPolicy", "kube-system", ""),
    ],
)  # fmt: skip
def test_policies_that_protect_nobody_are_named(spec: str, kind: str, namespace: str, message: str) -> None:
    told = said(with_policy(spec, kind, namespace))
    assert len(told) == bool(message), told
    assert all(text.startswith(f"warning: {kind} {namespace}/p: ") and message in text for text in told), told


def test_the_status_that_others_wrote_stays() -> None:
    first = with_policy("{}")
    (policy,) = of(AuthorizationPolicy, first)
    assert policy.metadata.uid
    condition = Condition(type="ZtunnelAccepted", status="True")
    written = msgspec.structs.replace(policy, status=PolicyStatus(conditions=[condition]))
    before = first._replace(objects={**first.objects, policy.key: written})
    (after,) = of(AuthorizationPolicy, with_policy("{rules: [{}]}", before=before))
    assert after.status.conditions == [condition]
    assert after.spec == {"rules": [{}]}
    assert after.metadata == policy.metadata
