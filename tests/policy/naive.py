"""A second evaluator: what the words of the policies mean, taken directly from their data, as slowly as it pleases.

It knows nothing of clauses, translation or messages, only valid policies, and follows Istio's reference:
"Authorization Policy" and "PeerAuthentication", with what ztunnel cannot see taken for the stricter outcome.
"""

import ipaddress
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

Spec = Mapping[str, Any]
ROOT = "istio-system"


class Caller(NamedTuple):
    """`account` is "namespace/name" of cluster.local, "" without identity."""

    account: str
    ip: str


class Target(NamedTuple):
    namespace: str
    labels: Mapping[str, str]
    ip: str
    port: int


class Written(NamedTuple):
    """One object: its kind, namespace and spec, when it was made (a number for each), whether it is a dry run."""

    kind: str
    namespace: str
    name: str
    spec: Spec
    made: int = 0
    dry_run: bool = False


HTTP = {
    "requestPrincipals", "remoteIpBlocks", "hosts", "methods", "paths", "notRequestPrincipals", "notRemoteIpBlocks",
    "notHosts", "notMethods", "notPaths", "request.headers[x]", "remote.ip", "connection.sni",
}  # fmt: skip


def passes(objects: Sequence[Written], caller: Caller, target: Target) -> bool:
    """Whether the connection is let through."""
    if not caller.account and not plaintext_taken(objects, target):
        return False
    mine = [
        each for each in objects
        if each.kind == "AuthorizationPolicy" and concerns(each, target) and not each.dry_run
        and "targetRefs" not in each.spec
    ]  # fmt: skip
    for each in mine:
        if each.spec.get("action") == "DENY" and any(
            rule_matches(rule, caller, target, each.namespace, unknown=True)
            for rule in each.spec.get("rules", [])
        ):
            return False
    allowing = [each for each in mine if each.spec.get("action", "ALLOW") == "ALLOW"]
    if not allowing:
        return True
    return any(
        rule_matches(rule, caller, target, each.namespace, unknown=False)
        for each in allowing
        for rule in each.spec.get("rules", [])
    )


def concerns(each: Written, target: Target) -> bool:
    if each.namespace not in (ROOT, target.namespace):
        return False
    wanted = each.spec.get("selector", {}).get("matchLabels", {})
    return all(target.labels.get(key) == value for key, value in wanted.items())


def rule_matches(rule: Spec, caller: Caller, target: Target, home: str, *, unknown: bool) -> bool:
    """`unknown` is what a match of an attribute is that a proxy of connections cannot see.

    For ALLOW a rule with any such attribute as a whole is out of the question; for DENY it is taken to hold.
    """
    if not unknown and (words(rule) & HTTP):
        return False
    if "from" in rule and not any(fields_match(s["source"], caller, target, home) for s in rule["from"]):
        return False
    if "to" in rule and not any(fields_match(o["operation"], caller, target, home) for o in rule["to"]):
        return False
    return all(condition_matches(condition, caller, target, home) for condition in rule.get("when", []))


def words(value: Any) -> set[str]:
    """Every key, and every text that a `key` has."""
    if isinstance(value, Mapping):
        own = set(value) | ({value["key"]} if "key" in value else set())
        return own.union(*map(words, value.values()))
    return set[str]().union(*map(words, value)) if isinstance(value, list) else set()


def fields_match(fields: Spec, caller: Caller, target: Target, home: str) -> bool:
    for name, values in fields.items():
        if name in HTTP:
            continue
        positive = not name.startswith("not")
        plain = name if positive else name[3].lower() + name[4:]
        matches = TESTS[plain]
        if any(matches(value, caller, target, home) for value in values) is not positive:
            return False
    return True


def condition_matches(condition: Spec, caller: Caller, target: Target, home: str) -> bool:
    if condition["key"] in HTTP:
        return True
    matches = TESTS[condition["key"]]
    wanted, unwanted = condition.get("values"), condition.get("notValues")
    if wanted is not None and not any(matches(value, caller, target, home) for value in wanted):
        return False
    return unwanted is None or not any(matches(value, caller, target, home) for value in unwanted)


def text_matches(pattern: str, text: str) -> bool:
    if not text:
        return False
    if pattern == "*":
        return True
    if pattern.startswith("*"):
        return text.endswith(pattern[1:])
    return text.startswith(pattern[:-1]) if pattern.endswith("*") else text == pattern


def principal(value: str, caller: Caller, _target: Target, _home: str) -> bool:
    namespace, _, name = caller.account.partition("/")
    return text_matches(value, f"cluster.local/ns/{namespace}/sa/{name}" if caller.account else "")


def namespace(value: str, caller: Caller, _target: Target, _home: str) -> bool:
    return text_matches(value, caller.account.partition("/")[0])


def service_account(value: str, caller: Caller, _target: Target, home: str) -> bool:
    return caller.account == (value if "/" in value else f"{home}/{value}")


def within(block: str, address: str) -> bool:
    return ipaddress.ip_address(address) in ipaddress.ip_network(block, strict=False)


TESTS: dict[str, Callable[[str, Caller, Target, str], bool]] = {
    "principals": principal,
    "source.principal": principal,
    "namespaces": namespace,
    "source.namespace": namespace,
    "serviceAccounts": service_account,
    "source.serviceAccount": service_account,
    "ipBlocks": lambda value, caller, target, home: within(value, caller.ip),
    "source.ip": lambda value, caller, target, home: within(value, caller.ip),
    "destination.ip": lambda value, caller, target, home: within(value, target.ip),
    "ports": lambda value, caller, target, home: int(value) == target.port,
    "destination.port": lambda value, caller, target, home: int(value) == target.port,
}


def plaintext_taken(objects: Sequence[Written], target: Target) -> bool:
    """By the oldest PeerAuthentication of the narrowest kind that says something."""
    peers = sorted(
        (each for each in objects if each.kind == "PeerAuthentication"), key=lambda e: (e.made, e.name)
    )

    def oldest(wanted: Callable[[Written], bool]) -> Written | None:
        return next((each for each in peers if wanted(each)), None)

    mesh = oldest(lambda e: e.namespace == ROOT and "selector" not in e.spec)
    space = oldest(lambda e: e.namespace == target.namespace and "selector" not in e.spec)
    workload = oldest(
        lambda e: e.namespace == target.namespace and "selector" in e.spec and concerns(e, target)
    )
    said = [mode_of(each.spec.get("mtls")) for each in (workload, space, mesh) if each is not None]
    if workload is not None:
        said.insert(0, mode_of(workload.spec.get("portLevelMtls", {}).get(target.port)))
    return next((mode for mode in said if mode != "UNSET"), "PERMISSIVE") != "STRICT"


def mode_of(mtls: Any) -> str:
    return str((mtls or {}).get("mode", "UNSET"))
