"""From the xDS type istio.security.Authorization to the model's policies.

Rule: what is not understood keeps closed. Nothing that is wrong with a policy raises: the policy comes back as the
strictest thing that it can have meant, and `problem` says what is wrong with which field, for the NACK and operators:

- A match with a value that is none (no CIDR, no port, no kind of comparison), or with a field or extension that this
  proxy does not know, has no conditions left: it never matches in an ALLOW policy and always in a DENY policy.
- Where a rule or clause has unknown fields that is so for the rule: none in an ALLOW policy, of a DENY policy one
  that matches whatever there is.
- A policy whose action, scope, name or whole message is not understood, or that has unknown fields or extensions,
  denies everything in its scope, unless it is known to be an ALLOW policy: then it allows nothing. A scope that is
  unknown is that of the namespace in the resource's name; of the root namespace it is the whole mesh.

The old version of the policy is not kept, unlike that of an address: it may allow what the new one forbids.
"""

from collections.abc import Callable, Iterable
from typing import Final, TypeVar

from google.protobuf.message import DecodeError as ProtobufError
from google.protobuf.message import Message
from google.protobuf.unknown_fields import UnknownFieldSet

from ztunnel.mesh import policy as model
from ztunnel.wire import authorization_pb2, xds_pb2

AUTHORIZATION_TYPE: Final = "type.googleapis.com/istio.security.Authorization"
ROOT_NAMESPACE: Final = "istio-system"

T = TypeVar("T")
V = TypeVar("V")

_ACTIONS: Final = {int(member): member for member in model.Action}
_SCOPES: Final = {int(member): member for member in model.PolicyScope}
_EVERYTHING: Final = (model.Rule(),)


class _FieldError(Exception):
    """What is wrong with a field, named from the policy down."""


def decode_authorization(
    resource: xds_pb2.Resource, root_namespace: str = ROOT_NAMESPACE
) -> model.Authorization:
    """The policy in a resource of AUTHORIZATION_TYPE, whose key is the resource's name; see the rule above."""
    return _Decoding(resource.name, root_namespace).policy(resource)


