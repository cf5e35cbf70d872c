"""Text into documents and back to places: where each YAML or JSON document of a file starts, what it holds.

Reading never gives up on a whole file: a document that cannot be parsed carries its error, the others their data.
Values are read as Kubernetes reads them: YAML 1.1 without dates and base-60 numbers, no key twice.
"""

import json
import re
from collections.abc import Hashable, Iterator, Sequence
from typing import Any, NamedTuple

import yaml

# Far more than any real object needs; aliases in YAML can make a small file mean a very large tree.
_MAX_VALUES = 500_000
_MAX_DEPTH = 100

# A line that starts a document wherever it stands (YAML 1.2.2, 9.1.2: c-forbidden in any other role).
_MARKER = re.compile(r"^---(?=[ \t\r\n]|$)", re.MULTILINE)


class Document(NamedTuple):
    """One document of a file: `text[start:end]`, from its marker up to the next document's.

    `data` is what it holds (None if nothing, or if `error` is set); `end_of_body` is where an explicit end marker
    (`...`) stands, else `end`; `line` counts from 1 and is where the content starts, or where the error is.
    """

    start: int
    end: int
    end_of_body: int
    line: int
    data: Any = None
    error: str = ""
    remedy: str = ""


class _Loader(yaml.CSafeLoader):
    """YAML as the Kubernetes tools read it; a safe loader: plain data only."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        seen = set[tuple[str, str]]()
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode):
                if key.tag != "tag:yaml.org,2002:merge":
                    # JSON has string keys only; left alone, `1` and `yes` would be one key to Python.
                    key.tag = "tag:yaml.org,2002:str"
                if (key.tag, key.value) in seen:
                    raise yaml.constructor.ConstructorError(
                        None, None, f"the key {key.value!r} is there twice", key.start_mark
                    )
                seen.add((key.tag, key.value))
        return super().construct_mapping(node, deep)


def _resolvers() -> dict[str, list[tuple[str, re.Pattern[str]]]]:
    """PyYAML's, without timestamps (objects keep them as strings) and without 1:30 meaning ninety."""
    ours: dict[str, list[tuple[str, re.Pattern[str]]]] = {}
    numbers = {
        "tag:yaml.org,2002:int": re.compile(r"^[-+]?(?:0b[01_]+|0x[0-9a-fA-F_]+|0[0-7_]*|[1-9][0-9_]*)$"),
        "tag:yaml.org,2002:float": re.compile(
            r"^[-+]?(?:(?:[0-9][0-9_]*)?\.[0-9][0-9_]*(?:[eE][-+]?[0-9]+)?|[0-9][0-9_]*\.(?:[eE][-+]?[0-9]+)?"
            r"|[0-9]+[eE][-+]?[0-9]+|\.(?:inf|Inf|INF))$|^\.(?:nan|NaN|NAN)$"
        ),
    }
    for letter, entries in yaml.SafeLoader.yaml_implicit_resolvers.items():
        ours[letter] = [
            (tag, numbers.get(tag, pattern))
            for tag, pattern in entries
            if tag != "tag:yaml.org,2002:timestamp"
        ]
    return ours


_Loader.yaml_implicit_resolvers = _resolvers()


class _Dumper(yaml.SafeDumper):
    """Quotes what either this reader or PyYAML's own would not take for a text."""


_Dumper.yaml_implicit_resolvers = {
    letter: entries + _Loader.yaml_implicit_resolvers[letter]
    for letter, entries in yaml.SafeLoader.yaml_implicit_resolvers.items()
}


def means_string(text: str) -> bool:
    """Whether `text`, written without quotes, is read as this very string."""
    try:
        return bool(yaml.load(text, Loader=_Loader) == text)  # noqa: S506
    except yaml.YAMLError:
        return False


def dump(data: Any) -> str:
    """Plain data as the text of one YAML document, without marker, keys in their order."""
    return yaml.dump(data, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=4096)


def parse_yaml(text: str) -> list[Document]:
    """The documents of a YAML text, in order, those without content too. `text` has no byte order mark."""
    return [_load(text, piece) for piece in _split(text)]


def parse_json(text: str) -> list[Document]:
    """The documents of a JSON text: usually one, several if written one after the other."""
    documents = []
    decoder = json.JSONDecoder(object_pairs_hook=_unique)
    position = 0
    while (start := _skip_space(text, position)) < len(text):
        line = text.count("\n", 0, start) + 1
        try:
            data, position = decoder.raw_decode(text, start)
            data, error = plain(data), ""
        except json.JSONDecodeError as bad:
            line, error, data, position = bad.lineno, f"not valid JSON: {bad.msg}", None, len(text)
        except (ValueError, RecursionError) as bad:
            error, data, position = f"not valid JSON: {bad}", None, len(text)
        remedy = "correct the syntax there" if error else ""
        documents.append(Document(start, position, position, line, data, error, remedy))
    return documents


def compose(text: str) -> yaml.Node | None:
    """The nodes of one YAML document, with their places. Raises yaml.YAMLError."""
    return yaml.compose(text, Loader=_Loader)


