"""Plain data into typed objects, with errors that people can act on: the field, what is there, what is right.

Shape is checked by msgspec; its errors are translated here, and the rules of `validation` applied after it.
"""

import difflib
import json
import re
from collections.abc import Iterator
from functools import lru_cache
from typing import Any, NamedTuple

import msgspec
from msgspec import inspect

from ztunnel.store.kinds import KINDS, api_versions_of, foreign_kind, typed_kind
from ztunnel.store.models import Key, Object, key_of
from ztunnel.store.validation import Fault, Path, check


class Decoded(NamedTuple):
    """What a document turned out to be.

    `key` is None if it does not even say kind and name. `obj` is None for kinds that the mesh does not act on, and
    for objects with an error among `faults`, unless the kind restricts traffic: then the object is there if at all
    possible, and those who act on it restrict more for what is wrong with it.
    """

    key: Key | None
    obj: Object | None
    faults: list[Fault]

    @property
    def accepted(self) -> bool:
        """Whether the document may stay as it is (there may be warnings)."""
        return self.key is not None and not any(fault.severity == "error" for fault in self.faults)

    @property
    def counts(self) -> bool:
        """Whether a store takes it in: it is accepted, or restricts traffic although something is wrong with it."""
        return self.accepted or (self.key is not None and self.obj is not None)


class _Header(msgspec.Struct, rename="camel"):
    kind: str
    api_version: str


_header = msgspec.json.Decoder(_Header)
_top_level = msgspec.json.Decoder(dict[str, msgspec.Raw])
_TOP_LEVEL = frozenset(("apiVersion", "kind", "metadata", "spec", "status"))
_decoders = {kind: msgspec.json.Decoder(kind) for kind in KINDS.values()}


def decode_json(data: bytes) -> Object | None:
    """The fast path: a typed object from a JSON file with exactly one correct object, else None."""
    try:
        header = _header.decode(data)
        kind = typed_kind(header.api_version, header.kind)
        if kind is None:
            return None
        obj = _normal(_decoders[kind].decode(data))
        if kind.RESTRICTS and not _top_level.decode(data).keys() <= _TOP_LEVEL:
            return None
    except (msgspec.DecodeError, UnicodeDecodeError):
        return None
    return obj if obj.name and not any(True for _ in check(obj)) else None


def decode(data: dict[str, Any]) -> Decoded:
    """A typed object from the data of one document, or why there is none."""
    api_version, kind_name = data.get("apiVersion"), data.get("kind")
    faults = []
    for field, value, example in (("apiVersion", api_version, "v1"), ("kind", kind_name, "Service")):
        if not isinstance(value, str) or not value:
            message = "is missing" if value is None else f"expected a name, got {_show(value)}"
            faults.append(Fault((field,), message, f"add it, for example {field}: {example}"))
    if faults or not isinstance(api_version, str) or not isinstance(kind_name, str):
        return Decoded(None, None, faults)
    given = data.get("metadata")
    metadata: dict[str, Any] = given if isinstance(given, dict) else {}
    space = metadata.get("namespace")
    namespace: str = space if isinstance(space, str) else ""
    if foreign := foreign_kind(api_version, kind_name):
        name: Any = metadata.get("name", None if foreign.named else "")
        if fault := _name_fault(name, required=foreign.named):
            return Decoded(None, None, [fault])
        namespace = (namespace or "default") if foreign.namespaced else ""
        consequence = Fault((), foreign.consequence, "do not rely on it", "warning")
        return Decoded(Key(foreign.group, kind_name, namespace, name), None, [consequence])
    kind = typed_kind(api_version, kind_name)
    if kind is None:
        return Decoded(None, None, [_unknown(api_version, kind_name)])
    if fault := _name_fault(metadata.get("name"), required=True):
        return Decoded(None, None, [fault])
    key = key_of(kind, namespace, metadata["name"])
    cleaned = without_nulls(data)
    if kind.RESTRICTS:
        return _decode_restricting(key, cleaned, kind)
    try:
        obj = _normal(msgspec.convert(cleaned, kind))
    except msgspec.ValidationError as error:
        return Decoded(key, None, [_translate(str(error), cleaned, kind)])
    faults = [*check(obj), *_misspelt(cleaned, kind)]
    refused = any(fault.severity == "error" for fault in faults)
    return Decoded(key, None if refused else obj, faults)


