"""The runtime's network configuration as text: our entry put in and taken out, all else left byte for byte. Pure.

A `.conflist` (CNI specification, section 1) is an object with a list `plugins`; what other programs and people wrote
into it, and how, is theirs. Only the list's last comma and the entry itself change.
"""

import json
from collections.abc import Iterable, Mapping
from pathlib import PurePath
from typing import Any, Final, NamedTuple

PLUGIN: Final = "ambient-cni"
"""The entry's `type`, which is the plugin's file name."""
LIST_ENDING: Final = ".conflist"
SINGLE_ENDINGS: Final = (".conf", ".json")
"""What runtimes take for one plugin's configuration without a list (libcni, ConfFiles)."""
KEPT_ENDING: Final = ".before-ambient"
"""Where such a file is kept while our list stands in its place: runtimes read the first file by name."""

_decoder = json.JSONDecoder()
_BLANK = " \t\r\n"


class ConflistError(ValueError):
    """A file that is no network configuration; the message says what is wrong and what would be right."""


class _Element(NamedTuple):
    """One entry of the list: its place in the text, what it says, and the white space before it."""

    start: int
    end: int
    value: Any
    lead: str


def primary(names: Iterable[str]) -> str | None:
    """The file that the runtime uses: the first by name of those with an ending that it reads, or None."""
    known = [
        name for name in names if name.endswith((LIST_ENDING, *SINGLE_ENDINGS)) and not name.startswith(".")
    ]
    return min(known, default=None)


def is_list(name: str) -> bool:
    """Whether the file of this name has a list of plugins."""
    return name.endswith(LIST_ENDING)


def list_name(name: str) -> str:
    """The name of the list that takes the place of a single plugin's configuration `name`."""
    return str(PurePath(name).with_suffix(LIST_ENDING))


def entry(*, socket: str, exempt: Iterable[str]) -> dict[str, Any]:
    """Our entry: the agent's socket, and the namespaces whose pods start without asking it."""
    return {"type": PLUGIN, "socket": socket, "exempt_namespaces": sorted(set(exempt))}


def inserted(text: str, ours: Mapping[str, Any]) -> str:
    """The list with our entry as it shall be: at the end if it was not there, else where it was.

    The same text where nothing is to be changed. Raises ConflistError.
    """
    elements = _plugins(text)
    if not elements:
        raise ConflistError("its list plugins is empty; the network's own plugin must be in it")
    present = [element for element in elements if _is_ours(element)]
    if len(present) == 1 and present[0].value == ours and elements[0] is not present[0]:
        return text
    if present:
        return inserted(removed(text), ours)
    last = elements[-1]
    return f"{text[: last.end]},{last.lead}{json.dumps(ours)}{text[last.end :]}"


def removed(text: str) -> str:
    """The list without our entry. Raises ConflistError; not to be there is no error."""
    elements = _plugins(text)
    for index in reversed(range(len(elements))):
        element = elements[index]
        if not _is_ours(element):
            continue
        if index > 0:
            text = text[: elements[index - 1].end] + text[element.end :]
        elif len(elements) > 1:
            text = text[: element.start] + text[elements[1].start :]
        else:
            raise ConflistError(f"it has no other plugin than {PLUGIN}; restore the network's own file")
        elements = _plugins(text)
    return text


def contains(text: str) -> bool:
    """Whether our entry is in it. Raises ConflistError."""
    return any(_is_ours(element) for element in _plugins(text))


def from_single(text: str, ours: Mapping[str, Any]) -> str:
    """A list of a single plugin's configuration and our entry. Raises ConflistError."""
    single = _object(text)
    if not isinstance(single.get("type"), str):
        remedy = "name the file .conflist" if "plugins" in single else "correct it"
        raise ConflistError(f"it has no type, so the runtime does not know what to run; {remedy}")
    plugin = {key: value for key, value in single.items() if key not in ("cniVersion", "name")}
    whole = {
        "cniVersion": single.get("cniVersion", "0.3.1"),
        "name": single.get("name", "k8s-pod-network"),
        "plugins": [plugin, ours],
    }
    return json.dumps(whole, indent=2) + "\n"


def _is_ours(element: _Element) -> bool:
    return isinstance(element.value, dict) and element.value.get("type") == PLUGIN


def _object(text: str) -> dict[str, Any]:
    try:
        whole = json.loads(text)
    except ValueError as error:
        raise ConflistError(
            f"it is not JSON: {error}; correct it, or let the network's own plugin write it again"
        ) from None
    except RecursionError:
        raise ConflistError("it is nested too deeply") from None
    if not isinstance(whole, dict):
        raise ConflistError("it is no JSON object")
    return whole


def _after_blank(text: str, at: int) -> int:
    while at < len(text) and text[at] in _BLANK:
        at += 1
    return at


def _plugins(text: str) -> list[_Element]:
    """The entries of the list `plugins` (the last, where it is there twice, as readers take it)."""
    whole = _object(text)
    if not isinstance(whole.get("plugins"), list):
        remedy = "name the file .conf" if "type" in whole else "correct it"
        raise ConflistError(f"it has no list plugins; {remedy}")
    found: list[_Element] = []
    # The text is well formed by now, so each step finds what it looks for.
    at = _after_blank(text, text.index("{") + 1)
    while text[at] != "}":
        key, at = _decoder.raw_decode(text, at)
        at = _after_blank(text, _after_blank(text, at) + 1)
        if key == "plugins" and text[at] == "[":
            found = _elements(text, at)
        _, at = _decoder.raw_decode(text, at)
        at = _after_blank(text, at)
        if text[at] == ",":
            at = _after_blank(text, at + 1)
    return found


def _elements(text: str, at: int) -> list[_Element]:
    elements: list[_Element] = []
    before = at + 1
    at = _after_blank(text, before)
    while text[at] != "]":
        value, end = _decoder.raw_decode(text, at)
        elements.append(_Element(at, end, value, text[before:at]))
        at = _after_blank(text, end)
        if text[at] == ",":
            before = at + 1
            at = _after_blank(text, before)
    return elements