def parse(text: str, is_json: bool) -> list[Document]:
    """The documents of a file's text."""
    return parse_json(text) if is_json else parse_yaml(text)


def line_of(text: str, document: Document, path: Sequence[str | int]) -> int:
    """The line (from 1) of the value at `path` in a YAML document, or of the deepest parent that exists."""
    try:
        node = compose(text[document.start : document.end])
    except yaml.YAMLError:
        return document.line
    line = node.start_mark.line if node is not None else 0
    for step in path:
        if isinstance(node, yaml.MappingNode):
            found = next(((key, value) for key, value in node.value if key.value == str(step)), None)
            if found is None:
                break
            line, node = found[0].start_mark.line, found[1]
        elif isinstance(node, yaml.SequenceNode) and isinstance(step, int) and step < len(node.value):
            node = node.value[step]
            line = node.start_mark.line
        else:
            break
    return text.count("\n", 0, document.start) + line + 1


def plain(value: Any) -> Any:
    """A copy of parsed data as JSON could hold it: keys are strings, shared parts are separate.

    Raises ValueError if it is larger or deeper than any object is (aliases can make it so).
    """
    return _plain(value, [_MAX_VALUES], _MAX_DEPTH)


def _plain(value: Any, budget: list[int], depth: int) -> Any:
    budget[0] -= 1
    if budget[0] < 0 or depth < 0:
        raise ValueError("the document is too large or too deep once its aliases are followed")
    if isinstance(value, dict):
        return {str(key): _plain(item, budget, depth - 1) for key, item in value.items()}
    if isinstance(value, list):
        return [_plain(item, budget, depth - 1) for item in value]
    return value


class _Piece(NamedTuple):
    start: int
    end: int
    end_of_body: int
    error: yaml.YAMLError | None = None
    base: int = 0  # where the text starts that the error's position counts from


def _split(text: str) -> Iterator[_Piece]:
    """Where the documents are, by the parser's own token positions; past an error, by the next marker."""
    base = 0
    while base < len(text):
        starts: list[int] = []
        bodies: list[int] = []  # -1: no end marker
        error: yaml.YAMLError | None = None
        ended = base
        try:
            for event in yaml.parse(text[base:], Loader=_Loader):
                if isinstance(event, yaml.DocumentStartEvent):
                    starts.append(_line_start(text, base + _index(event.start_mark)))
                elif isinstance(event, yaml.DocumentEndEvent):
                    ended = base + _index(event.end_mark)
                    bodies.append(base + _index(event.start_mark) if event.explicit else -1)
        except yaml.YAMLError as bad:
            error = bad
            if len(starts) == len(bodies):  # between two documents
                starts.append(ended)
        following = len(text)
        if error is not None:
            mark = getattr(error, "problem_mark", None)
            if mark is not None:
                place = max(_line_start(text, base + mark.index), starts[-1] + 1)
                found = _MARKER.search(text, place)
                following = found.start() if found else len(text)
        ends = [*starts[1:], following] if starts else []
        for index, (start, end) in enumerate(zip(starts, ends, strict=True)):
            if index < len(bodies):
                yield _Piece(start, end, bodies[index] if bodies[index] >= 0 else end)
            else:
                yield _Piece(start, end, end, error, base)
        base = following


def _load(text: str, piece: _Piece) -> Document:
    error, base = piece.error, piece.base
    body = text[piece.start : piece.end]
    data: Any = None
    if error is None:
        base = piece.start
        try:
            data = plain(yaml.load(body, Loader=_Loader))  # noqa: S506
        except yaml.YAMLError as bad:
            error = bad
        except (ValueError, RecursionError) as bad:
            error = yaml.YAMLError(str(bad) or "nested too deeply")
    line = text.count("\n", 0, piece.start) + 1
    if _MARKER.match(body) and body.partition("\n")[0].strip() == "---":
        line += 1
    if error is None:
        return Document(piece.start, piece.end, piece.end_of_body, line, data)
    mark = getattr(error, "problem_mark", None)
    if mark is not None:
        line = text.count("\n", 0, base) + mark.line + 1
    problem = getattr(error, "problem", None) or str(error)
    remedy = "correct the syntax there"
    if mark is not None and text[base + mark.index : base + mark.index + 1] == "\t":
        remedy = "indent with spaces instead of tabs"
    elif "is there twice" in problem:
        remedy = "keep one of them"
    return Document(
        piece.start, piece.end, piece.end_of_body, line, None, f"not valid YAML: {problem}", remedy
    )


def _index(mark: Any) -> int:
    # PyYAML's types allow a missing mark; documents always have theirs.
    return int(mark.index)


def _line_start(text: str, index: int) -> int:
    start = text.rfind("\n", 0, index) + 1
    return start if not text[start:index].strip(" ") else index


def _skip_space(text: str, position: int) -> int:
    while position < len(text) and text[position] in " \t\r\n":
        position += 1
    return position


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        keys = [key for key, _ in pairs]
        twice = next(key for key in keys if keys.count(key) > 1)
        raise ValueError(f"the key {twice!r} is there twice")
    return found
