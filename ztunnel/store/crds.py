"""The CustomResourceDefinitions of the kinds that the mesh reads, made of the tables that it reads them with.

`python -m ztunnel.store.crds` writes them into manifests/. Where the API server knows a field, it refuses a value of
another type when it is written. A field that it does not know it keeps: to drop a misspelt one silently, as it does by
itself, could open what a policy closes; the mesh reports it and is strict until it is repaired.
"""

import sys
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from msgspec import inspect

from ztunnel.store import authorization, peerauth
from ztunnel.store.kinds import FOREIGN, KINDS
from ztunnel.store.models import AuthorizationPolicy, Object, PeerAuthentication, PolicyStatus, group_of

PART_OF = {"app.kubernetes.io/part-of": "ambient-mesh", "operator.istio.io/component": "Base"}
_APPROVAL = "unapproved, a minimal form for clusters without the Gateway API"

Schema = dict[str, Any]
_OPEN: Schema = {"x-kubernetes-preserve-unknown-fields": True}
_AGE = {
    "name": "Age",
    "type": "date",
    "jsonPath": ".metadata.creationTimestamp",
    "description": "How long it has been there.",
}


class Column(NamedTuple):
    """A column of `kubectl get`."""

    name: str
    path: str
    description: str


class Definition(NamedTuple):
    """A kind as a CustomResourceDefinition: what is stored is the first of `versions`; all are served."""

    group: str
    versions: tuple[str, ...]
    kind: str
    plural: str
    short: tuple[str, ...]
    columns: tuple[Column, ...]
    spec: Schema
    status: Schema
    description: str
    namespaced: bool = True
    annotations: Mapping[str, str] = {}

    @property
    def name(self) -> str:
        return f"{self.plural}.{self.group}"

    def object(self) -> dict[str, Any]:
        """The CustomResourceDefinition (apiextensions.k8s.io/v1)."""
        schema = {
            "type": "object",
            "description": self.description,
            "properties": {"spec": self.spec, "status": self.status},
        }
        columns = [
            {"name": each.name, "type": "string", "jsonPath": each.path, "description": each.description}
            for each in self.columns
        ]
        names = {
            "kind": self.kind,
            "listKind": f"{self.kind}List",
            "plural": self.plural,
            "singular": self.kind.lower(),
        }
        metadata: dict[str, Any] = {"name": self.name, "labels": dict(PART_OF)}
        if self.annotations:
            metadata["annotations"] = dict(self.annotations)
        return {
            "apiVersion": "apiextensions.k8s.io/v1",
            "kind": "CustomResourceDefinition",
            "metadata": metadata,
            "spec": {
                "group": self.group,
                "names": {**names, "shortNames": list(self.short)} if self.short else names,
                "scope": "Namespaced" if self.namespaced else "Cluster",
                "versions": [
                    {
                        "name": version,
                        "served": True,
                        "storage": version == self.versions[0],
                        "schema": {"openAPIV3Schema": schema},
                        "subresources": {"status": {}},
                        "additionalPrinterColumns": [*columns, _AGE],
                    }
                    for version in self.versions
                ],
            },
        }


# Pieces of schemas.


def _text(description: str, words: Collection[str] = ()) -> Schema:
    schema: Schema = {"type": "string", "description": description}
    return {**schema, "enum": list(words)} if words else schema


def _texts(description: str) -> Schema:
    return {"type": "array", "description": description, "items": {"type": "string"}}


def _object(description: str, properties: Mapping[str, Schema], required: tuple[str, ...] = ()) -> Schema:
    schema: Schema = {"type": "object", "description": description, "properties": dict(properties), **_OPEN}
    return {**schema, "required": list(required)} if required else schema


def _list(description: str, items: Schema) -> Schema:
    return {"type": "array", "description": description, "items": items}


def _open(description: str) -> Schema:
    return {"type": "object", "description": description, **_OPEN}


def _exactly(names: tuple[str, ...], given: Mapping[str, Schema]) -> dict[str, Schema]:
    """`given`, in the order of the reader's own fields. Raises KeyError where the two are not the same."""
    if set(names) != set(given):
        raise KeyError(", ".join(sorted(set(names) ^ set(given))))
    return {name: given[name] for name in names}