def _decode_restricting(key: Key, data: dict[str, Any], kind: type[Object]) -> Decoded:
    """An object whose absence would open something: only one that cannot exist under its name is left out."""
    faults: list[Fault] = []
    # Fields beside spec were perhaps meant to be in it: they count as something in it that is not understood.
    strays = {f"/{field}": data[field] for field in data if field not in _TOP_LEVEL}
    if strays and isinstance(data.get("spec", {}), dict):
        data = {**data, "spec": {**strays, **data.get("spec", {})}}
    try:
        obj = _normal(msgspec.convert(data, kind))
    except msgspec.ValidationError as error:
        faults.append(_translate(str(error), data, kind))
        given = data["metadata"]
        annotations = given.get("annotations")
        readable = isinstance(annotations, dict) and all(
            isinstance(text, str) for text in annotations.values()
        )
        metadata = {"name": given["name"], "annotations": annotations if readable else {}}
        if "namespace" in given:
            metadata["namespace"] = given["namespace"]
        try:
            obj = _normal(msgspec.convert({"metadata": metadata, "spec": data.get("spec", {})}, kind))
        except msgspec.ValidationError:
            return Decoded(key, None, faults)
    for fault in check(obj):
        if fault.path[:1] == ("spec",) and fault.path[1:2] and fault.path[1] in strays:
            _, semicolon, effect = fault.remedy.rpartition(";")
            remedy = "put it below spec, or remove it" + semicolon + effect
            fault = Fault((str(fault.path[1])[1:],), "unknown field", remedy)
        faults.append(fault)
    faults += _misspelt(data, kind)
    nameless = any(
        fault.severity == "error" and fault.path[:2] in (("metadata", "name"), ("metadata", "namespace"))
        for fault in faults
    )
    return Decoded(key, None if nameless else obj, faults)


def _name_fault(name: object, *, required: bool) -> Fault | None:
    if isinstance(name, str) and (name or not required):
        return None
    message = "is missing" if name is None or name == "" else f"expected a name, got {_show(name)}"
    quote = isinstance(name, int | float)
    remedy = f"put it in quotes: {_show(str(name).lower())}" if quote else "give the object a name"
    return Fault(("metadata", "name"), message, remedy)


def _normal(obj: Object) -> Object:
    """The object with its namespace written out, as every reader expects it."""
    if obj.metadata.namespace == obj.namespace:
        return obj
    return msgspec.structs.replace(
        obj, metadata=msgspec.structs.replace(obj.metadata, namespace=obj.namespace)
    )


def _unknown(api_version: str, kind: str) -> Fault:
    known = api_versions_of(kind)
    if known:
        return Fault(("apiVersion",), f'"{api_version}" has no {kind}', f"use {' or '.join(known)}")
    close = difflib.get_close_matches(kind, KINDS, 1)
    remedy = f'did you mean "{close[0]}"?' if close else f"known kinds are {', '.join(KINDS)}"
    return Fault(("kind",), f'"{kind}" ({api_version}) is not known', remedy)


def without_nulls(value: Any) -> Any:
    """Kubernetes takes a field that is null as one that is not there."""
    if isinstance(value, dict):
        return {key: without_nulls(item) for key, item in value.items() if item is not None}
    if isinstance(value, list):
        return [without_nulls(item) for item in value]
    return value


_AT = re.compile(r"(?P<what>.*?)(?: - at `(?P<kind>key in )?(?P<path>\$[^`]*)`)?", re.DOTALL)
_STEP = re.compile(r"\.([A-Za-z0-9_]+)|\[(\d+|\.\.\.)\]")
_GOT = re.compile(r"Expected `(?P<expected>[^`]*)`, got `(?P<got>[^`]*)`")
_NAMES = {"array": "list", "object": "mapping", "null": "null"}


