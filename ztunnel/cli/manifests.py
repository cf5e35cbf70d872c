"""What the user gives with -f: files, directories and standard input, as decoded objects or errors that name them."""

import os
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import click

from ztunnel.cli.errors import UserError

if TYPE_CHECKING:
    from ztunnel.store.decode import Decoded
    from ztunnel.store.problems import Problem

SUFFIXES = (".yaml", ".yml", ".json")


class Given(NamedTuple):
    """One object of the user's: its source (file or "-"), its data, and what the mesh makes of it."""

    source: str
    data: dict[str, Any]
    decoded: "Decoded"


class Input(NamedTuple):
    """All that was given: the objects that can be acted on, and what is wrong, each with its place."""

    objects: list[Given]
    problems: "list[Problem]"


def read(names: Iterable[str], namespace: str | None, *, strangers: bool = False) -> Input:
    """Read all of `names` (files, directories, "-"), in order.

    `namespace` is for the objects that name none; `strangers`: also objects that only a cluster may know.
    Raises UserError where a file cannot be read or nothing is in it.
    """
    from ztunnel.store.decode import decode
    from ztunnel.store.manifest import read_manifest

    objects: list[Given] = []
    problems: list[Problem] = []
    names = list(names)
    for source, text in _texts(names):
        manifest = read_manifest(text, source, is_json=source.endswith(".json"))
        problems += manifest.problems
        entries = manifest.entries + (manifest.strangers if strangers else [])
        for entry in sorted(entries, key=lambda each: (each.document, each.item or 0)):
            data, decoded = entry.data, entry.decoded
            metadata = data.get("metadata")
            if namespace and isinstance(metadata, dict) and not metadata.get("namespace"):
                key = decoded.key
                if key is not None and key.namespace:
                    data = {**data, "metadata": {**metadata, "namespace": namespace}}
                    decoded = decode(data)
            objects.append(Given(source, data, decoded))
    if not objects and not problems:
        raise UserError(
            f"no objects in {', '.join(names)}", "give YAML or JSON with apiVersion, kind and metadata"
        )
    return Input(objects, problems)


def _texts(names: Iterable[str]) -> Iterator[tuple[str, str]]:
    for name in names:
        if name == "-":
            yield "-", _decode("standard input", sys.stdin.buffer.read())
        elif os.path.isdir(name):
            found = sorted(
                path for path in Path(name).iterdir() if path.suffix in SUFFIXES and path.is_file()
            )
            if not found:
                raise UserError(
                    f"no {', '.join(SUFFIXES)} files in {name}", "give a directory with resources in it"
                )
            for path in found:
                yield str(path), _decode(str(path), path.read_bytes())
        else:
            try:
                yield name, _decode(name, Path(name).read_bytes())
            except FileNotFoundError as error:
                raise UserError(
                    f"{name} does not exist", "give a file, a directory, or - for standard input"
                ) from error


def _decode(name: str, data: bytes) -> str:
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(f"{name} is not UTF-8 text", "save it as UTF-8") from error


def show(problems: "Iterable[Problem]") -> bool:
    """Print problems to standard error, as errors or warnings; whether an error was among them."""
    failed = False
    for problem in problems:
        click.echo(f"{problem.severity}: {problem}", err=True)
        failed |= problem.severity == "error"
    return failed
