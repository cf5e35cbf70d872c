"""Label selectors as people type them: `app=web,version!=v1,tier in (a, b),!legacy` (Kubernetes' own grammar)."""

import re
from typing import TYPE_CHECKING

import click

if TYPE_CHECKING:
    from ztunnel.store.models import LabelSelector

_KEY = r"[A-Za-z0-9]([-A-Za-z0-9_./]*[A-Za-z0-9])?"
_TERM = re.compile(
    rf"\s*(?:(?P<absent>!)\s*(?P<nokey>{_KEY})"
    rf"|(?P<key>{_KEY})\s*(?:(?P<set>in|notin)\s*\((?P<values>[^()]*)\)|(?P<op>==|=|!=)\s*(?P<value>[^\s,=!()]*))?)"
    r"\s*(?:,|$)"
)


def parse(text: str) -> "LabelSelector":
    """The selector that `text` means. Raises click.BadParameter with the place that is not understood."""
    from ztunnel.store.models import LabelSelector, LabelSelectorRequirement

    requirements = []
    position = 0
    while position < len(text):
        term = _TERM.match(text, position)
        if term is None:
            raise click.BadParameter(
                f'"{text[position:]}" is not understood; write e.g. app=web,version!=v1,tier in (a,b)'
            )
        position = term.end()
        if term["absent"]:
            requirement = LabelSelectorRequirement(key=term["nokey"], operator="DoesNotExist")
        elif term["set"]:
            values = [value.strip() for value in term["values"].split(",")]
            operator = "In" if term["set"] == "in" else "NotIn"
            requirement = LabelSelectorRequirement(key=term["key"], operator=operator, values=values)  # type: ignore[arg-type]
        elif term["op"]:
            operator = "NotIn" if term["op"] == "!=" else "In"
            requirement = LabelSelectorRequirement(key=term["key"], operator=operator, values=[term["value"]])  # type: ignore[arg-type]
        else:
            requirement = LabelSelectorRequirement(key=term["key"], operator="Exists")
        requirements.append(requirement)
    return LabelSelector(match_expressions=requirements)
