"""What is to be installed: a profile, then IstioOperator files, then --set, later ones over earlier ones."""

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

import yaml

from ztunnel import __version__, durations
from ztunnel.cli.errors import UserError
from ztunnel.cli.install import assets, fields
from ztunnel.cli.install.fields import Warned, merged
from ztunnel.identity.ca import DEFAULT_LIFETIMES, Lifetimes
from ztunnel.identity.errors import SpiffeIdError
from ztunnel.identity.spiffe import check_trust_domain

NAMESPACE: Final = "istio-system"
DEFAULT_REVISION: Final = "default"
DEFAULT_PROFILE: Final = "ambient"
DEFAULT_HUB: Final = "ambient-mesh"
_IMAGE: Final = "ambient"
_API_VERSION: Final = "install.istio.io/v1alpha1"


@dataclass(frozen=True)
class Settings:
    """An installation's settings. `spec` is what they were made of: the profile and all that was given."""

    spec: dict[str, Any]
    values: dict[fields.Path, Any]
    warnings: list[Warned] = field(default_factory=list)

    def get(self, path: str, default: Any = None) -> Any:
        """The value of a field by its name; a default where it is not set."""
        return self.values.get(tuple(path.split(".")), default)

    @property
    def profile(self) -> str:
        return str(self.get("profile", DEFAULT_PROFILE))

    @property
    def revision(self) -> str:
        return str(self.get("revision", DEFAULT_REVISION))

    @property
    def node_revision(self) -> str:
        """The revision that the node proxies follow."""
        return str(self.get("values.ztunnel.revision", self.revision))

    @property
    def mesh_config(self) -> dict[str, Any]:
        """The MeshConfig as it is to be kept."""
        given = self.spec.get("meshConfig")
        return given if isinstance(given, dict) else {}

    def enabled(self, component: str) -> bool:
        """Whether base, pilot, cni or ztunnel is installed."""
        return bool(self.get(f"components.{component}.enabled", True))

    def image(self, component: str) -> str:
        """The image of pilot, cni or ztunnel."""
        name = str(self.get(f"values.{component}.image", _IMAGE))
        if "/" in name:
            return name
        hub = str(self.get(f"values.{component}.hub", self.get("hub", DEFAULT_HUB))).rstrip("/")
        return f"{hub}/{name}:{self.get(f'values.{component}.tag', self.get('tag', __version__))}"


def read(
    files: Sequence[str] = (),
    sets: Sequence[str] = (),
    *,
    profile: str | None = None,
    revision: str | None = None,
    before: dict[str, Any] | None = None,
) -> Settings:
    """The settings. `before` is the spec of an earlier installation that is to be changed.

    Raises UserError for what cannot be read, a profile that does not exist, and values that cannot be.
    """
    given: dict[str, Any] = {}
    for name in files:
        for spec in _file(name):
            given = merged(given, spec)
    for text in sets:
        given = _set(given, text)
    for key, value in (("profile", profile), ("revision", revision)):
        if value is not None:
            given = {**given, key: value}
    given = fields.normalized(given)
    if before is None or "profile" in given:
        known = assets.profiles()
        name = str(given.get("profile") or DEFAULT_PROFILE)
        if name not in known:
            raise UserError(f"there is no profile {name!r}", f"choose one of: {', '.join(known)}")
        before = merged(before or {}, merged(known[name], {"profile": name}))
    return of_spec(merged(before, given))


def of_spec(spec: dict[str, Any]) -> Settings:
    """The settings that a whole spec makes. Raises UserError naming every value that cannot be."""
    values, warnings, errors = fields.read(spec)
    errors += _together(values)
    if errors:
        first, *others = [f"spec.{error}" for error in errors]
        raise UserError(first, detail="\n".join(f"error: {other}" for other in others))
    return Settings(spec, values, [Warned(f"spec.{each.field}", each.message) for each in warnings])


def _together(values: dict[fields.Path, Any]) -> list[Warned]:
    """What is wrong with values that are possible by themselves."""
    wrong = []
    least, most = (values.get(("values", "pilot", f"autoscale{end}")) for end in ("Min", "Max"))
    if least is not None and most is not None and least > most:
        wrong.append(Warned("values.pilot.autoscaleMin", f"{least} is more than autoscaleMax, {most}"))
    variables = values.get(("values", "pilot", "env"), {})
    try:
        Lifetimes(
            *(
                int(durations.parse(variables[name])) if name in variables else default
                for name, default in (
                    ("DEFAULT_WORKLOAD_CERT_TTL", DEFAULT_LIFETIMES.default),
                    ("MAX_WORKLOAD_CERT_TTL", DEFAULT_LIFETIMES.most),
                )
            )
        )
    except ValueError as error:
        names = ", ".join(name for name in variables if name.endswith("_WORKLOAD_CERT_TTL"))
        wrong.append(Warned(f"values.pilot.env.{names}", str(error)))
    domain = values.get(("meshConfig", "trustDomain"))
    if domain is not None:
        try:
            check_trust_domain(domain)
        except SpiffeIdError as error:
            wrong.append(Warned("meshConfig.trustDomain", str(error)))
    return wrong


