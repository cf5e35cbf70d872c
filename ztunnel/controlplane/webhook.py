"""Whether an object may be written: what the API server asks (AdmissionReview, admission.k8s.io/v1). Pure functions.

The object is read by the same models that read it when it is acted on, so what passes here is understood there.
"""

import time
from collections import Counter
from typing import Any, Final

import msgspec

from ztunnel.store.decode import Decoded, decode
from ztunnel.store.faults import Fault, path_text
from ztunnel.store.kinds import foreign_kind, typed_kind

LARGEST: Final = (
    8 * 1024 * 1024
)  # bytes of a review: an object of 1.5 MB (etcd's limit), its predecessor, and the rest
TOLD: Final = 10  # faults in one message
_MESSAGE: Final = 4096  # characters
_WARNING: Final = 256  # characters: the API server cuts longer ones off
_UNPROCESSABLE: Final = 422


class MalformedError(ValueError):
    """What was sent is no review that can be answered."""


class Webhook:
    """Answers reviews, and counts them by (group, version, kind, "passed" or "failed")."""

    def __init__(self) -> None:
        self.counts: Counter[tuple[str, str, str, str]] = Counter()
        self.malformed = 0
        self.seconds = 0.0

    def answer(self, body: bytes) -> bytes:
        """The answer to a review. Raises MalformedError."""
        began = time.perf_counter()
        try:
            review = msgspec.json.decode(body)
            request = review["request"]
            uid = request["uid"]
            if review.get("kind") != "AdmissionReview" or not isinstance(uid, str) or not uid:
                raise MalformedError("not an AdmissionReview with a request.uid")
            if not str(review.get("apiVersion", "")).startswith("admission.k8s.io/"):
                raise MalformedError(f"apiVersion {review.get('apiVersion')!r}: expected admission.k8s.io/v1")
            response = self._respond(request)
        except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
            self.malformed += 1
            raise MalformedError(f"not JSON: {error}") from None
        except (KeyError, TypeError, AttributeError):
            self.malformed += 1
            raise MalformedError("not an AdmissionReview with a request") from None
        except MalformedError:
            self.malformed += 1
            raise
        finally:
            self.seconds += time.perf_counter() - began
        return msgspec.json.encode(
            {
                "apiVersion": "admission.k8s.io/v1",
                "kind": "AdmissionReview",
                "response": {"uid": uid, **response},
            }
        )

    def _respond(self, request: dict[str, Any]) -> dict[str, Any]:
        obj = request.get("object")
        if request.get("operation") not in ("CREATE", "UPDATE") or obj is None:
            return {"allowed": True}
        obj = _with_place(obj, request)
        if unknown := _unknown(obj):
            return {"allowed": True, "warnings": [unknown[:_WARNING]]}
        found = decode(obj)
        errors = [fault for fault in found.faults if fault.severity == "error"]
        warnings = [fault for fault in found.faults if fault.severity != "error"]
        if errors and _may_stay(obj, request.get("oldObject")):
            errors, warnings = [], [*errors, *warnings]
        kind = request.get("kind") or {}
        group, version, name = (str(kind.get(part, "")) for part in ("group", "version", "kind"))
        self.counts[group, version, name, "failed" if errors else "passed"] += 1
        response: dict[str, Any] = {"allowed": not errors}
        if errors:
            response["status"] = _status(_named(found, request), errors, kind, request)
        if warnings:
            name = _named(found, request)
            response["warnings"] = [_told(name, fault)[:_WARNING] for fault in warnings[:TOLD]]
        return response


def _with_place(obj: Any, request: dict[str, Any]) -> dict[str, Any]:
    """The object with the namespace that it is written to."""
    if not isinstance(obj, dict):
        raise MalformedError("request.object is no object")
    metadata = obj.get("metadata")
    if isinstance(metadata, dict) and not metadata.get("namespace") and request.get("namespace"):
        return {**obj, "metadata": {**metadata, "namespace": request["namespace"]}}
    return obj


def _unknown(obj: dict[str, Any]) -> str:
    """What to say of a kind that is not ours to judge, because this version does not know it; "" for others."""
    version, kind = obj.get("apiVersion"), obj.get("kind")
    if not isinstance(version, str) or not isinstance(kind, str):
        return ""
    if typed_kind(version, kind) is not None or foreign_kind(version, kind) is not None:
        return ""
    return f"{kind} of {version} is not known to this version of the mesh, which does not act on it"


def _may_stay(obj: dict[str, Any], old: Any) -> bool:
    """Whether faults are no news: the object was so before, or is on its way out and only gives up finalizers."""
    if not isinstance(old, dict):
        return False
    if (obj.get("metadata") or {}).get("deletionTimestamp"):
        return True
    beside = ("metadata", "status")
    return {name: value for name, value in obj.items() if name not in beside} == {
        name: value for name, value in old.items() if name not in beside
    }


def _named(found: Decoded, request: dict[str, Any]) -> str:
    kind = str((request.get("kind") or {}).get("kind") or "object")
    if found.key is not None:
        return str(found.key)
    return f"{kind} {request.get('namespace') or ''}/{request.get('name') or ''}".strip("/ ")


def _told(name: str, fault: Fault) -> str:
    remedy = fault.remedy.partition("; until then")[0]  # that is for an object which is there already
    return f"{name}: {fault}; {remedy}" if remedy else f"{name}: {fault}"


def _status(name: str, errors: list[Fault], kind: dict[str, Any], request: dict[str, Any]) -> dict[str, Any]:
    told = [_told(name, fault) for fault in errors[:TOLD]]
    if len(errors) > TOLD:
        told.append(f"and {len(errors) - TOLD} more")
    return {
        "status": "Failure",
        "code": _UNPROCESSABLE,
        "reason": "Invalid",
        "message": "\n".join(told)[:_MESSAGE],
        "details": {
            "group": str(kind.get("group", "")),
            "kind": str(kind.get("kind", "")),
            "name": str(request.get("name") or ""),
            "causes": [
                {
                    "reason": "FieldValueInvalid",
                    "field": path_text(fault.path),
                    "message": _told("", fault)[2:],
                }
                for fault in errors[:TOLD]
            ],
        },
    }