def _translate(text: str, data: Any, kind: type[Object]) -> Fault:
    """A message of msgspec's, as a fault; the value it complains about is looked up in `data`."""
    match = _AT.fullmatch(text)
    what = match["what"] if match else text
    got = _GOT.fullmatch(what)
    path, value = _resolve(match["path"] or "$" if match else "$", data, got["got"] if got else "")
    if missing := re.fullmatch(r"Object missing required field `(.+)`", what):
        return Fault((*path, missing[1]), "is missing", "add it")
    if got:
        names = [_NAMES.get(name, name) for name in got["expected"].split(" | ") if name != "null"]
        shown = f" ({_show(value)})" if isinstance(value, str | int | float | bool) else ""
        message = f"expected {' or '.join(names)}, got {_NAMES.get(got['got'], got['got'])}{shown}"
        return Fault(path, message, _remedy(names, path, value))
    if what.startswith("Invalid enum value"):
        allowed = _allowed(kind, path)
        return Fault(path, f"{_show(value)} is not possible", f"use one of {', '.join(allowed)}")
    message = re.sub(r"^Expected `(\w+)`", r"expected \1", what)
    return Fault(path, f"{message}, got {_show(value)}", _remedy(["int"], path, value))


def _remedy(names: list[str], path: Path, value: Any) -> str:
    last = next((step for step in reversed(path) if isinstance(step, str)), "")
    if "port" in last.lower() and "int" in names:
        return "give a number 1-65535" + (" or the name of a container's port" if "str" in names else "")
    if "int" in names:
        return "give a whole number" + (", 0 or more" if last == "replicas" else "")
    if "str" in names:
        if isinstance(value, bool):
            return f'put it in quotes: "{str(value).lower()}"'
        if isinstance(value, int | float):
            return f'put it in quotes: "{value}"'
        return "give a text"
    if "bool" in names:
        return "give true or false, without quotes"
    return (
        "give a list: lines that begin with '- '" if "list" in names else "give 'key: value' lines below it"
    )


def _resolve(path: str, data: Any, got: str) -> tuple[Path, Any]:
    """The path as steps and the value there; for `[...]` (some value of a mapping) the first of type `got`."""
    steps: list[str | int] = []
    for name, index in _STEP.findall(path):
        step: str | int = name
        if index == "...":
            step = next((key for key, item in data.items() if _type_name(item) == got), "...")
        elif index:
            step = int(index)
        steps.append(step)
        try:
            data = data[step]
        except (LookupError, TypeError):
            data = None
    return tuple(steps), data


def _type_name(value: Any) -> str:
    names = {dict: "object", list: "array", type(None): "null"}
    return names.get(type(value), type(value).__name__)


def _show(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False, default=str)
    return text if len(text) <= 60 else text[:57] + "..."


@lru_cache
def _type_of(kind: type[Object]) -> inspect.Type:
    return inspect.type_info(kind)


def _within(described: inspect.Type, step: str | int) -> inspect.Type | None:
    """The type of a field (or of the items) of a type, None where nothing is known."""
    if isinstance(described, inspect.Metadata):
        return _within(described.type, step)
    if isinstance(described, inspect.UnionType):
        return next((found for item in described.types if (found := _within(item, step)) is not None), None)
    if isinstance(described, inspect.StructType) and isinstance(step, str):
        return next((field.type for field in described.fields if field.encode_name == step), None)
    if isinstance(described, inspect.ListType) and isinstance(step, int):
        return described.item_type
    return None


def _allowed(kind: type[Object], path: Path) -> list[str]:
    described: inspect.Type | None = _type_of(kind)
    for step in path:
        described = _within(described, step) if described is not None else None
    return (
        [str(value) for value in described.values if value]
        if isinstance(described, inspect.LiteralType)
        else []
    )


def _misspelt(data: Any, kind: type[Object]) -> Iterator[Fault]:
    """Warnings for fields that look like a slip of the pen; fields that are merely not used stay silent."""
    return _misspelt_within(data, _type_of(kind), ())


def _misspelt_within(data: Any, described: inspect.Type, path: Path) -> Iterator[Fault]:
    if isinstance(described, inspect.UnionType):
        described = next(
            (item for item in described.types if isinstance(item, inspect.StructType)), described
        )
    if isinstance(described, inspect.ListType) and isinstance(data, list):
        for index, item in enumerate(data):
            yield from _misspelt_within(item, described.item_type, (*path, index))
    if not isinstance(described, inspect.StructType) or not isinstance(data, dict):
        return
    known = {field.encode_name: field.type for field in described.fields}
    for key, value in data.items():
        if key in known:
            yield from _misspelt_within(value, known[key], (*path, key))
        elif close := difflib.get_close_matches(key, known, 1, cutoff=0.85):
            yield Fault((*path, key), "unknown field", f'did you mean "{close[0]}"?', "warning")
