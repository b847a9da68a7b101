"""Figures of a trace: SVG with nothing around it, for notebooks and for static pages.

    show_schedule(trace)         a Gantt: who computed how many tokens in which step, who waited, who gave way
    show_blocks(trace, step=7)   the pool of blocks and every block table in one step
    show_trace(trace)            the page to step through, in a frame

A Figure draws itself in a notebook; `figure.html` is the same for any other page. Text takes the colour of the page.

Knows no engine. Called by notebooks and documents. Twin in vLLM: none.
"""

from __future__ import annotations

import html
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from types import MappingProxyType

from minivllm.errors import ClientError
from minivllm.trace.document import Moment, Trace
from minivllm.trace.page import page
from minivllm.trace.records import Row, Step

ACTION_COLOURS: Mapping[str, str] = MappingProxyType(
    {
        "prefill": "#1f5fd6",
        "chunk": "#5f8fe3",
        "decode": "#2f9e6e",
        "verify": "#8457d8",
        "forced": "#b08bf0",
        "preempt": "#d9480f",
        "wait": "#9aa5b1",
    }
)
REQUEST_COLOURS = ("#1f5fd6", "#d9660f", "#2f9e6e", "#b5379f", "#8457d8", "#b58900", "#0e8aa8", "#c2334d")
FONT = 'font-family="system-ui, sans-serif" font-size="11"'
ROW, GAP = 22, 4  # heights of a row and between two, in pixels


@dataclass(frozen=True)
class Figure:
    """A drawing, as HTML."""

    html: str

    def _repr_html_(self) -> str:
        return self.html


def show_trace(trace: Trace, height: int = 760) -> Figure:
    """The whole page in a frame. height: pixels"""
    text = html.escape(page(trace), quote=True)
    return Figure(f'<iframe srcdoc="{text}" style="width:100%;height:{height}px;border:1px solid #8884"></iframe>')


# ------------------------------------------------------------------ who computed when
def show_schedule(trace: Trace, *, by_time: bool = False) -> Figure:
    """One line per sequence, one column per step (by_time: as wide as the step took); numbers are tokens.

    Below: the blocks in use. Hold the mouse over a cell for the scheduler's reason.
    """
    steps, names = trace.steps, trace.request_ids
    if not steps:
        raise ClientError("this trace has no steps to draw.")
    left = 12 + 7 * max(len(f"request {name}") for name in names)
    spans, width = _columns(steps, by_time)
    lines = {name: 34 + index * (ROW + GAP) for index, name in enumerate(names)}
    parts = [_text(left - 8, y + 15, f"request {name}", "end") for name, y in lines.items()]
    parts += [
        _cell(row, left + spans[index][0], lines[row.request_id], spans[index][1])
        for index, step in enumerate(steps)
        for row in step.rows
    ]
    bottom = 34 + len(names) * (ROW + GAP)
    parts += _step_numbers(steps, spans, left, bottom + 10)
    parts += _usage(trace, spans, left, bottom + 24)
    used = {"wait" if row.action.startswith("wait") else row.action for step in steps for row in step.rows}
    parts += _legend([(name, colour) for name, colour in ACTION_COLOURS.items() if name in used], left)
    return _svg(parts, left + width + 8, bottom + 92)


def _columns(steps: list[Step], by_time: bool) -> tuple[list[tuple[float, float]], float]:
    """(x, width) of each step, and the width of all."""
    if by_time:
        start, end = steps[0].scheduled_seconds, steps[-1].ended_seconds
        scale = 860 / max(end - start, 1e-9)
        return [
            (scale * (step.scheduled_seconds - start), max(1.0, scale * (step.ended_seconds - step.scheduled_seconds)))
            for step in steps
        ], 860
    width = min(34.0, max(5.0, 860 / len(steps)))
    return [(width * index, width) for index in range(len(steps))], width * len(steps)