class _Decoding:
    """One policy, and what is wrong with it."""

    def __init__(self, key: str, root_namespace: str) -> None:
        self._namespace, _, self._name = key.partition("/")
        self._key = key
        self._widest = (
            model.PolicyScope.GLOBAL
            if self._namespace in ("", root_namespace)
            else model.PolicyScope.NAMESPACE
        )
        self._problems: list[str] = []

    def policy(self, resource: xds_pb2.Resource) -> model.Authorization:
        body = resource.resource
        if body.type_url != AUTHORIZATION_TYPE:
            return self._closed(f"is of type {body.type_url!r}: expected {AUTHORIZATION_TYPE}")
        try:
            message = authorization_pb2.Authorization.FromString(body.value)
        except ProtobufError:
            return self._closed("is no istio.security.Authorization: its bytes don't parse")
        action, scope = _ACTIONS.get(message.action), _SCOPES.get(message.scope)
        if action is None:
            return self._closed(
                f"action: value {message.action} is unknown here: a newer proxy may know it", scope=scope
            )
        if scope is None:
            return self._closed(
                f"scope: value {message.scope} is unknown here: a newer proxy may know it", action
            )
        own = f"{message.namespace}/{message.name}"
        if own != self._key:
            return self._closed(f"namespace and name: say {own!r}, which must be the resource's name", action)
        try:
            _known("", message)
        except _FieldError as error:
            return self._closed(str(error), action, scope, message.dry_run)
        return model.Authorization(
            name=message.name,
            namespace=message.namespace,
            scope=scope,
            action=action,
            rules=tuple(self._rules(message.rules, action)),
            dry_run=message.dry_run,
            problem=self._problem(),
        )

    def _problem(self) -> str:
        if not self._problems:
            return ""
        more = f" (and {len(self._problems) - 1} more)" if len(self._problems) > 1 else ""
        return f"AuthorizationPolicy {self._key}: {self._problems[0]}{more}"

    def _closed(
        self,
        problem: str,
        action: model.Action | None = None,
        scope: model.PolicyScope | None = None,
        dry_run: bool = False,
    ) -> model.Authorization:
        """The strictest policy of this name; None: not known."""
        self._problems.append(problem)
        return model.Authorization(
            name=self._name,
            namespace=self._namespace,
            scope=self._widest if scope is None else scope,
            action=model.Action.DENY if action is None else action,
            rules=() if action is model.Action.ALLOW else _EVERYTHING,
            dry_run=dry_run,
            problem=self._problem(),
        )

    def _rules(
        self, messages: Iterable[authorization_pb2.Rule], action: model.Action
    ) -> Iterable[model.Rule]:
        for index, message in enumerate(messages):
            where = f"rules[{index}]"
            try:
                _known(where, message)
                for number, clause in enumerate(message.clauses):
                    _known(f"{where}.clauses[{number}]", clause)
            except _FieldError as error:
                self._problems.append(str(error))
                yield model.Rule((model.Clause((model.NO_CONDITION,)),))
            else:
                yield model.Rule(
                    tuple(
                        model.Clause(
                            tuple(
                                self._match(f"{where}.clauses[{number}].matches[{position}]", one)
                                for position, one in enumerate(clause.matches)
                            )
                        )
                        for number, clause in enumerate(message.clauses)
                    )
                )

    def _match(self, where: str, message: authorization_pb2.Match) -> model.Match:
        try:
            _known(where, message)
            return model.Match(
                namespaces=_each(where, "namespaces", message.namespaces, _string),
                not_namespaces=_each(where, "not_namespaces", message.not_namespaces, _string),
                service_accounts=_each(where, "service_accounts", message.service_accounts, _account),
                not_service_accounts=_each(
                    where, "not_service_accounts", message.not_service_accounts, _account
                ),
                principals=_each(where, "principals", message.principals, _string),
                not_principals=_each(where, "not_principals", message.not_principals, _string),
                source_ips=_each(where, "source_ips", message.source_ips, _cidr),
                not_source_ips=_each(where, "not_source_ips", message.not_source_ips, _cidr),
                destination_ips=_each(where, "destination_ips", message.destination_ips, _cidr),
                not_destination_ips=_each(where, "not_destination_ips", message.not_destination_ips, _cidr),
                destination_ports=_each(where, "destination_ports", message.destination_ports, _port),
                not_destination_ports=_each(
                    where, "not_destination_ports", message.not_destination_ports, _port
                ),
            )
        except _FieldError as error:
            self._problems.append(str(error))
            return model.NO_CONDITION


def _each(where: str, field: str, values: Iterable[V], convert: Callable[[V], T]) -> tuple[T, ...]:
    converted = []
    for index, value in enumerate(values):
        try:
            converted.append(convert(value))
        except ValueError as error:
            raise _FieldError(f"{where}.{field}[{index}]: {error}") from None
    return tuple(converted)


def _string(message: authorization_pb2.StringMatch) -> model.StringMatch:
    match message.WhichOneof("match_type"):
        case "exact":
            return model.StringMatch(model.MatchKind.EXACT, message.exact)
        case "prefix":
            return model.StringMatch(model.MatchKind.PREFIX, message.prefix)
        case "suffix":
            return model.StringMatch(model.MatchKind.SUFFIX, message.suffix)
        case "presence":
            return model.StringMatch(model.MatchKind.PRESENCE)
        case _:
            raise ValueError("has none of exact, prefix, suffix and presence that this proxy knows")


def _account(message: authorization_pb2.ServiceAccountMatch) -> model.ServiceAccount:
    if not message.namespace or not message.serviceAccount:
        raise ValueError("namespace and serviceAccount are both needed")
    return model.ServiceAccount(message.namespace, message.serviceAccount)


def _cidr(message: authorization_pb2.Address) -> model.Cidr:
    return model.Cidr.of(message.address, message.length)


def _port(number: int) -> int:
    if not 0 < number < 65536:
        raise ValueError(f"{number} is no port: they are 1 to 65535")
    return number


def _known(where: str, message: Message) -> None:
    """Raise _FieldError if the message says something that this proxy does not know."""
    prefix = f"{where}." if where else ""
    unknown = UnknownFieldSet(message)
    if len(unknown):
        raise _FieldError(
            f"{prefix}field {unknown[0].field_number}: is unknown here: a newer proxy may know it"
        )
    extensions = getattr(message, "extensions", ())
    if extensions:
        raise _FieldError(f"{prefix}extensions[0]: {extensions[0].name!r} is unknown here")
