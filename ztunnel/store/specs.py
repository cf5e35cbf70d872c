"""Reading plain data field by field, where what is wrong with one field must not hide the others.

Used for the kinds that restrict traffic: a field that cannot be understood is reported and known to be missing, so
that whoever acts on the object can restrict more instead of less.
"""

import difflib
import json
from collections.abc import Callable, Collection
from ipaddress import IPv4Network, IPv6Network, ip_address, ip_network
from typing import Any, NamedTuple, TypeVar

from ztunnel.store.faults import Fault, Path
from ztunnel.store.names import label_key_fault, label_value_fault

Network = IPv4Network | IPv6Network
T = TypeVar("T")


class NotUnderstood(Exception):
    """A value that means nothing; `message` says what it is, `remedy` what would be right."""

    def __init__(self, message: str, remedy: str) -> None:
        super().__init__(message)
        self.message = message
        self.remedy = remedy


class Reader:
    """Collects what is wrong. `consequence` is what holds until the fault is repaired, told with each remedy."""

    def __init__(self, consequence: str = "") -> None:
        self.faults: list[Fault] = []
        self.consequence = consequence

    @property
    def failed(self) -> bool:
        """Whether an error was found (warnings do not count)."""
        return any(fault.severity == "error" for fault in self.faults)

    def error(self, path: Path, message: str, remedy: str) -> None:
        """Note that what is at `path` does not count."""
        tail = f"; {self.consequence}" if self.consequence else ""
        self.faults.append(Fault(path, message, remedy + tail))

    def warn(self, path: Path, message: str, remedy: str) -> None:
        """Note something that counts, but perhaps not as people expect."""
        self.faults.append(Fault(path, message, remedy, "warning"))

    def mapping(self, value: object, path: Path, known: Collection[str]) -> dict[str, Any] | None:
        """The mapping at `path`, whose unknown fields are reported; None if it is something else."""
        if not isinstance(value, dict):
            self.error(path, f"expected a mapping, got {show(value)}", "give 'key: value' lines below it")
            return None
        for field in value:
            if field not in known:
                close = difflib.get_close_matches(str(field), known, 1, cutoff=0.6)
                remedy = f'did you mean "{close[0]}"?' if close else f"known fields are {', '.join(known)}"
                self.error((*path, field), "unknown field", remedy)
        return value

    def items(self, value: object, path: Path) -> list[Any] | None:
        """The list at `path`, which must not be empty; None if there is none such."""
        if not isinstance(value, list):
            self.error(path, f"expected a list, got {show(value)}", "give a list: lines that begin with '- '")
            return None
        if not value:
            self.error(path, "is empty", "list at least one, or remove the field")
            return None
        return value

    def values(self, value: object, path: Path, understand: Callable[[str], T]) -> tuple[T, ...]:
        """The texts of the list at `path`, each as `understand` takes it (it may raise NotUnderstood).

        Empty if anything is wrong with any of them: of a list of which a part is unknown nothing can be relied on.
        """
        found: list[T] = []
        items = self.items(value, path)
        for index, item in enumerate(items or ()):
            try:
                found.append(understand(text(item)))
            except NotUnderstood as error:
                self.error((*path, index), error.message, error.remedy)
        return tuple(found) if items is not None and len(found) == len(items) else ()

    def selector(self, value: object, path: Path) -> dict[str, str] | None:
        """The labels of a workload selector (istio.type.v1beta1.WorkloadSelector); None if it is not understood."""
        before = len(self.faults)
        fields = self.mapping(value, path, ("matchLabels",))
        labels = fields.get("matchLabels", {}) if fields is not None else {}
        if not isinstance(labels, dict):
            self.error(
                (*path, "matchLabels"), f"expected a mapping, got {show(labels)}", "give 'label: value' lines"
            )
            return None
        for key, label in labels.items():
            where = (*path, "matchLabels", key)
            if remedy := label_key_fault(str(key)):
                self.error(where, "not a valid label key", remedy)
            elif not isinstance(label, str):
                self.error(where, f"expected a text, got {show(label)}", quoted(label))
            elif remedy := label_value_fault(label):
                self.error(where, f"{show(label)} is not a valid label value", remedy)
        return labels if len(self.faults) == before else None


class Choice(NamedTuple):
    """Words that a field may have, for messages."""

    words: tuple[str, ...]

    def check(self, reader: Reader, value: object, path: Path) -> str | None:
        """The value if it is one of the words, else None and a fault."""
        if isinstance(value, str) and value in self.words:
            return value
        reader.error(path, f"{show(value)} is not possible", f"use one of {', '.join(self.words)}")
        return None


def show(value: object) -> str:
    """A value as a message shows it, shortened."""
    shown = json.dumps(value, ensure_ascii=False, default=str)
    return shown if len(shown) <= 60 else shown[:57] + "..."


def quoted(value: object) -> str:
    """The remedy for a value that should have been a text."""
    if isinstance(value, bool):
        return f'put it in quotes: "{str(value).lower()}"'
    return f'put it in quotes: "{value}"' if isinstance(value, int | float) else "give a text"


def text(value: object) -> str:
    """A text that is not empty. Raises NotUnderstood."""
    if not isinstance(value, str):
        raise NotUnderstood(f"expected a text, got {show(value)}", quoted(value))
    if not value.strip():
        raise NotUnderstood("is empty", "give a value, or remove the item")
    return value


def network(value: str) -> Network:
    """An address or CIDR as a network; bits of the host are ignored. Raises NotUnderstood."""
    remedy = "write it as 10.0.0.1, 10.0.0.0/8 or fd00::/8"
    if "%" in value:
        raise NotUnderstood(f"{show(value)} has a zone", remedy)
    address, slash, length = value.partition("/")
    try:
        parsed = ip_address(address)
        if slash and not (length.isascii() and length.isdigit()):  # 10.0.0.0/255.0.0.0 is not a CIDR here
            raise NotUnderstood(f"{show(value)} is not an IP address or CIDR", remedy)
        found = ip_network(f"{parsed}/{length}" if slash else parsed, strict=False)
    except ValueError:
        raise NotUnderstood(f"{show(value)} is not an IP address or CIDR", remedy) from None
    if isinstance(found, IPv6Network) and found.prefixlen >= 96:
        # Connections are told with their IPv4 address, however they were accepted.
        mapped = found.network_address.ipv4_mapped
        if mapped is not None:
            return IPv4Network((int(mapped), found.prefixlen - 96))
    return found


def port(value: str) -> int:
    """A port number. Raises NotUnderstood."""
    if not (value.isascii() and value.isdigit() and 1 <= int(value) <= 65535):
        raise NotUnderstood(f"{show(value)} is not a port", "give a number from 1 to 65535")
    return int(value)


def pattern(value: str) -> str:
    """A text with at most one star, at its beginning or end (or only that). Raises NotUnderstood."""
    if "*" in (value[1:] if value.startswith("*") else value[:-1]):
        raise NotUnderstood(
            f"{show(value)} has a * that is neither only at its beginning nor only at its end",
            "match a beginning (text*), an end (*text), anything (*), or the whole text",
        )
    return value
