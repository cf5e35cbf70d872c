"""The smallest change of a YAML text that makes it mean something else: values replaced, lines added or taken out.

All other characters stay. Pure, and only a proposal: what is too hard for it is None, and the caller reads the result
back (aliases, for one, make a text say more than is written).
"""

import json
import textwrap
from typing import Any, NamedTuple

import yaml

from ztunnel.store.documents import compose, dump, means_string


class _Edit(NamedTuple):
    start: int
    end: int
    text: str


class _TooHard(Exception):
    """The change cannot be made by replacing a few characters."""


def splice(text: str, old: Any, new: Any) -> str | None:
    """`text`, one document that means `old`, changed to mean `new`; None if that takes more than a few edits."""
    try:
        root = compose(text)
        edits: list[_Edit] = []
        _change(text, root, old, new, False, edits)
    except (_TooHard, yaml.YAMLError):
        return None
    # From the back, so that places before stay true; of two at one place, the insertion comes after the removal.
    for edit in sorted(edits, key=lambda edit: (edit.start, edit.end), reverse=True):
        text = text[: edit.start] + edit.text + text[edit.end :]
    return text


def exact(data: Any) -> str:
    """A text that two values share only if they are the same to Kubernetes: 1, 1.0 and true differ."""
    return json.dumps(data, sort_keys=True, default=str)


def _change(text: str, node: yaml.Node | None, old: Any, new: Any, in_flow: bool, edits: list[_Edit]) -> None:
    if exact(old) == exact(new):
        return
    if node is None:
        raise _TooHard
    in_flow = in_flow or (isinstance(node, yaml.CollectionNode) and bool(node.flow_style))
    if isinstance(node, yaml.MappingNode) and isinstance(old, dict) and isinstance(new, dict) and new:
        if not in_flow or old.keys() == new.keys():
            _change_mapping(text, node, old, new, in_flow, edits)
            return
    elif (
        isinstance(node, yaml.SequenceNode)
        and isinstance(old, list)
        and isinstance(new, list)
        and new
        and (not in_flow or len(old) == len(new))
    ):
        _change_sequence(text, node, old, new, in_flow, edits)
        return
    edits.append(_replacement(text, node, new, in_flow))


def _change_mapping(
    text: str, node: yaml.MappingNode, old: Any, new: Any, in_flow: bool, edits: list[_Edit]
) -> None:
    entries = {key.value: (key, value) for key, value in node.value}
    if not old.keys() & new.keys():
        raise _TooHard
    for name in old:
        if name in new and exact(old[name]) == exact(new[name]):
            continue
        if name not in entries:  # it comes from a merge key
            raise _TooHard
        key, value = entries[name]
        if name in new:
            _change(text, value, old[name], new[name], in_flow, edits)
        else:
            start = _line_start(text, key.start_mark.index)
            edits.append(_Edit(start, _line_end(text, _end(text, key, value)), ""))
    added = {name: value for name, value in new.items() if name not in old}
    if added:
        edits.append(_insertion(text, node, node.value[-1], dump(added)))


def _change_sequence(
    text: str, node: yaml.SequenceNode, old: Any, new: Any, in_flow: bool, edits: list[_Edit]
) -> None:
    if len(new) < len(old):
        raise _TooHard
    for item, before, after in zip(node.value, old, new, strict=False):
        _change(text, item, before, after, in_flow, edits)
    if len(new) > len(old):
        edits.append(_insertion(text, node, (node.value[-1], node.value[-1]), dump(new[len(old) :])))


def _insertion(text: str, node: yaml.Node, last: tuple[yaml.Node, yaml.Node], lines: str) -> _Edit:
    """Lines after the last entry of a block collection, indented as it is."""
    place = _line_end(text, _end(text, *last))
    # libyaml says where the first key or dash is; before it there may be a dash of the list around.
    column = (
        node.value[0][0].start_mark.column if isinstance(node, yaml.MappingNode) else node.start_mark.column
    )
    lines = textwrap.indent(lines, " " * column, lambda line: bool(line.strip()))
    return _Edit(place, place, lines if text[:place].endswith("\n") or not place else "\n" + lines)


def _replacement(text: str, node: yaml.Node, new: Any, in_flow: bool) -> _Edit:
    start, end = node.start_mark.index, node.end_mark.index
    if isinstance(node, yaml.ScalarNode):
        if node.style in ("|", ">") or "\n" in text[start:end] or "\r" in text[start:end]:
            raise _TooHard
    elif isinstance(node, yaml.CollectionNode) and not node.flow_style:
        raise _TooHard
    if isinstance(new, dict | list) and new and not in_flow:
        raise _TooHard
    style = node.style if isinstance(node, yaml.ScalarNode) else None
    return _Edit(start, end, (" " if start == end else "") + _inline(new, style, in_flow))


def _inline(value: Any, style: str | None, in_flow: bool) -> str:
    """A value within a line; JSON is YAML's flow style."""
    if isinstance(value, str):
        if style == "'" and value.isprintable():
            return "'" + value.replace("'", "''") + "'"
        if style != '"' and means_string(value) and not (in_flow and set(value) & set(",[]{}")):
            return value
    return json.dumps(value, ensure_ascii=False)


def _end(text: str, key: yaml.Node, value: yaml.Node) -> int:
    """Where what is written of an entry ends; libyaml's own end of a block is where the next token starts."""
    if isinstance(value, yaml.CollectionNode) and not value.flow_style and value.value:
        last = value.value[-1]
        return _end(text, *last) if isinstance(value, yaml.MappingNode) else _end(text, last, last)
    end = max(int(key.end_mark.index) if key is not value else 0, int(value.end_mark.index))
    if isinstance(value, yaml.ScalarNode) and value.style in ("|", ">"):
        end = len(text[:end].rstrip())
    return end


def _line_start(text: str, index: int) -> int:
    start = text.rfind("\n", 0, index) + 1
    if text[start:index].strip(" "):  # the entry follows a dash or another entry
        raise _TooHard
    return start


def _line_end(text: str, index: int) -> int:
    """The start of the line after `index`; between there may only be a comment."""
    end = text.find("\n", index) + 1 or len(text)
    rest = text[index:end].strip(" :\r\n")
    if rest and not rest.startswith("#"):
        raise _TooHard
    return end
