"""What the API server is answered when it asks whether an object may be written."""

import json
from typing import Any

import pytest

from ztunnel.controlplane.webhook import MalformedError, Webhook

METADATA = {
    "name": "x",
    "namespace": "shop",
    "uid": "1",
    "generation": 2,
    "creationTimestamp": "2026-01-01T00:00:00Z",
    "managedFields": [{"manager": "kubectl", "operation": "Update", "fieldsV1": {"f:spec": {}}}],
}
WRONG = {"rules": [{"from": [{"source": {"principals": ["*a*"]}}]}]}


def policy(spec: dict[str, Any], kind: str = "AuthorizationPolicy", **metadata: Any) -> dict[str, Any]:
    version = "telemetry.istio.io/v1" if kind == "Telemetry" else "security.istio.io/v1"
    return {"apiVersion": version, "kind": kind, "metadata": {**METADATA, **metadata}, "spec": spec}


def review(obj: object, operation: str = "CREATE", old: object = None) -> bytes:
    kind = obj.get("kind", "") if isinstance(obj, dict) else ""
    request = {
        "uid": "of the request",
        "kind": {"group": "security.istio.io", "version": "v1", "kind": kind},
        "name": "x",
        "namespace": "shop",
        "operation": operation,
        "object": obj,
        "oldObject": old,
        "dryRun": True,
    }
    return json.dumps(
        {"apiVersion": "admission.k8s.io/v1", "kind": "AdmissionReview", "request": request}
    ).encode()


def answer(webhook: Webhook, body: bytes) -> dict[str, Any]:
    whole = json.loads(webhook.answer(body))
    assert (whole["apiVersion"], whole["kind"]) == ("admission.k8s.io/v1", "AdmissionReview")
    response: dict[str, Any] = whole["response"]
    assert response.pop("uid") == "of the request"
    return response


def test_what_is_right_passes() -> None:
    webhook = Webhook()
    body = review(policy({"action": "DENY", "rules": [{"from": [{"source": {"namespaces": ["a"]}}]}]}))
    assert answer(webhook, body) == {"allowed": True}
    assert webhook.counts == {("security.istio.io", "v1", "AuthorizationPolicy", "passed"): 1}


def test_what_is_wrong_is_refused_with_field_and_remedy() -> None:
    webhook = Webhook()
    response = answer(webhook, review(policy({"mtls": {"mode": "STRIKT"}}, "PeerAuthentication")))
    assert response["allowed"] is False
    status = response["status"]
    assert (status["code"], status["reason"]) == (422, "Invalid")
    assert status["message"] == (
        'PeerAuthentication shop/x: spec.mtls.mode: "STRIKT" is not possible; use one of UNSET, DISABLE, PERMISSIVE,'
        " STRICT"
    )
    assert [one["field"] for one in status["details"]["causes"]] == ["spec.mtls.mode"]
    assert webhook.counts == {("security.istio.io", "v1", "PeerAuthentication", "failed"): 1}


def test_an_object_that_says_no_namespace_is_of_the_requests() -> None:
    obj = policy(WRONG)
    del obj["metadata"]["namespace"]
    assert "AuthorizationPolicy shop/x" in answer(Webhook(), review(obj))["status"]["message"]


def test_what_is_not_acted_on_passes_with_a_warning() -> None:
    for obj, words in (
        (policy({}, "Telemetry"), "is not acted on by this version"),
        ({**policy({}), "apiVersion": "security.istio.io/v9"}, "is not known to this version"),
        (policy({}, "Unheard"), "is not known to this version"),
    ):
        response = answer(Webhook(), review(obj))
        assert response["allowed"] is True
        assert words in response["warnings"][0]


def test_faults_that_were_there_before_do_not_hold_up_other_changes() -> None:
    old = policy(WRONG)
    response = answer(Webhook(), review(policy(WRONG, labels={"a": "b"}), "UPDATE", old))
    assert response["allowed"] is True
    assert "principals[0]" in response["warnings"][0]
    # On its way out it only gives up finalizers.
    leaving = policy({"rules": []} | WRONG, deletionTimestamp="2026-01-02T00:00:00Z")
    assert answer(Webhook(), review(leaving, "UPDATE", policy({})))["allowed"] is True
    # New faults are refused.
    assert answer(Webhook(), review(policy(WRONG), "UPDATE", policy({})))["allowed"] is False


def test_removing_is_nobodys_business() -> None:
    assert answer(Webhook(), review(None, "DELETE", policy(WRONG))) == {"allowed": True}


def test_an_object_of_a_megabyte() -> None:
    rules = [{"from": [{"source": {"principals": [f"cluster.local/ns/x/sa/y{n}"]}}]} for n in range(14000)]
    assert answer(Webhook(), review(policy({"rules": rules}))) == {"allowed": True}
    rules = [{"from": [{"source": {"principals": ["*a*"]}}]} for _ in range(14000)]
    response = answer(Webhook(), review(policy({"rules": rules})))
    assert response["allowed"] is False
    assert len(response["status"]["message"]) <= 4096
    assert "and 13990 more" in response["status"]["message"]
    assert len(response["status"]["details"]["causes"]) == 10


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"nonsense",
        b"[]",
        b"null",
        b"{}",
        b'{"kind": "AdmissionReview", "apiVersion": "admission.k8s.io/v1"}',
        b'{"kind": "AdmissionReview", "apiVersion": "admission.k8s.io/v1", "request": {"uid": 7}}',
        b'{"kind": "Pod", "apiVersion": "v1", "request": {"uid": "u"}}',
        b'{"kind": "AdmissionReview", "apiVersion": "other/v1", "request": {"uid": "u"}}',
        b"[" * 100_000,
        review("text"),
        review([1]),
    ],
)
def test_reviews_that_are_none(body: bytes) -> None:
    webhook = Webhook()
    with pytest.raises(MalformedError):
        webhook.answer(body)
    assert webhook.malformed == 1


@pytest.mark.parametrize(
    "obj", [{}, {"kind": 7}, {"apiVersion": "security.istio.io/v1", "kind": "PeerAuthentication"}]
)
def test_objects_that_are_none(obj: dict[str, Any]) -> None:
    assert answer(Webhook(), review(obj))["allowed"] is False
