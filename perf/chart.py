"""A run as a picture (SVG): bars of the proxies side by side, figure by figure. The same run gives the same bytes."""

from html import escape
from typing import NamedTuple

from perf.cases import (
    CONNECTIONS,
    GBITS,
    IDLE,
    MEMORY_CASE,
    OUTSIDE,
    P50,
    P99,
    PSS,
    RATE,
    Case,
    Measure,
    beside_bulk,
    bulk,
    idle_connections,
    new_connections,
    requests,
)
from perf.results import Results
from perf.sides import DIRECT, ENVOY, MESH


class Figure(NamedTuple):
    """One row of bars: what is written beside them, and which numbers they show."""

    text: str
    case: Case
    measure: Measure


MORE = (
    Figure("requests/s, 1 connection", requests(1), RATE),
    Figure("requests/s, 16 connections", requests(16), RATE),
    Figure("requests/s, 64 connections", requests(64), RATE),
    Figure("requests/s, 256 connections", requests(256), RATE),
    Figure("requests/s, 16, 10,000 idle ones", idle_connections(IDLE), RATE),
    Figure("new connections/s", new_connections(16), CONNECTIONS),
    Figure("Gbit/s, 1 stream up", bulk(1, upload=True), GBITS),
    Figure("Gbit/s, 1 stream down", bulk(1, upload=False), GBITS),
    Figure("Gbit/s, 4 streams up", bulk(4, upload=True), GBITS),
    Figure("Gbit/s, 4 streams down", bulk(4, upload=False), GBITS),
    Figure("Gbit/s, out of the mesh", bulk(1, upload=True, target=OUTSIDE), GBITS),
)
LESS = (
    Figure("p50 us, 1 connection", requests(1), P50),
    Figure("p99 us, 64 connections", requests(64), P99),
    Figure("p99 us, 4 beside a bulk stream", beside_bulk(4), P99),
    Figure("MB, idle, 20 pods (one Envoy)", MEMORY_CASE, PSS),
    Figure("MB, 10,000 connections", idle_connections(IDLE), PSS),
)

WIDTH = 960
LEFT, RIGHT = 270, 690  # where bars begin, and where the longest of a row ends
BAR, GAP = 13, 12  # height of a bar, and what is between rows
VALUE = 8  # from a bar's end to its number

STYLE = """
    .page { fill: #ffffff; stroke: #d0d7de; }
    text { fill: #1f2328; }
    .small { font-size: 12px; fill: #57606a; }
    .strong { font-weight: 600; }
    .mesh { fill: #1a7f37; } .envoy { fill: #8c959f; }
    .peer0 { fill: #0969da; } .peer1 { fill: #9a6700; } .peer2 { fill: #8250df; }
    @media (prefers-color-scheme: dark) {
      .page { fill: #0d1117; stroke: #30363d; }
      text { fill: #e6edf3; }
      .small { fill: #9da7b3; }
      .mesh { fill: #3fb950; } .envoy { fill: #6e7681; }
      .peer0 { fill: #58a6ff; } .peer1 { fill: #d29922; } .peer2 { fill: #a371f7; }
    }"""


def draw(results: Results) -> str:
    """The picture of a run; figures that it has not measured are left out."""
    sides = [MESH, *(side for side in results.sides if side not in (DIRECT, MESH))]
    colours = {MESH: "mesh", ENVOY: "envoy"}
    colours |= {side: f"peer{number % 3}" for number, side in enumerate(s for s in sides if s not in colours)}
    body: list[str] = []
    y = 62
    x = 24
    for side in sides:
        body.append(f'<rect class="{colours[side]}" x="{x}" y="{y - 11}" width="13" height="13" rx="2"/>')
        label = {MESH: "this mesh", ENVOY: "a pair of Envoys"}.get(side, side)
        body.append(_text(x + 20, y, label))
        x += 46 + 8 * len(label)
    y += 24
    for title, figures in (("more is better", MORE), ("less is better", LESS)):
        rows = [figure for figure in figures if results.series(MESH, figure.case.name, figure.measure.name)]
        if rows:
            body.append(_text(24, y + 4, title, "strong"))
            body.append(_text(WIDTH - 24, y + 4, "direct, no proxy", "small", "end"))
            y += 18
        for figure in rows:
            body += _row(results, figure, sides, colours, y)
            y += len(sides) * (BAR + 1) + GAP
        y += 16 if rows else 0
    machine = results.machine
    shape = f"{machine['processor']}, {machine['cores']} cores, Linux {machine['kernel']}, Python {machine['python']}"
    body.append(
        _text(
            24, y, "Bars: what it is to Envoy, the median of the rounds' ratios. Numbers: medians.", "small"
        )
    )
    caption = (
        f"Two pods on two nodes of one machine, one worker each (idle: two); {results.time[:10]}; {shape}"
    )
    body.append(_text(24, y + 18, caption, "small"))
    return _page(y + 36, "\n".join(f"  {line}" for line in body))


def _row(results: Results, figure: Figure, sides: list[str], colours: dict[str, str], y: int) -> list[str]:
    """The bars of one figure: what each side is to Envoy. Direct is only a number: its bar would be too long."""
    name, measure = figure.case.name, figure.measure.name
    found = {side: series.median for side in sides if (series := results.series(side, name, measure))}
    ratios = {side: results.ratio(side, ENVOY, name, measure) for side in found}
    lengths = {side: found[side] if None in ratios.values() else ratios[side] or 0.0 for side in found}
    longest = max(lengths.values()) or 1.0
    middle = y + len(sides) * (BAR + 1) // 2 + 4
    lines = [_text(LEFT - 12, middle, figure.text, "", "end")]
    for number, side in enumerate(sides):
        if side not in found:
            continue
        top = y + number * (BAR + 1)
        width = max(1, round((RIGHT - LEFT) * lengths[side] / longest))
        lines.append(
            f'<rect class="{colours[side]}" x="{LEFT}" y="{top}" width="{width}" height="{BAR}" rx="2"/>'
        )
        ratio = ratios[side] if side != ENVOY else None
        value = _number(found[side]) + ("" if ratio is None else f" ({ratio:.2f}x Envoy)")
        lines.append(_text(LEFT + width + VALUE, top + BAR - 2, value, "small"))
    direct = results.series(DIRECT, name, measure)
    if direct is not None:
        lines.append(_text(WIDTH - 24, middle, _number(direct.median), "small", "end"))
    return lines


def _number(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.1f}"


def _text(x: int, y: int, words: str, style: str = "", anchor: str = "") -> str:
    attributes = f' class="{style}"' if style else ""
    attributes += f' text-anchor="{anchor}"' if anchor else ""
    return f'<text x="{x}" y="{y}"{attributes}>{escape(words)}</text>'


def _page(height: int, body: str) -> str:
    return f"""<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}" role="img" \
aria-labelledby="title desc" font-family="system-ui, -apple-system, 'Segoe UI', Helvetica, Arial, sans-serif" \
font-size="14">
  <title id="title">What the mesh costs, beside a pair of Envoys</title>
  <desc id="desc">Bars of requests, connections and bytes a second, latencies and memory, of this mesh and of a pair \
of Envoys between the same pods, measured in one run.</desc>
  <style>{STYLE}
  </style>
  <rect class="page" x="1" y="1" width="{WIDTH - 2}" height="{height - 2}" rx="10"/>
  <text x="24" y="34" class="strong" font-size="18">What the mesh costs, beside a pair of Envoys</text>
{body}
</svg>
"""
