"""The drawings of these notebooks: bars, lines, grid, words. Inline SVG and HTML, no script, no other file.

Each returns a Drawing that a notebook shows, and that a static page keeps. Knows no engine: numbers and texts come in.
"""

from __future__ import annotations

import html
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

COLOURS = ("#3969ac", "#e07b39", "#2e9e6b", "#a05195", "#8a8d91")
GREY, PALE, INK = "#8a8d91", "#e3e6ea", "#20242a"
FONT = "font-family: system-ui, sans-serif; font-size: 13px"
NO_DATA = "#f4f5f7"


@dataclass(frozen=True)
class Drawing:
    """A piece of HTML."""

    html: str

    def _repr_html_(self) -> str:
        style = f"{FONT}; color: {INK}; background: white; padding: 12px; overflow-x: auto; line-height: 1.5"
        return f'<div style="{style}">{self.html}</div>'


def bars(panels: Mapping[str, Mapping[str, float]], *, limit: float | None = None) -> Drawing:
    """Horizontal bars, one panel beside the other, with the labels of all in every one. A label that a panel lacks, or
    that has 0 there, is marked as out. limit: the value of a full bar; None: the largest."""
    labels = list(dict.fromkeys(label for values in panels.values() for label in values))
    top = limit or max(max(values.values(), default=0.0) for values in panels.values()) or 1.0
    label_width = 9 * max(len(label) for label in labels) + 12
    width, row = 150, 21
    parts = []
    for number, (title, values) in enumerate(panels.items()):
        left = label_width + number * (width + 62)
        parts.append(_text(left, 14, title, weight=600))
        for index, label in enumerate(labels):
            y, value = 26 + index * row, values.get(label, 0.0)
            if number == 0:
                parts.append(_text(label_width - 8, y + 13, label, anchor="end"))
            parts.append(_rect(left, y, width, row - 4, NO_DATA))
            if value > 0:
                parts.append(_rect(left, y, max(1.0, width * min(1.0, value / top)), row - 4, COLOURS[0]))
                parts.append(_text(left + width + 6, y + 13, f"{value:.3f}" if value < 10 else f"{value:.0f}"))
            else:
                parts.append(_text(left + width + 6, y + 13, "out", colour=GREY))
    return Drawing(_svg(label_width + len(panels) * (width + 62), 30 + len(labels) * row, parts))


def lines(
    series: Mapping[str, Sequence[tuple[float, float]]], *, x_label: str, y_label: str, floor: float = 0.0
) -> Drawing:
    """Lines with dots, (x, y) each; the y axis begins at `floor`."""
    width, height, left, bottom = 460, 240, 52, 40
    xs = [x for points in series.values() for x, _ in points]
    ys = [y for points in series.values() for _, y in points]
    low, high = min(xs), max(xs)
    step = _round_step((max(ys) - floor) / 4)
    num_steps = math.ceil((max(ys) - floor) / step + 0.05)
    top = floor + num_steps * step

    def place(x: float, y: float) -> tuple[float, float]:
        return left + (x - low) / (high - low or 1) * width, 16 + height * (1 - (y - floor) / (top - floor or 1))

    parts = []
    for number in range(num_steps + 1):
        value = floor + number * step
        y = place(low, value)[1]
        parts.append(_rect(left, y, width, 1, PALE))
        parts.append(_text(left - 8, y + 4, f"{value:.3g}", anchor="end", colour=GREY))
    x_step = _round_step((high - low) / 6)
    marks = [x_step * number for number in range(math.ceil(low / x_step), math.floor(high / x_step) + 1)]
    for x in sorted(set(xs)) if len(set(xs)) <= 12 else marks:
        parts.append(_text(place(x, floor)[0], 16 + height + 18, f"{x:.3g}", anchor="middle", colour=GREY))
    for number, (name, points) in enumerate(series.items()):
        colour = COLOURS[number % len(COLOURS)]
        places = [place(x, y) for x, y in points]
        path = " ".join(f"{x:.1f},{y:.1f}" for x, y in places)
        parts.append(f'<polyline points="{path}" fill="none" stroke="{colour}" stroke-width="2.5"/>')
        parts += [f'<circle cx="{x:.1f}" cy="{y:.1f}" r="3.5" fill="{colour}"/>' for x, y in places]
        parts.append(_rect(left + width + 24, 20 + 22 * number, 14, 10, colour))
        parts.append(_text(left + width + 44, 30 + 22 * number, name))
    parts.append(_text(left + width / 2, 16 + height + bottom, x_label, anchor="middle"))
    parts.append(_text(left, 10, y_label))
    names = 8 * max(len(name) for name in series) + 60
    return Drawing(_svg(left + width + names, height + bottom + 26, parts))


