"""Changing one document of a file's text and nothing else: other documents stay byte for byte, comments are kept.

Pure: text in, text out. Each result is read back and compared before it is given out, so that a file can never be
damaged by an edit; where the round-trip editor cannot express a change, the one document is written anew.
"""

import io
import json
import re
from collections.abc import Iterable, Iterator
from typing import Any

from ruamel.yaml import YAML
from ruamel.yaml.error import YAMLError
from ruamel.yaml.scalarstring import DoubleQuotedScalarString

from ztunnel.store.documents import Document, dump, means_string, parse, parse_yaml
from ztunnel.store.problems import StoreError
from ztunnel.store.splicing import exact, splice


def merge_patch(target: Any, patch: Any) -> Any:
    """JSON merge patch (RFC 7386): mappings merge, null removes, everything else replaces."""
    if not isinstance(patch, dict):
        return patch
    result = dict(target) if isinstance(target, dict) else {}
    for key, value in patch.items():
        if value is None:
            result.pop(key, None)
        else:
            result[key] = merge_patch(result.get(key), value)
    return result


def replace_document(text: str, documents: list[Document], index: int, data: Any, is_json: bool) -> str:
    """The file's text with document `index` (of `documents`, as parsed from `text`) holding `data`.

    Raises StoreError if the rest could not be kept as it is.
    """
    document = documents[index]
    expected = [other.data for other in documents]
    expected[index] = data
    if is_json:
        body = text[document.start : document.end]
        indent = re.match(r"[\[{]\r?\n([ \t]+)", body)
        body = json.dumps(data, indent=indent[1] if indent else None, ensure_ascii=False)
        candidates: Iterable[str] = [text[: document.start] + body + text[document.end :]]
    else:
        head, core, tail = _parts(text, document)
        newline = "\r\n" if "\r\n" in text else "\n"
        candidates = (
            text[: document.start] + head + body.replace("\n", newline) + tail + text[document.end :]
            for body in _bodies(core.replace("\r\n", "\n"), document.data, data)
        )
    return _verified(candidates, expected, is_json)


def remove_document(text: str, documents: list[Document], index: int, is_json: bool) -> str:
    """The file's text without document `index`; "" if no other document is left.

    Raises StoreError if the rest could not be kept as it is.
    """
    others = documents[:index] + documents[index + 1 :]
    if all(other.data is None and not other.error for other in others):
        return ""
    document = documents[index]
    before, after = text[: document.start], text[document.end :]
    # A %YAML line may only follow an explicit end.
    return _verified([before + after, before + "...\n" + after], [other.data for other in others], is_json)


def _verified(candidates: Iterable[str], expected: list[Any], is_json: bool) -> str:
    for candidate in candidates:
        if [exact(found.data) for found in parse(candidate, is_json)] == [exact(data) for data in expected]:
            return candidate
    raise StoreError("the file could not be changed without changing its other documents; edit it by hand")


def _bodies(text: str, old: Any, new: Any) -> Iterator[str]:
    """Ways to write `new`, those that change least first."""
    for way in (splice, _round_trip):
        body = way(text, old, new)
        if body is not None:
            yield body
    yield dump(new)


def _parts(text: str, document: Document) -> tuple[str, str, str]:
    """A document's marker line, its content, and what follows it (comments, blank lines, an end marker)."""
    core = text[document.start : document.end_of_body]
    tail = text[document.end_of_body : document.end]
    head = ""
    if marker := re.match(r"(?:[%#][^\n]*\n|[ \t\r]*\n)*---[ \t]*(#[^\n]*|\r)?(\n|$)", core):
        head, core = marker[0], core[marker.end() :]
    lines = core.splitlines(keepends=True)
    while lines and (not lines[-1].strip() or lines[-1].startswith("#")):
        tail = lines.pop() + tail
    shorter = "".join(lines)
    found = parse_yaml(shorter)
    if len(found) == 1 and exact(found[0].data) == exact(document.data):
        core = shorter
    else:  # the blank lines belong to a block scalar
        tail = text[document.end_of_body : document.end]
    return head if head.endswith("\n") or not head else head + "\n", core, tail


# A key with lines below it: how far these are indented.
_NESTED = re.compile(r"^( *)[^\s#-][^\n]*:[ \t]*(?:#[^\n]*)?\n(\1 +)[^\s#-]", re.MULTILINE)
_NESTED_LIST = re.compile(r"^( *)[^\s#-][^\n]*:[ \t]*(?:#[^\n]*)?\n( *)- ", re.MULTILINE)


def _round_trip(text: str, old: Any, new: Any) -> str | None:
    """The text edited by ruamel.yaml so that it holds `new`, None if that does not come out right."""
    yaml = YAML()
    yaml.preserve_quotes = True
    yaml.width = 4096
    deeper = _NESTED.search(text)
    dashes = _NESTED_LIST.search(text)
    offset = max(len(dashes[2]) - len(dashes[1]), 0) if dashes else 0
    mapping = len(deeper[2]) - len(deeper[1]) if deeper else 2
    yaml.indent(mapping=max(mapping, 1), sequence=offset + 2, offset=offset)
    try:
        tree = yaml.load(text)
        _update(tree, old, new)
        out = io.StringIO()
        yaml.dump(tree, out)
    except (YAMLError, LookupError, TypeError, ValueError, AttributeError, NotImplementedError):
        return None
    edited = out.getvalue()
    found = parse_yaml(edited)
    return edited if len(found) == 1 and exact(found[0].data) == exact(new) else None


def _update(tree: Any, old: Any, new: Any) -> None:
    """Make ruamel's `tree`, which holds `old`, hold `new`, touching only what differs."""
    if isinstance(new, dict):
        names = {str(key): key for key in tree}
        for key in old:
            if key not in new:
                del tree[names[key]]
        for key, value in new.items():
            if key not in old:
                tree[_quoted(key)] = _node(value)
            elif exact(old[key]) != exact(value):
                _replace(tree, names[key], old[key], value)
        return
    first = 0
    while first < min(len(old), len(new)) and exact(old[first]) == exact(new[first]):
        first += 1
    last = 0
    while last < min(len(old), len(new)) - first and exact(old[-1 - last]) == exact(new[-1 - last]):
        last += 1
    common = min(len(old), len(new)) - first - last
    for index in range(first, first + common):
        _replace(tree, index, old[index], new[index])
    for _ in range(len(old) - last - first - common):
        del tree[first + common]
    for index in range(first + common, len(new) - last):
        tree.insert(index, _node(new[index]))


def _replace(tree: Any, place: Any, old: Any, new: Any) -> None:
    if type(old) is type(new) and isinstance(new, dict | list) and new and old:
        _update(tree[place], old, new)
    else:
        tree[place] = _node(new)


def _node(value: Any) -> Any:
    if isinstance(value, dict):
        return {_quoted(key): _node(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_node(item) for item in value]
    return _quoted(value) if isinstance(value, str) else value


def _quoted(text: str) -> str:
    """Quotes around what would be read as something else (ruamel.yaml writes YAML 1.2, where `yes` is a text)."""
    return text if means_string(text) else DoubleQuotedScalarString(text)
