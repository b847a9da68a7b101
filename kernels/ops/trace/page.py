"""Draws a trace: one HTML page with its data inside, which steps through the accesses of all programs.

The page gets cells instead of values: a cell is what its drawing can show as one square, such as the head_size values
of one slot. Knows records, no Triton. Called by Trace.to_html. Twin in vLLM: none.
"""

import html
import json
import math
from pathlib import Path
from typing import Any

from minivllm.kernels.trace.records import Access, Launch, Program, Span, TensorInfo

MAX_CELLS = 64  # of one row of a matrix; longer rows share cells
WIDE = 16  # rows of more values are one cell where there are more dimensions than two


def page(operation: str, launches: tuple[Launch, ...]) -> str:
    """The whole page; nothing in it asks for another file."""
    template = Path(__file__).with_name("page.html").read_text(encoding="utf-8")
    data = {"operation": operation, "launches": [_launch(launch) for launch in launches]}
    text = json.dumps(data, separators=(",", ":"), allow_nan=False).replace("<", "\\u003c")
    return template.replace("__TITLE__", html.escape(operation)).replace("__TRACE__", text)


def _launch(launch: Launch) -> dict[str, Any]:
    grids = {tensor.name: _cells_per_row(tensor) for tensor in launch.tensors}
    used = {access.tensor for program in launch.programs for access in program.accesses}
    tensors = [tensor for tensor in launch.tensors if tensor.name in used]
    places = {tensor.name: place for place, tensor in enumerate(tensors)}
    return {
        "kernel": launch.kernel,
        "grid": launch.grid,
        "numbers": {name: value for name, value in launch.numbers.items() if isinstance(value, bool | int)},
        "first_line": launch.first_line,
        "source": launch.source,
        "tensors": [_tensor(tensor, grids[tensor.name]) for tensor in tensors],
        "programs": [_program(program, tensors, places, grids) for program in launch.programs],
    }


def _tensor(tensor: TensorInfo, per_row: int) -> dict[str, Any]:
    """rows x columns of cells, in groups: the slots of a block, or the heads of a token."""
    rows = tensor.shape[0] if len(tensor.shape) > 1 else 1
    cells = math.prod(tensor.shape[:-1]) * per_row
    group = (tensor.shape[2] if len(tensor.shape) > 3 else 1) * per_row if len(tensor.shape) > 2 else 0
    return {
        "name": tensor.name,
        "shape": tensor.shape,
        "dtype": tensor.dtype,
        "rows": rows,
        "columns": cells // max(rows, 1),
        "group": group if group > 1 else 0,
        "values": -(-_width(tensor) // per_row),
    }


def _program(
    program: Program, tensors: list[TensorInfo], places: dict[str, int], grids: dict[str, int]
) -> dict[str, Any]:
    steps = []
    for access in program.accesses:
        tensor = tensors[places[access.tensor]]
        steps.append(
            {
                "store": access.kind == "store",
                "tensor": places[access.tensor],
                "line": access.line,
                "text": access.text,
                "lanes": [access.num_active, access.num_lanes],
                "tile": access.tile,
                "cells": _cells(access.spans, _width(tensor), grids[access.tensor]),
                "range": _range(access),
            }
        )
    tiles = [
        {
            "first_key": tile.first_key,
            "max": [None if not math.isfinite(value) else round(value, 4) for value in tile.running_max],
            "sum": [None if not math.isfinite(value) else round(value, 4) for value in tile.running_sum],
        }
        for tile in program.tiles
    ]
    return {"index": program.index, "steps": steps, "tiles": tiles}


def _range(access: Access) -> list[float] | None:
    """The least and the largest finite value that a store wrote."""
    finite = [value for value in access.values or () if math.isfinite(value)]
    return [min(finite), max(finite)] if finite else None


def _width(tensor: TensorInfo) -> int:
    return max(1, tensor.shape[-1]) if tensor.shape else 1


def _cells_per_row(tensor: TensorInfo) -> int:
    width = _width(tensor)
    return 1 if len(tensor.shape) > 2 and width > WIDE else min(width, MAX_CELLS)


def _cells(spans: tuple[Span, ...], width: int, per_row: int) -> list[Span]:
    """Spans of values as spans of cells, joined where they touch."""
    found: list[Span] = []
    for start, stop in spans:
        first, last = (number // width * per_row + number % width * per_row // width for number in (start, stop - 1))
        if found and first <= found[-1][1]:
            found[-1] = (found[-1][0], max(found[-1][1], last + 1))
        else:
            found.append((first, last + 1))
    return found
