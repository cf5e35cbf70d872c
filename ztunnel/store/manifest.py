"""The objects of one file or stream: its documents, lists unfolded, each decoded, with what is wrong where."""

from typing import Any, NamedTuple

from ztunnel.store.decode import Decoded, decode
from ztunnel.store.documents import Document, line_of, parse
from ztunnel.store.models import reference
from ztunnel.store.problems import Problem
from ztunnel.store.validation import Fault, Path


class Entry(NamedTuple):
    """One object of a file: its place (`item` is the index in a List, else None), its data, what it is."""

    document: int
    item: int | None
    data: dict[str, Any]
    decoded: Decoded


class Manifest(NamedTuple):
    """What a file holds. `readable` is false if some document of it could not even be parsed.

    `strangers` are objects that this mesh knows nothing of; another reader may.
    """

    documents: list[Document]
    entries: list[Entry]
    problems: list[Problem]
    readable: bool
    strangers: list[Entry]


def read_manifest(text: str, file: str = "", *, is_json: bool = False) -> Manifest:
    """The objects in a YAML (or JSON) text. `file` is the name that problems give; nothing is raised."""
    documents = parse(text, is_json)
    entries: list[Entry] = []
    strangers: list[Entry] = []
    problems: list[Problem] = []
    for index, document in enumerate(documents):
        if document.error:
            problems.append(Problem("", file, document.error, document.remedy, line=document.line))
        elif document.data is None:
            continue
        elif not isinstance(document.data, dict):
            kind = _WORDS.get(type(document.data), "a single value")
            remedy = "begin it with apiVersion: and kind:"
            problems.append(Problem("", file, f"expected an object, got {kind}", remedy, line=document.line))
        elif _is_list(document.data):
            for item, data in enumerate(document.data["items"]):
                _read_object(data, index, item, file, text, document, entries, strangers, problems)
        else:
            _read_object(document.data, index, None, file, text, document, entries, strangers, problems)
    readable = not any(document.error for document in documents)
    return Manifest(documents, entries, problems, readable, strangers)


_WORDS: dict[type, str] = {list: "a list", str: "a text"}


def _is_list(data: dict[str, Any]) -> bool:
    return str(data.get("kind", "")).endswith("List") and isinstance(data.get("items"), list)


def _read_object(
    data: Any,
    index: int,
    item: int | None,
    file: str,
    text: str,
    document: Document,
    entries: list[Entry],
    strangers: list[Entry],
    problems: list[Problem],
) -> None:
    base: Path = () if item is None else ("items", item)
    if not isinstance(data, dict):
        line = line_of(text, document, base)
        problems.append(Problem("", file, f"items[{item}]: expected an object", "remove it", line=line))
        return
    decoded = decode(data)
    (entries if decoded.key is not None else strangers).append(Entry(index, item, data, decoded))
    problems += [
        _problem(fault, name_of(data, decoded), file, line_of(text, document, (*base, *fault.path)))
        for fault in decoded.faults
    ]


def _problem(fault: Fault, name: str, file: str, line: int) -> Problem:
    return Problem(name, file, str(fault), fault.remedy, fault.severity, line)


def name_of(data: dict[str, Any], decoded: Decoded) -> str:
    """How people are told of an object, as far as its data says what it is."""
    if decoded.key is not None:
        return str(decoded.key)
    metadata = data.get("metadata")
    metadata = metadata if isinstance(metadata, dict) else {}
    kind, name = data.get("kind"), metadata.get("name")
    if not isinstance(kind, str):
        return str(name) if name else ""
    return reference(kind, str(metadata.get("namespace") or ""), str(name or ""))
