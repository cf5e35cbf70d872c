"""What an AuthorizationPolicy (security.istio.io) says, as far as a proxy that sees connections only can know it.

Nothing is raised, and what is wrong never opens anything. Whoever enforces what `read` returns
- leaves a rule that is not `complete` out of an ALLOW policy: it would allow more than is written;
- enforces what is left of it in a DENY policy, and if nothing is left of it denies everything;
- takes a policy that is not `sound` for an ALLOW policy without rules, or for a DENY policy that denies everything,
  in the whole namespace if the selector is not understood.
A rule is not complete if it asks for HTTP attributes, or if something in it is not understood.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, Final, NamedTuple

from ztunnel.store import specs
from ztunnel.store.faults import Fault, Path
from ztunnel.store.models import AuthorizationPolicy
from ztunnel.store.specs import Choice, Network, NotUnderstood, Reader, show

ALLOW: Final = "ALLOW"
DENY: Final = "DENY"
UNSUPPORTED_ACTIONS: Final = ("AUDIT", "CUSTOM")
DRY_RUN_ANNOTATION: Final = "istio.io/dry-run"

ACTIONS: Final = Choice((ALLOW, DENY, *UNSUPPORTED_ACTIONS))
_TARGET_KINDS = Choice(("Gateway", "GatewayClass", "Service", "ServiceEntry"))
# The fields of each part, as they are read here and as the CustomResourceDefinition tells them.
SPEC_FIELDS: Final = ("selector", "targetRef", "targetRefs", "action", "provider", "rules")
RULE_FIELDS: Final = ("from", "to", "when")
CONDITION_FIELDS: Final = ("key", "values", "notValues")
TARGET_FIELDS: Final = ("group", "kind", "name", "namespace")
_SOURCE_HTTP = ("requestPrincipals", "notRequestPrincipals", "remoteIpBlocks", "notRemoteIpBlocks")
_OPERATION_HTTP = ("hosts", "notHosts", "methods", "notMethods", "paths", "notPaths")
_HTTP_KEYS = ("remote.ip", "request.auth.principal", "request.auth.audiences", "request.auth.presenter",
              "connection.sni")  # fmt: skip
_HTTP_KEY_FAMILIES = ("request.headers", "request.auth.claims")
_EXTENSION_KEYS = "experimental.envoy.filters."
_REPLACED_KEYS = {
    "destination.labels": "select the workloads with spec.selector instead",
    "destination.name": "select the workloads with spec.selector instead",
    "destination.namespace": "put the policy into that namespace instead",
    "destination.user": "select the workloads with spec.selector instead",
}

Account = tuple[str, str]
"""Namespace and name of a service account."""


class Match(NamedTuple):
    """What a source, an operation or a condition asks of a connection. Each field that is not empty must hold: one
    of its values does (of a `not_` field: none). Texts may have a star at one end, or be one: anything but nothing.
    """

    principals: tuple[str, ...] = ()
    not_principals: tuple[str, ...] = ()
    namespaces: tuple[str, ...] = ()
    not_namespaces: tuple[str, ...] = ()
    service_accounts: tuple[Account, ...] = ()
    not_service_accounts: tuple[Account, ...] = ()
    source_ips: tuple[Network, ...] = ()
    not_source_ips: tuple[Network, ...] = ()
    destination_ips: tuple[Network, ...] = ()
    not_destination_ips: tuple[Network, ...] = ()
    destination_ports: tuple[int, ...] = ()
    not_destination_ports: tuple[int, ...] = ()


ANYTHING: Final = Match()


class Rule(NamedTuple):
    """Matches if in every clause some match does; `number` is its place in spec.rules, `http` what it asks of HTTP."""

    number: int
    clauses: tuple[tuple[Match, ...], ...]
    complete: bool
    http: tuple[str, ...] = ()


class Policy(NamedTuple):
    """`action` is ALLOW, DENY or one of UNSUPPORTED_ACTIONS; `selector` is empty for the whole namespace.

    `targets` ("Service default/reviews") are what a waypoint enforces it for; ztunnel does not enforce it then.
    """

    action: str
    selector: dict[str, str]
    targets: tuple[str, ...]
    rules: tuple[Rule, ...]
    dry_run: bool
    sound: bool
    faults: tuple[Fault, ...]

    @property
    def http(self) -> tuple[str, ...]:
        """The HTTP attributes that its rules ask for, sorted."""
        return tuple(sorted({name for rule in self.rules for name in rule.http}))


def read(obj: AuthorizationPolicy) -> Policy:
    """What the object says, and everything that is wrong with it (HTTP attributes are warnings)."""
    head = Reader()
    spec = head.mapping(obj.spec, ("spec",), SPEC_FIELDS) or {}
    action = DENY if _hides_action(obj.spec) else ALLOW
    if "action" in spec:
        # What was to be denied cannot be told from what was to be allowed: nothing passes.
        action = ACTIONS.check(head, spec["action"], ("spec", "action")) or DENY
    targets, targeted = _targets(head, spec, obj.namespace), "targetRef" in spec or "targetRefs" in spec
    selector = head.selector(spec["selector"], ("spec", "selector")) if "selector" in spec else {}
    if targeted and "selector" in spec:
        head.error(("spec", "selector"), "goes not together with targetRefs", "keep one of the two")
    _provider(head, spec, action)
    given = spec.get("rules", [])
    if not isinstance(given, list):
        head.error(
            ("spec", "rules"), f"expected a list, got {show(given)}", "give lines that begin with '- '"
        )
        given = []
    sound = not head.failed
    faults = [_told(fault, action, targeted) for fault in head.faults]
    rules = []
    for number, data in enumerate(given):
        rule, wrong = _rule(number, data, obj.namespace, action, targeted)
        rules.append(rule)
        faults += wrong
    dry_run = _dry_run(obj, action, faults)
    # Perhaps it was meant to be enforced, perhaps not: a DENY policy is, and an ALLOW policy adds nothing to others.
    sound = sound and (dry_run is not None or action != ALLOW)
    faults += _notices(action, targets, rules, given, sound)
    return Policy(action, selector or {}, targets, tuple(rules), bool(dry_run), sound, tuple(faults))


def _hides_action(spec: object) -> bool:
    """Whether an action may be in what is not understood: under another name, or deeper than it belongs."""
    if not isinstance(spec, dict):
        return True
    strange = [value for field, value in spec.items() if field not in SPEC_FIELDS]
    return any(isinstance(value, str) or (isinstance(value, dict) and "action" in value) for value in strange)


def _told(fault: Fault, action: str, targeted: bool) -> Fault:
    """A fault of the whole policy with what is done about it."""
    if targeted or action in UNSUPPORTED_ACTIONS or fault.severity == "warning":
        return fault
    effect = "the policy allows nothing" if action == ALLOW else "the policy denies everything"
    return fault._replace(remedy=f"{fault.remedy}; until then {effect}")


def _notices(
    action: str, targets: tuple[str, ...], rules: list[Rule], given: list[Any], sound: bool
) -> list[Fault]:
    """What is correct, but not or not wholly enforced by ztunnel."""
    if action in UNSUPPORTED_ACTIONS:
        message = f"ztunnel does not support the {action} action, so this policy has no effect"
        return [
            Fault(("spec", "action"), message, "do not rely on it; ALLOW and DENY are enforced", "warning")
        ]
    if targets:
        message = f"this policy is for the waypoint of {', '.join(targets)}; ztunnel does not enforce it"
        remedy = "it is in force once there is one: see `ambient waypoint status`"
        notices = [Fault(("spec", "targetRefs"), message, remedy, "warning")]
        return notices + [
            _http_notice(rule, action, "a waypoint of this version") for rule in rules if rule.http
        ]
    if action == DENY and sound and not given:
        message = "a DENY policy without rules denies nothing"
        return [Fault(("spec", "rules"), message, "add rules; the rule {} matches everything", "warning")]
    return [_http_notice(rule, action) for rule in rules if rule.http]


def _http_notice(rule: Rule, action: str, who: str = "ztunnel") -> Fault:
    message = f"{who} does not see HTTP ({', '.join(rule.http)}), so "
    if action == ALLOW:
        message += "this rule of an ALLOW policy is left out and allows nothing"
    elif all(ANYTHING in clause for clause in rule.clauses):
        message += "this rule of a DENY policy denies every connection"
    else:
        message += "this rule of a DENY policy is enforced without it and denies more than is written"
    remedy = "for rules on HTTP a policy has to target a waypoint"
    if who != "ztunnel":
        remedy = "write what connections show: principals, namespaces, addresses, ports"
    return Fault(("spec", "rules", rule.number), message, remedy, "warning")


def _dry_run(obj: AuthorizationPolicy, action: str, faults: list[Fault]) -> bool | None:
    """Whether it is a dry run; None if that is not understood."""
    value = obj.metadata.annotations.get(DRY_RUN_ANNOTATION)
    if value is None or value.lower() in ("true", "false"):
        return value is not None and value.lower() == "true"
    path = ("metadata", "annotations", DRY_RUN_ANNOTATION)
    effect = "the policy allows nothing" if action == ALLOW else "it is enforced"
    faults.append(
        Fault(path, f"{show(value)} is not possible", f'use "true" or "false"; until then {effect}')
    )
    return None


def _provider(reader: Reader, spec: dict[str, Any], action: str) -> None:
    if action == "CUSTOM" and "provider" not in spec:
        reader.error(("spec", "provider"), "is missing", "name the provider of the CUSTOM action")
    elif action != "CUSTOM" and "provider" in spec:
        reader.error(
            ("spec", "provider"), f"goes not together with action {action}", "remove it, or use CUSTOM"
        )


def _targets(reader: Reader, spec: dict[str, Any], namespace: str) -> tuple[str, ...]:
    if "targetRef" in spec and "targetRefs" in spec:
        reader.error(("spec", "targetRef"), "goes not together with targetRefs", "keep targetRefs")
    found = []
    if "targetRef" in spec:
        found.append(_target(reader, spec["targetRef"], ("spec", "targetRef"), namespace))
    if "targetRefs" in spec:
        for index, data in enumerate(reader.items(spec["targetRefs"], ("spec", "targetRefs")) or ()):
            found.append(_target(reader, data, ("spec", "targetRefs", index), namespace))
    return tuple(found)


def _target(reader: Reader, data: object, path: Path, namespace: str) -> str:
    fields = reader.mapping(data, path, TARGET_FIELDS)
    if fields is None:
        return "something unknown"
    kind = _TARGET_KINDS.check(reader, fields.get("kind"), (*path, "kind")) or "something"
    if not isinstance(fields.get("name"), str) or not fields["name"]:
        reader.error((*path, "name"), "is missing", "give the name of what the policy is for")
    space = fields.get("namespace", namespace)
    if space != namespace:
        reader.error((*path, "namespace"), f"{show(space)} is not the policy's own", "remove it")
    return f"{kind} {fields.get('name', '')}"


def _rule(number: int, data: object, namespace: str, action: str, targeted: bool) -> tuple[Rule, list[Fault]]:
    effects = {ALLOW: "until then this rule allows nothing", DENY: "until then this rule denies more"}
    reader = Reader("" if targeted else effects.get(action, ""))
    path: Path = ("spec", "rules", number)
    http: dict[str, None] = {}
    clauses: list[tuple[Match, ...]] = []
    fields = reader.mapping(data, path, RULE_FIELDS) or {}
    for part, inner, read_match in (("from", "source", _source), ("to", "operation", _operation)):
        if part in fields:
            clause = []
            for index, item in enumerate(reader.items(fields[part], (*path, part)) or ()):
                where = (*path, part, index)
                outer = reader.mapping(item, where, (inner,))
                if outer is not None and inner not in outer:
                    reader.error((*where, inner), "is missing", "say what it is that matches")
                elif outer is not None:
                    clause.append(read_match(reader, outer[inner], (*where, inner), namespace, http))
                    continue
                clause.append(ANYTHING)
            clauses.append(tuple(clause) or (ANYTHING,))
    if "when" in fields:
        for index, item in enumerate(reader.items(fields["when"], (*path, "when")) or ()):
            clauses += _condition(reader, item, (*path, "when", index), namespace, http)
    return Rule(number, tuple(clauses), not reader.failed and not http, tuple(http)), reader.faults


def _principal(value: str) -> str:
    if "://" in value:
        raise NotUnderstood(
            f"{show(value)} has a scheme",
            "write TRUST_DOMAIN/ns/NAMESPACE/sa/SERVICE_ACCOUNT without spiffe://",
        )
    return specs.pattern(value)


def _account(namespace: str, value: str) -> Account:
    """SERVICE_ACCOUNT (of this namespace) or NAMESPACE/SERVICE_ACCOUNT; there are no wildcards in them."""
    parts = value.split("/")
    if len(parts) > 2 or not all(parts) or "*" in value:
        raise NotUnderstood(
            f"{show(value)} is not a service account", "write SERVICE_ACCOUNT or NAMESPACE/SERVICE_ACCOUNT"
        )
    return (parts[0], parts[1]) if len(parts) == 2 else (namespace, parts[0])


class _Field(NamedTuple):
    """A field of Match, and how a value of it is read."""

    name: str
    understand: Callable[[str], Any]

    def understood_in(self, namespace: str) -> Callable[[str], Any]:
        """How a value is read in a policy of this namespace."""
        return partial(_account, namespace) if self.name.endswith("service_accounts") else self.understand


def _with_negated(fields: dict[str, _Field]) -> dict[str, _Field]:
    """The fields, each also in its "not" form."""
    negated = {
        f"not{word[0].upper()}{word[1:]}": field._replace(name=f"not_{field.name}")
        for word, field in fields.items()
    }
    return {**fields, **negated}


_CONDITIONS: Final = {
    "source.ip": _Field("source_ips", specs.network),
    "source.namespace": _Field("namespaces", specs.pattern),
    "source.principal": _Field("principals", _principal),
    "source.serviceAccount": _Field("service_accounts", str),
    "destination.ip": _Field("destination_ips", specs.network),
    "destination.port": _Field("destination_ports", specs.port),
}
_SOURCE: Final = _with_negated(
    {
        "principals": _CONDITIONS["source.principal"],
        "namespaces": _CONDITIONS["source.namespace"],
        "serviceAccounts": _CONDITIONS["source.serviceAccount"],
        "ipBlocks": _CONDITIONS["source.ip"],
    }
)
_OPERATION: Final = _with_negated({"ports": _CONDITIONS["destination.port"]})
SOURCE_FIELDS: Final = (*_SOURCE, *_SOURCE_HTTP)
OPERATION_FIELDS: Final = (*_OPERATION, *_OPERATION_HTTP)


def _source(reader: Reader, data: object, path: Path, namespace: str, http: dict[str, None]) -> Match:
    match = _match(reader, data, path, _SOURCE, _SOURCE_HTTP, namespace, http)
    if isinstance(data, dict):
        accounts = [name for name in data if name in ("serviceAccounts", "notServiceAccounts")]
        others = [
            name for name in data if name in ("principals", "notPrincipals", "namespaces", "notNamespaces")
        ]
        if accounts and others:
            message = f"goes not together with {', '.join(others)} in one source"
            reader.error((*path, accounts[0]), message, "use either of them")
            return match._replace(service_accounts=(), not_service_accounts=())
    return match


def _operation(reader: Reader, data: object, path: Path, namespace: str, http: dict[str, None]) -> Match:
    return _match(reader, data, path, _OPERATION, _OPERATION_HTTP, namespace, http)


def _match(
    reader: Reader,
    data: object,
    path: Path,
    known: dict[str, _Field],
    http_fields: tuple[str, ...],
    namespace: str,
    http: dict[str, None],
) -> Match:
    """A mapping of fields to lists; those of HTTP are only named in `http`."""
    fields = reader.mapping(data, path, (*known, *http_fields))
    if fields is None:
        return ANYTHING
    if not fields:
        reader.error(path, "is empty", f"give at least one of {', '.join(known)}")
    found: dict[str, tuple[Any, ...]] = {}
    for name, value in fields.items():
        field = known.get(name)
        if field is not None:
            found[field.name] = reader.values(value, (*path, name), field.understood_in(namespace))
        elif name in http_fields:
            understand: Callable[[str], Any] = specs.network if name.endswith("IpBlocks") else str
            reader.values(value, (*path, name), understand)
            http[name] = None
    return Match(**found)


def _condition(
    reader: Reader, data: object, path: Path, namespace: str, http: dict[str, None]
) -> list[tuple[Match, ...]]:
    """The clauses of a condition: one for its values, one for its notValues."""
    fields = reader.mapping(data, path, CONDITION_FIELDS)
    if fields is None:
        return []
    key = fields.get("key")
    field = _CONDITIONS.get(key) if isinstance(key, str) else None
    understand: Callable[[str], Any] = specs.network if key == "remote.ip" else str
    if field is not None:
        understand = field.understood_in(namespace)
    elif isinstance(key, str) and _is_http_key(key):
        http[key] = None
    else:
        _unknown_key(reader, key, (*path, "key"))
    if "values" not in fields and "notValues" not in fields:
        reader.error(path, "has neither values nor notValues", "give at least one of them")
    clauses: list[tuple[Match, ...]] = []
    for name, prefix in (("values", ""), ("notValues", "not_")):
        if name in fields:
            values: tuple[Any, ...] = reader.values(fields[name], (*path, name), understand)
            clauses.append((Match(**{prefix + field.name: values}) if field is not None else ANYTHING,))
    return clauses


def _is_http_key(key: str) -> bool:
    if key in _HTTP_KEYS or key.startswith(_EXTENSION_KEYS):
        return True
    family, bracket, rest = key.partition("[")
    return family in _HTTP_KEY_FAMILIES and bool(bracket) and rest.endswith("]") and len(rest) > 1


def _unknown_key(reader: Reader, key: object, path: Path) -> None:
    if key is None:
        reader.error(path, "is missing", f"give one of {', '.join(_CONDITIONS)}")
        return
    remedy = _REPLACED_KEYS.get(str(key).partition("[")[0])
    reader.error(path, f"{show(key)} is not known", remedy or f"give one of {', '.join(_CONDITIONS)}")
