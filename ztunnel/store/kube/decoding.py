"""JSON of an API server into our typed objects: no more of each than the mesh uses, and one bad one spoils no other."""

from collections.abc import Callable
from typing import Any, NamedTuple

import msgspec

from ztunnel.store.decode import decode, decode_json
from ztunnel.store.kube.slim import slim_of
from ztunnel.store.models import Key, Object, key_of
from ztunnel.store.problems import Problem


class Read(NamedTuple):
    """One object as it came. `obj` is None where it does not decode; `problems` say what is wrong with it."""

    key: Key
    obj: Object | None
    problems: tuple[Problem, ...] = ()


class Page(msgspec.Struct):
    """One page of a list; `items` as they are."""

    metadata: "PageMeta"
    items: list[msgspec.Raw] | None = None


class PageMeta(msgspec.Struct, rename="camel"):
    """`following` is what the next page is asked for with, "" for the last one."""

    resource_version: str = ""
    following: str = msgspec.field(name="continue", default="")


class Event(msgspec.Struct):
    """One line of a watch."""

    type: str
    object: msgspec.Raw


class _Versioned(msgspec.Struct):
    metadata: PageMeta


class _Name(msgspec.Struct):
    name: str = ""
    namespace: str = ""


class _Named(msgspec.Struct):
    metadata: _Name


page = msgspec.json.Decoder(Page).decode
event = msgspec.json.Decoder(Event).decode
_versioned = msgspec.json.Decoder(_Versioned)
_named = msgspec.json.Decoder(_Named)


def version_of(data: bytes | msgspec.Raw) -> str:
    """The resourceVersion of an object, "" if it has none."""
    try:
        return _versioned.decode(data).metadata.resource_version
    except msgspec.DecodeError:
        return ""


def reader(kind: type[Object], *, slim: bool) -> Callable[[bytes | msgspec.Raw], Read | None]:
    """A function that reads objects of a kind, `slim` or whole; it gives None for what has no name."""
    smaller = slim_of(kind) if slim else lambda obj: obj
    return _restricting(kind, smaller) if kind.RESTRICTS else _plain(kind, smaller)


def _plain(kind: type[Object], smaller: Callable[[Any], Any]) -> Callable[[bytes | msgspec.Raw], Read | None]:
    """For kinds that the API server has checked by its own rules: only the shape can surprise us."""
    decoder = msgspec.json.Decoder(kind)

    def read(data: bytes | msgspec.Raw) -> Read | None:
        try:
            obj = smaller(decoder.decode(data))
            return Read(obj.key, obj) if obj.name else None
        except msgspec.DecodeError:
            return _explained(kind, data, smaller)

    return read


def _restricting(
    kind: type[Object], smaller: Callable[[Any], Any]
) -> Callable[[bytes | msgspec.Raw], Read | None]:
    """For kinds whose absence would open something: what is wrong in them is told, and they count all the same."""

    def read(data: bytes | msgspec.Raw) -> Read | None:
        text = bytes(data)
        obj = decode_json(text)
        if obj is not None and isinstance(obj, kind):
            return Read(obj.key, smaller(obj))
        return _explained(kind, text, smaller)

    return read


def _explained(kind: type[Object], data: bytes | msgspec.Raw, smaller: Callable[[Any], Any]) -> Read | None:
    """The slow way: with every field that is wrong named."""
    try:
        fields = msgspec.json.decode(data)
    except (msgspec.DecodeError, UnicodeDecodeError):
        return None
    if not isinstance(fields, dict):
        return None
    # What is in a list does not say what it is.
    fields = {"apiVersion": kind.API_VERSION, "kind": kind.KIND, **fields}
    if not kind.RESTRICTS:
        return _shaped(kind, fields, smaller)
    decoded = decode(fields)
    if decoded.key is None:
        return None
    ref = str(decoded.key)
    problems = tuple(Problem(ref, "", str(fault), fault.remedy, fault.severity) for fault in decoded.faults)
    obj = smaller(decoded.obj) if decoded.counts and decoded.obj is not None else None
    return Read(decoded.key, obj, problems)


def _shaped(kind: type[Object], fields: dict[str, Any], smaller: Callable[[Any], Any]) -> Read | None:
    metadata = fields.get("metadata")
    name = metadata.get("name") if isinstance(metadata, dict) else None
    if not isinstance(name, str) or not name:
        return None
    key = key_of(kind, str(metadata.get("namespace") or "") if isinstance(metadata, dict) else "", name)
    try:
        obj = msgspec.convert(_without_nulls(fields), kind)
    except msgspec.ValidationError as error:
        told = Problem(str(key), "", f"cannot be read: {error}", "the mesh keeps what it knew of it before")
        return Read(key, None, (told,))
    return Read(key, smaller(obj))


def key_in(kind: type[Object], data: bytes | msgspec.Raw) -> Key | None:
    """The key of an object, however wrong the rest of it is."""
    try:
        name = _named.decode(data).metadata
    except msgspec.DecodeError:
        return None
    return key_of(kind, name.namespace, name.name) if name.name else None


def _without_nulls(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_nulls(item) for key, item in value.items() if item is not None}
    if isinstance(value, list):
        return [_without_nulls(item) for item in value]
    return value