def schema_of(described: inspect.Type, texts: Mapping[str, str]) -> Schema:
    """The schema of a type of store.models, with a description for each field. Raises TypeError, KeyError."""
    match described:
        case inspect.StructType():
            properties = {
                field.encode_name: {
                    **schema_of(field.type, texts),
                    "description": texts[field.encode_name],
                }
                for field in described.fields
            }
            return {"type": "object", "properties": properties, **_OPEN}
        case inspect.ListType():
            return {"type": "array", "items": schema_of(described.item_type, texts)}
        case inspect.LiteralType():
            return {"type": "string", "enum": list(described.values)}
        case inspect.StrType():
            return {"type": "string"}
        case inspect.IntType():
            return {"type": "integer", "format": "int64"}
        case _:
            raise TypeError(f"no schema for {described}")


_STATUS_TEXTS = {
    "conditions": "What the control plane has found.",
    "type": "What is told of: Accepted, and more.",
    "status": "Whether it is so.",
    "reason": "Why, as one word.",
    "message": "Why, for people: the field, what is wrong with it, what would be right.",
    "lastTransitionTime": "When the status changed last.",
    "observedGeneration": "The generation of the object that this is about.",
}


def _status() -> Schema:
    return {
        **schema_of(inspect.type_info(PolicyStatus), _STATUS_TEXTS),
        "description": "Written by the mesh.",
    }


# security.istio.io.

_SELECTOR = _object(
    "The pods that it is for, by their labels. Absent: all of the namespace.",
    {
        "matchLabels": {
            "type": "object",
            "description": "Labels that a pod must have, all of them.",
            "additionalProperties": {"type": "string"},
        }
    },
)

_VALUES = {
    "principals": "Identities of peers: TRUST_DOMAIN/ns/NAMESPACE/sa/SERVICE_ACCOUNT; * at one end matches any text.",
    "requestPrincipals": "Identities in a JWT (ISSUER/SUBJECT). HTTP: only a waypoint sees it.",
    "namespaces": "Namespaces of peers; * at one end matches any text.",
    "serviceAccounts": "Service accounts of peers: NAMESPACE/NAME, or NAME in the policy's own namespace.",
    "ipBlocks": "Addresses or CIDRs that connections come from.",
    "remoteIpBlocks": "Addresses or CIDRs of the original client. HTTP: only a waypoint sees it.",
    "hosts": "Hosts that requests are for. HTTP: only a waypoint sees it.",
    "ports": 'Destination ports, as texts: "8080".',
    "methods": "HTTP methods. HTTP: only a waypoint sees it.",
    "paths": "Paths of requests; * at one end matches any text. HTTP: only a waypoint sees it.",
}


def _values(name: str) -> Schema:
    """The schema of a list of a source or an operation; `not...` is what none may be."""
    if name in _VALUES:
        return _texts(_VALUES[name])
    plain = name[3:4].lower() + name[4:]
    if not name.startswith("not") or plain not in _VALUES:
        raise KeyError(name)
    return _texts(f"None of these may be: see {plain}.")


def _target(description: str) -> Schema:
    fields = {
        "group": _text("API group: gateway.networking.k8s.io, networking.istio.io, or empty for a Service."),
        "kind": _text("Gateway, GatewayClass, Service or ServiceEntry."),
        "name": _text("Its name."),
        "namespace": _text("The policy's own namespace, or absent."),
    }
    return _object(description, _exactly(authorization.TARGET_FIELDS, fields), ("kind", "name"))


def _authorization_policy() -> Schema:
    source = _object("All of its fields must hold.", {n: _values(n) for n in authorization.SOURCE_FIELDS})
    operation = _object(
        "All of its fields must hold.", {n: _values(n) for n in authorization.OPERATION_FIELDS}
    )
    condition = {
        "key": _text("An attribute: source.ip, source.namespace, source.principal, source.serviceAccount, "
                     "destination.ip, destination.port, or one of HTTP such as request.headers[NAME]."),
        "values": _texts("One of these it must be."),
        "notValues": _texts("None of these it may be."),
    }  # fmt: skip
    rule = {
        "from": _list("Who: one of these.", _object("A source.", {"source": source})),
        "to": _list("What: one of these.", _object("An operation.", {"operation": operation})),
        "when": _list(
            "Further conditions: all of these.",
            _object("A condition.", _exactly(authorization.CONDITION_FIELDS, condition), ("key",)),
        ),
    }
    fields = {
        "selector": _SELECTOR,
        "targetRef": _target("What a waypoint enforces it for."),
        "targetRefs": _list("What a waypoint enforces it for.", _target("A Service, a Gateway, ...")),
        "action": _text("What is done with what matches; ALLOW unless said.", authorization.ACTIONS.words),
        "provider": _object(
            "For CUSTOM: who decides.", {"name": _text("Its name in the mesh's configuration.")}
        ),
        "rules": _list(
            "It matches if one of these does. ALLOW without rules allows nothing.",
            _object("All of from, to and when must hold.", _exactly(authorization.RULE_FIELDS, rule)),
        ),
    }
    return _object("Who may reach which pods.", _exactly(authorization.SPEC_FIELDS, fields))