def _cell(row: Row, x: float, y: float, width: float) -> str:
    action = "wait" if row.action.startswith("wait") else row.action
    reason = f"<title>{html.escape(f'{row.request_id}: {row.reason}')}</title>"
    colour = ACTION_COLOURS[action]
    if action == "wait":
        size = f'width="{width:.1f}" height="4"'
        return f'<rect x="{x:.1f}" y="{y + 9}" {size} fill="{colour}" opacity=".55">{reason}</rect>'
    label = "✕" if action == "preempt" else str(row.num_scheduled_tokens)
    shown = ""
    if width >= 7 * len(label) + 3:
        shown = f'<text x="{x + width / 2:.1f}" y="{y + 15}" text-anchor="middle" fill="#fff" {FONT}>{label}</text>'
    rect = f'<rect x="{x + 0.5:.1f}" y="{y}" width="{max(1, width - 1):.1f}" height="{ROW}" rx="3" fill="{colour}">'
    return f"{rect}{reason}</rect>{shown}"


def _step_numbers(steps: list[Step], spans: list[tuple[float, float]], left: float, y: float) -> list[str]:
    """As many as there is room for, the first one always."""
    parts, end = [], -99.0
    for step, (x, width) in zip(steps, spans, strict=True):
        middle = left + x + width / 2
        if middle - end >= 26:
            parts.append(_text(middle, y, str(step.number), "middle", opacity=0.65))
            end = middle
    return [*parts, _text(left - 8, y, "step", "end", opacity=0.65)]


def _usage(trace: Trace, spans: list[tuple[float, float]], left: float, y: float) -> list[str]:
    """Blocks in use, as bars up to the size of the pool."""
    total, height = trace.header["engine"]["num_blocks"] - 1, 44
    parts = [_text(left - 8, y + 14, "blocks", "end"), _text(left - 8, y + 28, f"of {total}", "end", opacity=0.65)]
    for step, (x, width) in zip(trace.steps, spans, strict=True):
        used = total - step.num_free_blocks
        bar = height * used / total
        parts.append(
            f'<rect x="{left + x + 0.5:.1f}" y="{y + height - bar:.1f}" width="{max(1, width - 1):.1f}" '
            f'height="{bar:.1f}" fill="#d9a50f" opacity=".8"><title>{used} of {total} blocks</title></rect>'
        )
    end = left + spans[-1][0] + spans[-1][1]
    for level in (y, y + height):
        parts.append(f'<path d="M{left:.1f} {level}H{end:.1f}" stroke="currentColor" opacity=".3"/>')
    return parts


# ------------------------------------------------------------------ who holds which block
def show_blocks(trace: Trace, step: int | None = None) -> Figure:
    """The pool, then each table. step: its number; None: the one with the most blocks in use.

    A block has the colour of who holds it, stripes where several do; a frame where it is new in this step; a dot where
    it is in the prefix cache. In the tables the filled part is what is computed behind the step.
    """
    moments = list(trace.moments())
    chosen = [moment for moment in moments if step is None or moment.step.number == step]
    if not chosen:
        raise ClientError(f"this trace has no step {step}; it has {len(moments)} steps.", parameter="step")
    moment = min(chosen, key=lambda one: one.step.num_free_blocks)
    names = trace.request_ids
    colours = {name: REQUEST_COLOURS[index % len(REQUEST_COLOURS)] for index, name in enumerate(names)}
    parts = [_text(8, 15, f"step {moment.step.number}: {_sentence(moment)}")]
    height, drawn = _pool(trace, moment, colours, 30)
    for name, block_ids in moment.tables.items():
        drawn += _table(trace, moment, name, block_ids, colours[name], height)
        height += 58
    widest = max([16, *map(len, moment.tables.values())])
    return _svg([*parts, *drawn], max(640, 170 + 40 * widest), height + 4)


def _sentence(moment: Moment) -> str:
    counts = (f"{row.request_id} {row.action} {row.num_scheduled_tokens}" for row in moment.step.rows)
    return ", ".join(counts)[:110]


