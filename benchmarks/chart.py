"""The picture of a comparison, out of what compare.py --json wrote: python benchmarks/chart.py RESULT.json FILE.png

One panel per workload, the fastest engine on top. A bar is the median of the rounds, the thin line its range, the
upright tick what this machine could do at most with that engine's weights. Needs matplotlib (pip install -e .[chart]).
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from matplotlib.axes import Axes

OURS, OTHERS, INK = "#c2410c", "#94a3b8", "#1e293b"
COLUMNS, WIDTH_INCHES, ROW_INCHES, PANEL_INCHES, HEAD_INCHES = 2, 13.0, 0.3, 0.65, 0.9
# Of a panel's width: where the bars end, and where its two columns of figures end.
BARS_END, FIRST_COLUMN, SECOND_COLUMN = 0.68, 0.84, 1.0

# In the order of the panels.
TITLES = {
    "single": "One stream: prompt of 64 tokens, 128 new ones",
    "w32": "32 requests at once: 4,560 prompt tokens, 2,531 new ones",
    "prompt1024": "Reading a prompt of 1,024 tokens",
    "copy": "One stream, 128 tokens that the prompt has already",
    "shared_prefix": "1,024 of 1,088 prompt tokens seen before: first token",
    "json": "8 requests under a JSON schema",
}
Bar = dict[str, Any]  # name, value, low, high, limit (or None), texts (two)


def draw(result: dict[str, Any], file: Path) -> None:
    """Write the picture of `result` (compare.py's JSON) to `file`, in the format of its name."""
    from matplotlib.figure import Figure

    panels = [(name, [row for row in result["summary"] if row["workload"] == name]) for name in TITLES]
    panels = [(name, rows) for name, rows in panels if rows]
    lines = [panels[first : first + COLUMNS] for first in range(0, len(panels), COLUMNS)]
    num_rows = [max(len(rows) for _, rows in line) for line in lines]
    heights = [PANEL_INCHES + ROW_INCHES * number for number in num_rows]
    figure = Figure((WIDTH_INCHES, HEAD_INCHES + sum(heights)), layout="constrained", facecolor="white")
    figure.get_layout_engine().set(w_pad=0.1, h_pad=0.06)
    figure.suptitle(_title(result), fontsize=10.5, color=INK, x=0.01, ha="left", linespacing=1.5)
    grid = figure.subplots(len(lines), COLUMNS, height_ratios=heights, squeeze=False)
    for axes in grid.flat[len(panels) :]:
        axes.set_axis_off()
    for axes, (name, rows), index in zip(grid.flat, panels, range(len(panels)), strict=False):
        axes.set_title(TITLES[name], loc="left", fontsize=11, fontweight="bold", color=INK, pad=16)
        if rows[0]["ratio_to_first"]:
            bars, headings = sorted(map(ratio_bar, rows), key=lambda bar: bar["value"]), ("of plain time", "seconds")
        else:
            bars, headings = sorted(map(rate_bar, rows), key=lambda bar: -bar["value"]), (rows[0]["unit"], "ours is")
        _draw_bars(axes, bars, headings, num_rows[index // COLUMNS])
    figure.savefig(file, dpi=130)


def _title(result: dict[str, Any]) -> str:
    machine = result["machine"]
    flags = ", ".join(flag for flag in machine["flags"] if flag in ("avx512f", "avx512_bf16", "amx_bf16"))
    return (
        f"{result['model']} on {machine['cpu']}, {machine['cores']} cores{flags and f' ({flags})'}, {result['date']}\n"
        f"weights in {result['dtype']} if the name says nothing else; llama.cpp: the GGUF, one request at a time\n"
        f"bar: median of {result['rounds']} rounds, in turns; line: its range; tick: most that memory or "
        "multiplications allow with such weights; ours is: times as fast"
    )


def rate_bar(row: dict[str, Any]) -> Bar:
    """Tokens a second of a row of summary.summarise; the limit is that of this engine's weights."""
    rate, median = row["tokens_per_second"], row["median_seconds"]
    ratio = next(iter(row["times_faster"].values()), None)  # the first of ours counts
    return {
        "name": row["engine"],
        "value": rate,
        "low": rate * median / row["max_seconds"],
        "high": rate * median / row["min_seconds"],
        "limit": row["share_of_limit"] and rate / row["share_of_limit"],
        "texts": (f"{rate:,.0f}", f"{ratio['median']:.2f} x" if ratio else ""),
    }


def ratio_bar(row: dict[str, Any]) -> Bar:
    """The last batch's time in percent of the first one's."""
    ratio = row["ratio_to_first"]
    values = {"value": ratio["median"], "low": ratio["min"], "high": ratio["max"], "limit": None}
    return {"name": row["engine"], **values, "texts": (f"{ratio['median']:.1%}", f"{row['median_seconds']:.3g}")}


def _draw_bars(axes: Axes, bars: list[Bar], headings: tuple[str, str], num_rows: int) -> None:
    """Horizontal bars from the top, each with its range and its limit, and two columns of figures beside them."""
    largest = max(max(bar["high"], bar["limit"] or 0) for bar in bars)
    columns = {"transform": axes.get_yaxis_transform(), "ha": "right", "va": "center", "color": INK}
    for index, bar in enumerate(bars):
        axes.barh(index, bar["value"], height=0.7, color=OURS if bar["name"].startswith("ours") else OTHERS)
        axes.plot([bar["low"], bar["high"]], [index, index], color=INK, linewidth=1.2)
        if bar["limit"]:
            axes.plot([bar["limit"]] * 2, [index - 0.35, index + 0.35], color=INK, linewidth=2)
        for x, text in zip((FIRST_COLUMN, SECOND_COLUMN), bar["texts"], strict=True):
            axes.text(x, index, text, fontsize=10, **columns)
    for x, heading in zip((FIRST_COLUMN, SECOND_COLUMN), headings, strict=True):
        axes.text(x, -0.85, heading, fontsize=9, fontstyle="italic", **columns)
    axes.set_yticks(range(len(bars)), [bar["name"] for bar in bars], fontsize=10)
    for label, bar in zip(axes.get_yticklabels(), bars, strict=True):
        label.set_fontweight("bold" if bar["name"].startswith("ours") else "normal")
    axes.set_xlim(0, largest / BARS_END)
    axes.set_ylim(num_rows - 0.4, -0.6)  # as high a bar as in the panel beside it
    axes.tick_params(axis="y", length=0)
    axes.xaxis.set_visible(False)
    for side in ("top", "right", "bottom"):
        axes.spines[side].set_visible(False)


def main(
    result: Annotated[Path, typer.Argument(help="what compare.py --json wrote")],
    file: Annotated[Path, typer.Argument(help="the picture, .png or .svg")],
) -> None:
    """Draw a comparison again without measuring it again."""
    draw(json.loads(result.read_text()), file)


if __name__ == "__main__":
    typer.run(main)