def _peer_authentication() -> Schema:
    mode = _text(
        "STRICT: mutual TLS only. PERMISSIVE: plaintext, too. UNSET: as the one above says.",
        peerauth.MODES.words,
    )
    fields = {
        "selector": _SELECTOR,
        "mtls": _object("For all ports.", {"mode": mode}),
        "portLevelMtls": {
            "type": "object",
            "description": "By the pod's own port; only with a selector.",
            "additionalProperties": _object("For this port.", {"mode": mode}),
        },
    }
    return _object("Whether pods take plaintext.", _exactly(peerauth.SPEC_FIELDS, fields))


def _typed(kind: type[Object], spec: Schema, columns: tuple[Column, ...], description: str) -> Definition:
    versions = tuple(version.rpartition("/")[2] for version in (kind.API_VERSION, *kind.API_VERSIONS))
    return Definition(
        group_of(kind.API_VERSION), versions, kind.KIND, kind.PLURAL, kind.SHORT, columns, spec, _status(),
        description, kind.NAMESPACED,
    )  # fmt: skip


# Kinds whose specs the API server takes as they are.


def _foreign(
    group: str, kind: str, plural: str, short: tuple[str, ...], columns: tuple[Column, ...], description: str
) -> Definition:
    known = FOREIGN[group, kind]
    # The newest first: v1, v1beta1, v1alpha4, v1alpha3, ...
    ordered = tuple(
        sorted(known.versions, key=lambda name: ("alpha" not in name, "beta" not in name, name), reverse=True)
    )
    return Definition(
        group, ordered, kind, plural, short, columns, _open("As its own documentation says."),
        _open("Written by the mesh."), description, known.namespaced,
    )  # fmt: skip


_HOSTS = Column("Hosts", ".spec.hosts", "The hosts that it is for.")


def definitions() -> list[Definition]:
    """The kinds of the mesh."""
    return [
        _typed(
            AuthorizationPolicy, _authorization_policy(),
            (Column("Action", ".spec.action", "What is done with what matches."),),
            "Says who may reach which pods.",
        ),
        _typed(
            PeerAuthentication, _peer_authentication(),
            (Column("Mode", ".spec.mtls.mode", "Whether plaintext is taken."),),
            "Says whether pods take plaintext.",
        ),
        _foreign("security.istio.io", "RequestAuthentication", "requestauthentications", ("ra",), (),
                 "Says which JWTs are believed."),
        _foreign("networking.istio.io", "VirtualService", "virtualservices", ("vs",),
                 (Column("Gateways", ".spec.gateways", "The gateways that it is for."), _HOSTS),
                 "Says where requests to hosts go."),
        _foreign("networking.istio.io", "DestinationRule", "destinationrules", ("dr",),
                 (Column("Host", ".spec.host", "The host that it is for."),),
                 "Says how connections to a host are made."),
        _foreign("networking.istio.io", "Gateway", "gateways", ("gw",), (), "Describes a gateway of Istio's own API."),
        _foreign("networking.istio.io", "ServiceEntry", "serviceentries", ("se",),
                 (_HOSTS, Column("Location", ".spec.location", "Inside or outside the mesh."),
                  Column("Resolution", ".spec.resolution", "How addresses are found.")),
                 "Adds a service that is no Service of the cluster."),
        _foreign("networking.istio.io", "WorkloadEntry", "workloadentries", ("we",),
                 (Column("Address", ".spec.address", "Where it is."),), "Adds an endpoint that is no pod."),
        _foreign("telemetry.istio.io", "Telemetry", "telemetries", ("telemetry",), (),
                 "Says what is measured, logged and traced."),
        _foreign("linkerd.io", "ServiceProfile", "serviceprofiles", ("sp",), (), "Describes the routes of a service."),
        _foreign("split.smi-spec.io", "TrafficSplit", "trafficsplits", ("ts",),
                 (Column("Service", ".spec.service", "The service whose traffic is split."),),
                 "Splits the traffic of a service."),
    ]  # fmt: skip


