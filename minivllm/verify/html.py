"""A report as one self-contained page: no script, no font, no picture from elsewhere; plots are inline SVG.

    heat map     layer x component: the part's own error, in multiples of its tolerance
    depth        how the errors add up from layer to layer, beside what each layer does alone
    scatter      log-probabilities of prompt tokens, transformers' against ours

Knows no torch. Called by cli/verifying.py and the notebook. Twin in vLLM: none.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from html import escape

from minivllm.verify.records import Check, PointError, Report

MAX_CELL_WIDTH, CELL_HEIGHT, MAP_WIDTH = 30, 20, 1060
WIDTH, HEIGHT, MARGIN = 620, 260, 48
STYLE = """
:root { color-scheme: light dark; --ink: #1c2330; --soft: #667085; --line: #d9dee7; --page: #ffffff; --card: #f6f8fb;
  --ok: #16794c; --fail: #c02626; --tie: #a15c00; --blue: #2f6fdf; }
@media (prefers-color-scheme: dark) { :root { --ink: #e7ebf2; --soft: #9aa5b8; --line: #333c4d; --page: #12161d;
  --card: #1b212b; --ok: #4cc38a; --fail: #ff6b6b; --tie: #e9a23b; --blue: #7aa7ff; } }
body { font: 15px/1.5 system-ui, sans-serif; color: var(--ink); background: var(--page); max-width: 1080px;
  margin: 2rem auto; padding: 0 1.2rem; }
h1 { font-size: 1.35rem; margin: 0; } h2 { font-size: 1.05rem; margin: 2rem 0 .5rem; }
.verdict { font-size: 1.05rem; font-weight: 600; margin: .3rem 0 1rem; }
.finding { background: var(--card); border-left: 4px solid var(--fail); padding: .6rem .9rem; margin: .6rem 0; }
.finding b { color: var(--fail); } .soft, figcaption { color: var(--soft); font-size: .88rem; }
table { border-collapse: collapse; width: 100%; font-size: .9rem; }
th, td { text-align: left; padding: .25rem .6rem; border-bottom: 1px solid var(--line); vertical-align: top; }
td.num { font-variant-numeric: tabular-nums; min-width: 8.6rem; } td.detail { color: var(--soft); }
.ok, .fail, .tie, .not-run { white-space: nowrap; }
.ok { color: var(--ok); } .fail { color: var(--fail); font-weight: 600; } .tie { color: var(--tie); }
.not-run { color: var(--soft); }
figure { margin: .5rem 0; overflow-x: auto; } svg text { fill: var(--soft); font: 11px system-ui, sans-serif; }
.plots { display: flex; flex-wrap: wrap; gap: 2rem; } .plots figure { flex: 0 1 min-content; }
"""


def page(report: Report) -> str:
    """The whole HTML file."""
    environment = " · ".join(f"{escape(name)} {escape(value)}" for name, value in report.environment.items())
    state = "fail" if report.failures else "ok"
    findings = "".join(
        f'<div class="finding"><b>{escape(finding.kind)}</b> in {escape(finding.component)}'
        f"{_layers_in_words(finding.layers)}, first at position {finding.position} "
        f"(token {finding.token_id} {escape(repr(finding.token))})<br>{escape(finding.evidence)} "
        f'<span class="soft">Seen with {escape(finding.scenario)}.</span></div>'
        for finding in report.findings
    )
    plots = [_depth(_shown(report.points))] if report.points else []
    plots += [_scatter(report.logprobs)] if report.logprobs else []
    parts = [
        '<!doctype html><html lang="en"><meta charset="utf-8">',
        f"<title>{escape(report.subject)}</title><style>{STYLE}</style>",
        f'<h1>{escape(report.subject)}</h1><p class="verdict {state}">{escape(report.verdict)}</p>',
        f"<h2>Where they part</h2>{findings}" if findings else "",
        f"<h2>Layers</h2>{_layer_plots(report.points)}" if report.points else "",
        f'<div class="plots">{"".join(plots)}</div>' if plots else "",
        f"<h2>Checks</h2>{_table(report.checks)}",
        f'<h2>Environment</h2><p class="soft">{environment}</p></html>',
    ]
    return "\n".join(part for part in parts if part)


def _layers_in_words(layers: list[int]) -> str:
    if not layers:
        return ""
    shown = ", ".join(map(str, layers[:12])) + (", ..." if len(layers) > 12 else "")
    return f" of layer{'s' if len(layers) > 1 else ''} {shown}"


def _table(checks: Iterable[Check]) -> str:
    rows = [
        f"<tr><td>{escape(check.section)}</td><td>{escape(check.name)}</td>"
        f'<td class="{check.status.replace(" ", "-")}">{check.status}</td>'
        f'<td class="num">{escape(check.value)}</td><td class="num">{escape(check.limit)}</td>'
        f'<td class="detail">{escape(check.detail)}</td></tr>'
        for check in checks
    ]
    head = "<tr><th>part</th><th>check</th><th></th><th>found</th><th>limit</th><th></th></tr>"
    return f"<table>{head}{''.join(rows)}</table>"


# ------------------------------------------------------------------ plots
def _shown(points: list[PointError]) -> list[PointError]:
    """The worst of each point, of the scenario that shows most: the first one with a wrong point, else the first."""
    scenario = next((point.scenario for point in points if point.is_wrong), points[0].scenario)
    shown: dict[str, PointError] = {}
    for point in points:
        is_layer_before = point.point.endswith(".input") and point.layer != 0
        if point.scenario == scenario and not is_layer_before:
            worse = point.point not in shown or _severity(point) > _severity(shown[point.point])
            shown |= {point.point: point} if worse else {}
    return list(shown.values())


def _layer_plots(points: list[PointError]) -> str:
    shown = _shown(points)
    outside = [f"{point.point} {point.own:.1e}" for point in shown if point.layer is None]
    caption = f"Scenario: {shown[0].scenario}. Own errors beside the layers: {', '.join(outside) or 'none'}."
    return f'{_heat_map([point for point in shown if point.layer is not None])}<p class="soft">{escape(caption)}</p>'


def _severity(point: PointError) -> float:
    """Own error in tolerances."""
    return point.own / point.tolerance


def _component(point: PointError) -> str:
    """Without the path of the layers; the layer's own output is `output`."""
    return point.point.partition(f".{point.layer}.")[2] or "output"


def _colour(severity: float) -> str:
    """Green to yellow below the tolerance, red above, on a logarithmic scale."""
    if severity <= 1:
        return f"hsl({150 - 70 * max(0.0, 1 + math.log10(max(severity, 0.1))):.0f} 45% 62%)"
    strength = min(1.0, math.log10(min(severity, 1e5)) / 5) if math.isfinite(severity) else 1.0
    return f"hsl({20 - 20 * strength:.0f} 85% {62 - 24 * strength:.0f}%)"


def _heat_map(points: list[PointError]) -> str:
    components = list(dict.fromkeys(map(_component, points)))
    layers = sorted({point.layer for point in points if point.layer is not None})
    label = 8 * max(map(len, components), default=0) + 12
    cell = min(MAX_CELL_WIDTH, (MAP_WIDTH - label) // max(1, len(layers)))
    step = 1 if cell >= 18 else 5  # numbers need room
    width, height = label + cell * len(layers) + 10, CELL_HEIGHT * (len(components) + 1) + 6
    cells = []
    for point in points:
        x = label + cell * layers.index(point.layer or 0)
        y = CELL_HEIGHT * (1 + components.index(_component(point)))
        where = f"{point.point}: own error {point.own:.2e} (tolerance {point.tolerance:.0e}), total {point.total:.2e}, "
        where += f"max {point.max_abs:.2e}, mean {point.mean_abs:.2e}, cosine {point.cosine:.6f}"
        mark = f'<circle cx="{x + (cell - 2) / 2}" cy="{y + 9}" r="3" fill="#fff"/>' if point.is_wrong else ""
        shape = f'x="{x}" y="{y}" width="{cell - 2}" height="{CELL_HEIGHT - 2}" rx="3"'
        box = f'<rect {shape} fill="{_colour(_severity(point))}"/>'
        cells.append(f"<g><title>{escape(where)}</title>{box}{mark}</g>")
    names = [
        f'<text x="{label - 8}" y="{CELL_HEIGHT * (1 + i) + 13}" text-anchor="end">{escape(name)}</text>'
        for i, name in enumerate(components)
    ]
    numbers = [
        f'<text x="{label + cell * i + (cell - 2) / 2}" y="14" text-anchor="middle">{layer}</text>'
        for i, layer in enumerate(layers)
        if layer % step == 0
    ]
    caption = "Own error of every part: each layer of transformers was given our layer's input. Green: within the "
    caption += "tolerance; red with a dot: over it. Columns are layers, rows follow the computation; hover for numbers."
    drawing = f'<svg width="{width}" height="{height}" role="img">{"".join(numbers + names + cells)}</svg>'
    return f"<figure>{drawing}<figcaption>{caption}</figcaption></figure>"


def _depth(points: list[PointError]) -> str:
    """Two lines over the layers: the largest own error, and the total error of the layer's output."""
    points = [point for point in points if point.layer is not None]
    layers = sorted({point.layer for point in points if point.layer is not None})
    own = [max(point.own for point in points if point.layer == layer) for layer in layers]
    total = [max(p.total for p in points if p.layer == layer and _component(p) == "output") for layer in layers]
    limits = [max(point.tolerance for point in points)] * len(layers)
    exponents = [math.log10(min(max(value, 1e-9), 1e2)) for value in own + total + limits]
    low, high = math.floor(min(exponents)), math.ceil(max(exponents))

    def line(values: list[float], style: str) -> str:
        spots = [
            (
                MARGIN + (WIDTH - 2 * MARGIN) * (i / max(1, len(layers) - 1)),
                _height(math.log10(min(max(value, 1e-9), 1e2)), low, high),
            )
            for i, value in enumerate(values)
        ]
        dots = "".join(f'<circle cx="{x:.0f}" cy="{y:.0f}" r="2.5" {style} fill="none"/>' for x, y in spots)
        path = " ".join(f"{x:.1f},{y:.1f}" for x, y in spots)
        return f'<polyline points="{path}" fill="none" {style}/>{dots}'

    lines = line(total, 'stroke="var(--blue)" stroke-width="2"') + line(own, 'stroke="var(--ok)" stroke-width="2"')
    lines += line(limits, 'stroke="var(--fail)" stroke-dasharray="4 4"').partition("<circle")[0]
    step = max(1, len(layers) // 12)
    below = "".join(
        f'<text x="{MARGIN + (WIDTH - 2 * MARGIN) * (i / max(1, len(layers) - 1)):.0f}" y="{HEIGHT - 26}" '
        f'text-anchor="middle">{layer}</text>'
        for i, layer in enumerate(layers)
        if i % step == 0
    )
    caption = (
        "Blue: error of the layer's output in the whole network, adding up. Green: the largest error of the layer "
    )
    caption += "alone. Red: its tolerance. RMS(difference) / RMS(value), over the layers."
    return _figure(_grid(low, high) + lines + below, caption)


def _height(exponent: float, low: int, high: int) -> float:
    return HEIGHT - MARGIN + 4 - (HEIGHT - 1.5 * MARGIN) * (exponent - low) / max(1, high - low)


def _grid(low: int, high: int) -> str:
    """A line and a label for every power of ten."""
    return "".join(
        f'<line x1="{MARGIN}" x2="{WIDTH - MARGIN + 8}" y1="{y:.0f}" y2="{y:.0f}" stroke="var(--line)"/>'
        f'<text x="{MARGIN - 8}" y="{y + 4:.0f}" text-anchor="end">1e{exponent}</text>'
        for exponent in range(low, high + 1)
        for y in [_height(exponent, low, high)]
    )


def _scatter(pairs: list[tuple[float, float]]) -> str:
    """Points on the diagonal agree."""
    finite = [(a, b) for a, b in pairs if math.isfinite(a) and math.isfinite(b)]
    low = math.floor(min((min(pair) for pair in finite), default=-1.0))
    size = 330

    def spot(value: float) -> float:
        return MARGIN + (size - 1.5 * MARGIN) * (value - low) / max(1, -low)

    ticks = sorted({low, round(low / 2), 0})
    drawing = f'<line x1="{spot(low):.0f}" y1="{size - spot(low):.0f}" x2="{spot(0):.0f}" y2="{size - spot(0):.0f}" '
    drawing += 'stroke="var(--line)"/>'
    drawing += "".join(
        f'<text x="{spot(tick):.0f}" y="{size - MARGIN + 18}" text-anchor="middle">{tick}</text>'
        f'<text x="{MARGIN - 10}" y="{size - spot(tick) + 4:.0f}" text-anchor="end">{tick}</text>'
        for tick in ticks
    )
    drawing += "".join(
        f'<circle cx="{spot(a):.1f}" cy="{size - spot(b):.1f}" r="2.6" fill="{_pair_colour(a, b)}" fill-opacity="0.6"/>'
        for a, b in finite
    )
    caption = f"Log-probabilities of {len(pairs)} prompt tokens; across: the truth, up: what is verified. "
    caption += f"Largest difference {max((abs(a - b) for a, b in finite), default=0.0):.1e} nats, "
    caption += f"{len(pairs) - len(finite)} not a number."
    return _figure(drawing, caption, size, size)


def _pair_colour(a: float, b: float) -> str:
    return "var(--fail)" if abs(a - b) > 0.01 else "var(--blue)"


def _figure(drawing: str, caption: str, width: int = WIDTH, height: int = HEIGHT) -> str:
    svg = f'<svg width="{width}" height="{height}" role="img">{drawing}</svg>'
    return f"<figure>{svg}<figcaption>{escape(caption)}</figcaption></figure>"
