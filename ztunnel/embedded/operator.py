"""What an IstioOperator in the mesh's directory sets for the control plane: how long certificates live.

Read at the start, as Istio reads it at the installation. Everything else in it is not acted on.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

from ztunnel import durations
from ztunnel.identity.ca import DEFAULT_TTL, MAX_TTL, Lifetimes
from ztunnel.store.documents import parse

NAMES: Final = {"DEFAULT_WORKLOAD_CERT_TTL": DEFAULT_TTL, "MAX_WORKLOAD_CERT_TTL": MAX_TTL}
SUFFIXES: Final = frozenset({".yaml", ".yml", ".json"})


class OperatorError(ValueError):
    """A setting that cannot be used; the message names file and field."""


def settings(directory: Path) -> dict[str, str]:
    """The settings (environment of the control plane) in `directory`. Raises OperatorError."""
    found: dict[str, str] = {}
    for path in sorted(directory.rglob("*")):
        if path.suffix in SUFFIXES and not path.name.startswith(".") and path.is_file():
            for name, value in _of_file(path):
                if found.setdefault(name, value) != value:
                    raise OperatorError(
                        f"{path}: spec.values.pilot.env.{name}: {value!r}, elsewhere {found[name]!r}; keep one"
                    )
    try:
        Lifetimes(*(int(durations.parse(found.get(name, f"{default}s"))) for name, default in NAMES.items()))
    except ValueError as error:
        raise OperatorError(f"{directory}: IstioOperator: spec.values.pilot.env: {error}") from None
    return found


def _of_file(path: Path) -> Iterator[tuple[str, str]]:
    try:
        text = path.read_text()
    except (OSError, UnicodeDecodeError):
        return  # told by who reads the objects
    if "IstioOperator" not in text:
        return
    for document in parse(text, path.suffix == ".json"):
        data = document.data
        if isinstance(data, dict) and data.get("kind") == "IstioOperator":
            variables = _inner(data, "spec", "values", "pilot", "env")
            for name in NAMES:
                if name in variables:
                    value = str(variables[name])
                    try:
                        durations.parse(value)
                    except ValueError as error:
                        raise OperatorError(f"{path}: spec.values.pilot.env.{name}: {error}") from None
                    yield name, value


def _inner(data: dict[str, Any], *names: str) -> dict[str, Any]:
    for name in names:
        inner = data.get(name)
        if not isinstance(inner, dict):
            return {}
        data = inner
    return data
