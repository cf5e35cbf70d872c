"""The topology that the metrics show, as text, for Graphviz, or as JSON."""

import json
from collections.abc import Sequence
from typing import Any

from ztunnel.cli.traffic.rows import Row
from ztunnel.cli.traffic.show import percent, rate, size

MOST_LABEL = 60  # characters of a service in a picture


def as_text(edges: Sequence[Row], seconds: float) -> str:
    """A tree: each source, and below it to whom it talks."""
    lines: list[str] = []
    source = None
    for row in edges:
        if row.key[0] != source:
            source = row.key[0]
            lines.append(source)
        lock = (
            "mTLS" if row.mutual_tls == 1 else "plaintext" if row.mutual_tls == 0 else percent(row.mutual_tls)
        )
        through = f" through {row.key[2]}" if row.key[2] else ""
        lines.append(f"  -> {row.key[1]}{through}: {_numbers(row, seconds)}, {lock}")
    return "\n".join(lines)


def _numbers(row: Row, seconds: float) -> str:
    counts = row.counts
    failed = f", {counts.failed:,} failed" if counts.failed else ""
    if seconds:
        return f"{rate(counts.opened / seconds)}{failed}, {row.open} open"
    moved = f"{size(counts.sent)} sent, {size(counts.received)} received"
    return f"{counts.opened:,} connections{failed}, {row.open} open, {moved}"


def as_json(edges: Sequence[Row], seconds: float) -> str:
    """`nodes` by name and `edges` between them."""
    names = sorted({name for row in edges for name in row.key[:2]})
    nodes: list[dict[str, Any]] = []
    for name in names:
        namespace, slash, workload = name.partition("/")
        known = bool(slash) and "://" not in name
        nodes.append(
            {"id": name, "namespace": namespace if known else None, "workload": workload if known else None}
        )
    told = [
        {
            "source": row.key[0],
            "destination": row.key[1],
            "service": row.key[2] or None,
            **row.describe(seconds),
        }
        for row in edges
    ]
    return json.dumps({"seconds": seconds, "nodes": nodes, "edges": told}, indent=2)


def as_dot(edges: Sequence[Row], seconds: float) -> str:
    """A digraph in Graphviz's language: namespaces as boxes, plaintext dashed and red, failures bold."""
    spaces: dict[str, list[str]] = {}
    for name in sorted({name for row in edges for name in row.key[:2]}):
        namespace, slash, _ = name.partition("/")
        spaces.setdefault(namespace if slash and "://" not in name else "", []).append(name)
    lines = ["digraph mesh {", "  rankdir=LR;", '  node [shape=box, style=rounded, fontname="sans-serif"];']
    for number, (namespace, names) in enumerate(sorted(spaces.items())):
        if not namespace:
            lines += [f"  {_quoted(name)} [shape=ellipse];" for name in names]
            continue
        lines += [f"  subgraph cluster_{number} {{", f"    label={_quoted(namespace)};"]
        for name in names:
            lines.append(f"    {_quoted(name)} [label={_quoted(name.partition('/')[2])}];")
        lines.append("  }")
    for row in edges:
        label = row.key[2].split(".")[0][:MOST_LABEL]
        label += ("\n" if label else "") + _numbers(row, seconds).split(", ")[0]
        style = [f"label={_quoted(label)}"]
        if row.mutual_tls is not None and row.mutual_tls < 1:
            style += ["color=red", "style=dashed"]
        if row.counts.failed:
            style += ["penwidth=2", f"tooltip={_quoted(f'{row.counts.failed} failed')}"]
        lines.append(f"  {_quoted(row.key[0])} -> {_quoted(row.key[1])} [{', '.join(style)}];")
    return "\n".join([*lines, "}"])


def _quoted(text: str) -> str:
    escaped = text.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n")
    return f'"{escaped}"'