def grid(
    rows: Sequence[Sequence[str | None]],
    *,
    row_labels: Sequence[str],
    legend: Mapping[str, str],
    column_labels: Sequence[str] = (),
    cell: int = 20,
) -> Drawing:
    """Squares; a cell names its kind, which `legend` gives a colour. None leaves it empty."""
    left = 8 * max(len(label) for label in row_labels) + 14
    top = 8 * max((len(label) for label in column_labels), default=0) + 8
    parts = []
    for number, label in enumerate(column_labels):
        x, y = left + number * cell + cell / 2 + 4, top - 5
        parts.append(f'<g transform="rotate(-90 {x} {y})">{_text(x, y, label)}</g>')
    for number, (label, row) in enumerate(zip(row_labels, rows, strict=True)):
        y = top + number * cell
        parts.append(_text(left - 8, y + cell / 2 + 4, label, anchor="end"))
        for column, kind in enumerate(row):
            colour = NO_DATA if kind is None else legend[kind]
            parts.append(_rect(left + column * cell, y, cell - 1, cell - 1, colour))
    width = left + cell * max(len(row) for row in rows)
    return Drawing(_svg(width + 8, top + cell * len(rows) + 4, parts) + _legend(legend))


def words(pieces: Sequence[tuple[str, str]], legend: Mapping[str, str]) -> Drawing:
    """Text whose pieces have coloured backgrounds: (text, kind); line ends are kept, and shown."""
    spans = []
    for text, kind in pieces:
        shown = html.escape(text).replace("\n", "⏎\n")
        style = f"background: {legend[kind]}; border-radius: 3px; margin: 1px; padding: 1px 0; display: inline"
        spans.append(f'<span style="{style}">{shown}</span>')
    body = f'<div style="white-space: pre-wrap; font-family: monospace; max-width: 760px">{"".join(spans)}</div>'
    return Drawing(body + _legend(legend))


# ------------------------------------------------------------------ pieces
def _round_step(step: float) -> float:
    """The next of 1, 2, 5, 10, 20 ..."""
    size = 10.0 ** math.floor(math.log10(step or 1.0))
    return next(size * factor for factor in (1, 2, 5, 10) if size * factor >= step * 0.999)


def _svg(width: float, height: float, parts: Sequence[str]) -> str:
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{width:.0f}" height="{height:.0f}" '
        f'style="{FONT}" role="img">{"".join(parts)}</svg>'
    )


def _rect(x: float, y: float, width: float, height: float, colour: str) -> str:
    radius = 2 if height > 4 else 0
    return f'<rect x="{x:.1f}" y="{y:.1f}" width="{width:.1f}" height="{height:.1f}" rx="{radius}" fill="{colour}"/>'


def _text(x: float, y: float, text: str, *, anchor: str = "start", colour: str = INK, weight: int = 400) -> str:
    return (
        f'<text x="{x:.1f}" y="{y:.1f}" fill="{colour}" text-anchor="{anchor}" font-weight="{weight}" '
        f'xml:space="preserve">{html.escape(text)}</text>'
    )


def _legend(legend: Mapping[str, str]) -> str:
    entries = [
        f'<span style="display: inline-block; width: 12px; height: 12px; border-radius: 2px; background: {colour}; '
        f'margin: 0 5px 0 14px; vertical-align: -1px"></span>{html.escape(name)}'
        for name, colour in legend.items()
    ]
    return f'<div style="margin-top: 8px">{"".join(entries)}</div>'