# The Gateway API, as far as waypoints need it: for clusters that have none.


def _gateway(kind: str, plural: str, short: tuple[str, ...], columns: tuple[Column, ...], spec: Schema,
             description: str) -> Definition:  # fmt: skip
    acted_on = KINDS.get(kind)
    namespaced = acted_on.NAMESPACED if acted_on else FOREIGN["gateway.networking.k8s.io", kind].namespaced
    return Definition(
        "gateway.networking.k8s.io", ("v1", "v1beta1"), kind, plural, short, columns, spec,
        _open("Written by the mesh."), description, namespaced,
        {"api-approved.kubernetes.io": _APPROVAL},
    )  # fmt: skip


def gateway_api() -> list[Definition]:
    """Minimal definitions of the Gateway API."""
    controller = _text("Who makes gateways of this class, as DOMAIN/PATH.")
    listener = {
        "name": _text("Its name."),
        "port": {
            "type": "integer",
            "format": "int32",
            "minimum": 1,
            "maximum": 65535,
            "description": "Its port.",
        },
        "protocol": _text("What it speaks: HBONE for a waypoint."),
        "hostname": _text("The host that it is for."),
        "allowedRoutes": _open("Whose Services and Pods may use it."),
    }
    gateway = {
        "gatewayClassName": _text("istio-waypoint for a waypoint."),
        "listeners": _list(
            "What it listens on.", _object("A listener.", listener, ("name", "port", "protocol"))
        ),
        "infrastructure": _open("What the objects that are made for it have in addition."),
    }
    return [
        _gateway("GatewayClass", "gatewayclasses", ("gc",),
                 (Column("Controller", ".spec.controllerName", "Who makes gateways of it."),
                  Column("Accepted", '.status.conditions[?(@.type=="Accepted")].status', "Whether somebody does.")),
                 _object("A kind of gateways.", {"controllerName": controller}, ("controllerName",)),
                 "A kind of gateways, and who makes them."),
        _gateway("Gateway", "gateways", ("gtw",),
                 (Column("Class", ".spec.gatewayClassName", "Its class."),
                  Column("Address", ".status.addresses[*].value", "Where it is."),
                  Column("Programmed", '.status.conditions[?(@.type=="Programmed")].status', "Whether it serves.")),
                 _object("What it is to be.", gateway, ("gatewayClassName", "listeners")),
                 "A gateway or a waypoint."),
        _gateway("HTTPRoute", "httproutes", (), (Column("Hostnames", ".spec.hostnames", "The hosts that it is for."),),
                 _open("As the Gateway API's documentation says."), "Says where HTTP requests go."),
    ]  # fmt: skip


# Files.

FOLDERS = {"base/crds": definitions, "gateway-api": gateway_api}


def _yaml(data: dict[str, Any]) -> str:
    import yaml

    class Plain(yaml.SafeDumper):
        """Repeats what is the same, instead of pointing to it."""

        def ignore_aliases(self, data: object) -> bool:
            return True

    return yaml.dump(data, Dumper=Plain, sort_keys=False, width=110, allow_unicode=True)


def files() -> dict[str, str]:
    """What manifests/ holds of definitions: paths in it, and texts."""
    found = {}
    for folder, made in FOLDERS.items():
        names = []
        for definition in made():
            name = f"{definition.group}_{definition.plural}.yaml"
            found[f"{folder}/{name}"] = "# Made by python -m ztunnel.store.crds\n" + _yaml(
                definition.object()
            )
            names.append(name)
        kustomization = {
            "apiVersion": "kustomize.config.k8s.io/v1beta1",
            "kind": "Kustomization",
            "resources": names,
        }
        found[f"{folder}/kustomization.yaml"] = "# Made by python -m ztunnel.store.crds\n" + _yaml(
            kustomization
        )
    return found


def main() -> int:
    """Write the files into manifests/ of this tree; returns the exit code."""
    manifests = Path(__file__).parents[2] / "manifests"
    for path, text in files().items():
        (manifests / path).parent.mkdir(parents=True, exist_ok=True)
        (manifests / path).write_text(text, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