def _pool(trace: Trace, moment: Moment, colours: Mapping[str, str], top: int) -> tuple[int, list[str]]:
    """All blocks by id. Returns where the drawing ends."""
    owners, num_blocks = moment.owners(), trace.header["engine"]["num_blocks"]
    new = {block_id for row in moment.step.rows for block_id in row.new_block_ids if block_id not in row.prefix_hits}
    size, per_line = (34, 18) if num_blocks <= 72 else (18, 36)
    parts = []
    for block_id in range(num_blocks):
        x, y = 8 + block_id % per_line * (size + 2), top + block_id // per_line * (size + 2)
        holders = owners.get(block_id, [])
        title = "the null block" if block_id == 0 else f"block {block_id}: {', '.join(holders) or 'free'}"
        if block_id in moment.hashes:
            title += f", hash {moment.hashes[block_id]}"
        parts.append(f"<g><title>{html.escape(title)}</title>")
        parts.append(_box(x, y, size, size, [colours[name] for name in holders], is_new=block_id in new))
        if size > 20:
            ink = "#fff" if holders else "currentColor"
            parts.append(_text(x + size / 2, y + size / 2 + 4, "∅" if block_id == 0 else str(block_id), "middle", ink))
        if block_id in moment.hashes:
            ink = "#fff" if holders else "currentColor"
            parts.append(f'<circle cx="{x + size - 5}" cy="{y + 5}" r="2.2" fill="{ink}"/>')
        parts.append("</g>")
    return top + -(-num_blocks // per_line) * (size + 2) + 12, parts


def _table(trace: Trace, moment: Moment, name: str, block_ids: list[int], colour: str, top: int) -> list[str]:
    """One block table, left to right in the order of the tokens."""
    row = moment.step.row(name)
    num_tokens = row.num_computed_tokens + row.num_scheduled_tokens if row is not None else None
    label = f"{num_tokens} tokens" if num_tokens is not None else "not in this step"
    parts = [_text(8, top + 16, f"request {name}", colour=colour, weight=600), _text(8, top + 31, label, opacity=0.65)]
    for index, block_id in enumerate(block_ids):
        x = 160 + index * 40
        filled = trace.block_size if num_tokens is None else num_tokens - index * trace.block_size
        share = min(1.0, max(0.0, filled / trace.block_size))
        is_hit = row is not None and block_id in row.prefix_hits
        is_new = row is not None and block_id in row.new_block_ids and not is_hit
        parts.append(_box(x, top, 36, 28, [], is_new=is_new))
        parts.append(f'<rect x="{x}" y="{top}" width="{36 * share:.1f}" height="28" rx="3" fill="{colour}"/>')
        parts.append(_text(x + 18, top + 18, str(block_id), "middle", "#fff" if share > 0.6 else "currentColor"))
        if block_id in moment.hashes:
            note = f"{'hit ' if is_hit else ''}{moment.hashes[block_id][:4]}"
            parts.append(_text(x + 18, top + 41, note, "middle", opacity=0.7, size=9))
    return parts


def _box(x: float, y: float, width: float, height: float, colours: list[str], *, is_new: bool) -> str:
    """A block: one stripe for each colour, an empty frame without any."""
    stripe = width / max(1, len(colours))
    parts = [
        f'<rect x="{x + stripe * index:.1f}" y="{y}" width="{stripe:.1f}" height="{height}" rx="3" fill="{colour}"/>'
        for index, colour in enumerate(colours)
    ]
    line, opacity = (2.5, 1) if is_new else (1, 0.3)
    frame = f'x="{x}" y="{y}" width="{width}" height="{height}" rx="3" fill="none" stroke="currentColor"'
    return "".join(parts) + f'<rect {frame} stroke-width="{line}" opacity="{opacity}"/>'


# ------------------------------------------------------------------ SVG
def _legend(entries: Iterable[tuple[str, str]], left: float) -> list[str]:
    parts, x = [], left
    for name, colour in entries:
        parts.append(f'<rect x="{x}" y="8" width="12" height="12" rx="2" fill="{colour}"/>')
        parts.append(_text(x + 17, 18, name))
        x += 34 + 7 * len(name)
    return parts


def _text(
    x: float,
    y: float,
    text: str,
    anchor: str = "start",
    colour: str = "currentColor",
    *,
    opacity: float = 1.0,
    weight: int = 400,
    size: int = 11,
) -> str:
    place = f'x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}" fill="{colour}" opacity="{opacity}" font-weight="{weight}"'
    return f"<text {place} {FONT.replace('11', str(size))}>{html.escape(text)}</text>"


def _svg(parts: Iterable[str], width: float, height: float) -> Figure:
    size = f'viewBox="0 0 {width:.0f} {height:.0f}" width="{width:.0f}" style="max-width:100%;height:auto"'
    return Figure(f'<svg xmlns="http://www.w3.org/2000/svg" {size}>{"".join(parts)}</svg>')