def _file(name: str) -> Iterable[dict[str, Any]]:
    """The specs of the IstioOperators in a file ("-": standard input). Raises UserError."""
    import sys

    try:
        text = sys.stdin.read() if name == "-" else Path(name).read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(f"{name}: is not UTF-8 text", "save it as UTF-8") from error
    except OSError as error:
        raise UserError(
            f"{name}: {error.strerror}", "give a file with IstioOperators, or - for standard input"
        ) from error
    try:
        found = [document for document in yaml.safe_load_all(text) if document is not None]
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        place = f":{mark.line + 1}" if mark is not None else ""
        raise UserError(
            f"{name}{place}: is not YAML ({getattr(error, 'problem', 'not readable')})", "mend it"
        ) from error
    if not found:
        raise UserError(f"{name}: nothing is in it", f"give an IstioOperator ({_API_VERSION})")
    for number, document in enumerate(found):
        place = f"{name}, document {number + 1}" if len(found) > 1 else name
        if not isinstance(document, dict) or document.get("kind") != "IstioOperator":
            kind = document.get("kind") if isinstance(document, dict) else None
            what = f"a {kind}" if kind else "no object"
            raise UserError(
                f"{place}: is {what}, not an IstioOperator",
                "give settings here, and objects to: ambient apply -f FILE",
            )
        if document.get("apiVersion") != _API_VERSION:
            raise UserError(
                f"{place}: IstioOperator: apiVersion {document.get('apiVersion')!r} is not known",
                f"use {_API_VERSION}",
            )
        spec = document.get("spec") or {}
        if not isinstance(spec, dict):
            raise UserError(
                f"{place}: IstioOperator: spec: expected a mapping", "give 'key: value' lines below it"
            )
        yield fields.normalized(spec)


_STEP = re.compile(r"((?:[^.\[\]\\]|\\.)+)((?:\[\d+\])*)(\.|$)")


def _set(spec: dict[str, Any], text: str) -> dict[str, Any]:
    """The spec with `PATH=VALUE`. A dot in a name is written `\\.`, an item of a list `[0]`. Raises UserError."""
    path, equals, value = text.partition("=")
    steps: list[str | int] = []
    position = 0
    while equals and position < len(path):
        match = _STEP.match(path, position)
        if match is None or (match[3] == "." and match.end() == len(path)):
            steps = []
            break
        steps.append(re.sub(r"\\(.)", r"\1", match[1]))
        steps += [int(number) for number in re.findall(r"\d+", match[2])]
        position = match.end()
    if not steps:
        raise UserError(f"--set {text}: is not PATH=VALUE", "write it as: --set values.pilot.env.NAME=value")
    changed: dict[str, Any] = _with(spec, steps, _value(value, text), text)
    return changed


def _with(data: Any, steps: Sequence[str | int], value: Any, text: str) -> Any:
    """A copy of the data with the value at the end of the steps."""
    if not steps:
        return value
    step, *rest = steps
    if isinstance(step, int):
        items = list(data) if isinstance(data, list) else []
        if step > len(items):
            raise UserError(f"--set {text}: the list has no item {step - 1}", f"begin with [{len(items)}]")
        items[step : step + 1] = [_with(items[step] if step < len(items) else None, rest, value, text)]
        return items
    below = data if isinstance(data, dict) else {}
    return {**below, step: _with(below.get(step), rest, value, text)}


def _value(text: str, given: str) -> Any:
    """true, false, null, whole numbers, and lists and mappings in YAML's short form; all else is a text."""
    if (
        text in ("true", "false", "null")
        or re.fullmatch(r"-?(0|[1-9]\d{0,17})", text)
        or text[:1] in ("[", "{", '"')
    ):
        try:
            return yaml.safe_load(text)
        except yaml.YAMLError as error:
            raise UserError(
                f"--set {given}: the value is not YAML", "close what is opened, or quote it"
            ) from error
    return text
