"""A trace as text: a line per decision, the tables that changed, and each draw with the stages that changed something.

Knows no engine. Called by cli/tracing.py. Twin in vLLM: none.
"""

from __future__ import annotations

from collections.abc import Iterator

from rich.console import Console, Group, RenderableType
from rich.markup import escape
from rich.panel import Panel
from rich.table import Table

from minivllm.trace.document import Moment, Trace
from minivllm.trace.records import Draw, Row, Stage

SHOWN_SLOTS = 16
COLOURS = ("prefill", "blue"), ("chunk", "blue"), ("decode", "green"), ("preempt", "red"), ("wait", "yellow")


def print_trace(trace: Trace, console: Console, num_top: int = 5) -> None:
    """All of it. num_top: candidates of each stage"""
    for added in trace.requests:
        tokens = f"{len(added.prompt_token_ids)} tokens: {escape('|'.join(added.prompt_texts))}"
        console.print(f"[bold]request {escape(added.request_id)}[/bold]  {tokens}")
    for moment in trace.moments():
        body = [part for row in moment.step.rows for part in _row(moment, row, num_top)]
        milliseconds = 1000 * (moment.step.ended_seconds - moment.step.scheduled_seconds)
        tokens = f"{moment.step.num_tokens} token{'' if moment.step.num_tokens == 1 else 's'}"
        title = f"step {moment.step.number}: {tokens}, {milliseconds:.1f} ms"
        console.print(Panel(Group(*body), title=title, title_align="left", border_style="dim"))
    for request_id in trace.request_ids:
        console.print(f"[bold]request {escape(request_id)}[/bold]  {escape(repr(trace.text_of(request_id)))}")


def _row(moment: Moment, row: Row, num_top: int) -> Iterator[RenderableType]:
    colour = next((colour for action, colour in COLOURS if row.action.startswith(action)), "magenta")
    kernel = f"  [dim]attention: {row.kernel}[/dim]" if row.kernel else ""
    yield f"[bold]{escape(row.request_id)}[/bold] [{colour}]{row.action}[/{colour}] {escape(row.reason)}{kernel}"
    before, now = moment.before.get(row.request_id, []), moment.tables.get(row.request_id, [])
    if before != now:
        yield f"   blocks {before} -> {now}"
    if row.prefix_hits:
        hits = ", ".join(f"block {block_id} {block_hash}" for block_id, block_hash in row.prefix_hits.items())
        yield f"   prefix cache: {hits}"
    if row.slot_mapping:
        shown = " ".join(map(str, row.slot_mapping[:SHOWN_SLOTS]))
        yield f"   slots {shown}{' ...' if len(row.slot_mapping) > SHOWN_SLOTS else ''}"
    for draw in row.draws:
        yield f"   token {draw.position}: [bold]{escape(repr(draw.text))}[/bold]  {escape(draw.why)}"
        yield _stages(draw, num_top)
    if row.finish_reason:
        yield f"   ends: {row.finish_reason}"


def _stages(draw: Draw, num_top: int) -> RenderableType:
    """A column per stage that changed something, likeliest tokens first."""
    changed = [stage for index, stage in enumerate(draw.stages) if index == 0 or stage.changed]
    table = Table(*map(_title, changed), box=None, padding=(0, 2), header_style="dim")
    for rank in range(min(num_top, max((len(stage.top) for stage in changed), default=0))):
        table.add_row(*(_candidate(stage, rank, draw.token_id) for stage in changed))
    return table


def _title(stage: Stage) -> str:
    setting = "" if stage.setting is None else f" {stage.setting:g}"
    return f"{stage.name}{setting} ({stage.num_left:,})"


def _candidate(stage: Stage, rank: int, token_id: int) -> str:
    if rank >= len(stage.top):
        return ""
    one = stage.top[rank]
    text = f"{100 * one.probability:5.1f} % {escape(repr(one.text))}"
    return f"[bold green]{text}[/bold green]" if one.token_id == token_id else text
