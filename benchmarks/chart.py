"""The picture of a comparison, out of what compare.py --json wrote: python benchmarks/chart.py RESULT.json FILE.png

One panel per workload, the fastest engine on top. A bar is the median of the rounds, the thin line its range, the
upright tick what this machine could do at most with that engine's weights. Needs matplotlib (pip install -e .[chart]).
"""

import json
from pathlib import Path
from typing import Annotated, Any

import matplotlib as mpl
import typer
from matplotlib.axes import Axes
from matplotlib.figure import Figure

mpl.rcParams["font.size"] = 9
OURS, OTHERS, INK = "#c2410c", "#94a3b8", "#1e293b"
ROW_INCHES, PANEL_INCHES, WIDTH_INCHES = 0.34, 0.75, 9.0

TITLES = {
    "single": "One stream: prompt of 64, 128 new tokens",
    "w32": "32 requests at once: 4,560 prompt tokens, 2,531 new",
    "prompt1024": "Reading a prompt of 1,024 tokens",
    "copy": "One stream, text that the prompt has already: 128 new tokens",
    "shared_prefix": "Time to the first token when 1,024 of 1,088 prompt tokens were seen before, of the time without",
    "json": "8 requests under a JSON schema: their time, of the time without",
}


Bar = dict[str, Any]  # name, value, low, high, limit (or None), text


def draw(result: dict[str, Any], file: Path) -> None:
    """Write the picture of `result` (compare.py's JSON) to `file`, in the format of its name."""
    panels = {name: [row for row in result["summary"] if row["workload"] == name] for name in TITLES}
    panels = {name: rows for name, rows in panels.items() if rows}
    heights = [PANEL_INCHES + ROW_INCHES * len(rows) for rows in panels.values()]
    figure = Figure(figsize=(WIDTH_INCHES, sum(heights) + 1.0), layout="constrained", facecolor="white")
    figure.suptitle(_title(result), fontsize=10, color=INK, x=0.01, ha="left")
    all_axes = figure.subplots(len(panels), height_ratios=heights, squeeze=False)[:, 0]
    for axes, (name, rows) in zip(all_axes, panels.items(), strict=True):
        axes.set_title(TITLES[name], loc="left", fontsize=10, fontweight="bold", color=INK)
        if rows[0]["ratio_to_first"]:
            _draw_bars(axes, sorted((_ratio_bar(row) for row in rows), key=lambda bar: bar["value"]))
        else:
            _draw_bars(axes, sorted((_rate_bar(row) for row in rows), key=lambda bar: -bar["value"]))
    figure.savefig(file, dpi=150)


def _title(result: dict[str, Any]) -> str:
    machine = result["machine"]
    flags = ", ".join(flag for flag in machine["flags"] if flag in ("avx512_bf16", "amx_bf16"))
    return (
        f"{result['model']}, {result['date']}: medians of {result['rounds']} rounds in turns, one run\n"
        f"{machine['cpu']}, {machine['cores']} cores{flags and f' ({flags})'}; 16 bit is {result['dtype']}; "
        "line: slowest to fastest round; tick: limit of memory or multiplications"
    )


def _rate_bar(row: dict[str, Any]) -> Bar:
    """Tokens a second; the limit is that of this engine's weights."""
    rate, median = row["tokens_per_second"], row["median_seconds"]
    text = f"{rate:,.0f} {row['unit']}"
    if row["times_faster"]:
        name, ratio = next(iter(row["times_faster"].items()))
        text += f"   {name} is {ratio['median']:.2f} x as fast"
    return {
        "name": row["engine"],
        "value": rate,
        "low": rate * median / row["max_seconds"],
        "high": rate * median / row["min_seconds"],
        "limit": row["share_of_limit"] and rate / row["share_of_limit"],
        "text": text,
    }


def _ratio_bar(row: dict[str, Any]) -> Bar:
    ratio = row["ratio_to_first"]
    return {
        "name": row["engine"],
        "value": 100 * ratio["median"],
        "low": 100 * ratio["min"],
        "high": 100 * ratio["max"],
        "limit": None,
        "text": f"{ratio['median']:.1%}   {row['median_seconds']:.3g} s",
    }


def _draw_bars(axes: Axes, bars: list[Bar]) -> None:
    """Horizontal bars from the top, each with its range, its limit and its text at the right."""
    largest = max(max(bar["high"], bar["limit"] or 0) for bar in bars)
    for index, bar in enumerate(bars):
        is_ours = bar["name"].startswith("ours")
        axes.barh(index, bar["value"], height=0.7, color=OURS if is_ours else OTHERS)
        axes.plot([bar["low"], bar["high"]], [index, index], color=INK, linewidth=1.2)
        if bar["limit"]:
            axes.plot([bar["limit"]] * 2, [index - 0.35, index + 0.35], color=INK, linewidth=2)
        # Beside the bar or, where its tick stands in the way, beside that.
        right = max(bar["high"], bar["limit"] or 0)
        axes.annotate(
            bar["text"], (right, index), (6, 0), textcoords="offset points", va="center", color=INK, fontsize=8.5
        )
    axes.set_yticks(range(len(bars)), [bar["name"] for bar in bars])
    for label, bar in zip(axes.get_yticklabels(), bars, strict=True):
        label.set_fontweight("bold" if bar["name"].startswith("ours") else "normal")
    axes.set_xlim(0, 1.5 * largest)  # room for the text
    axes.set_ylim(len(bars) - 0.4, -0.6)
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
