"""A whole trace, and the forms in which it leaves Python: JSON, a page, a notebook's cell.

Knows no Triton. Made by trace(). Twin in vLLM: none.
"""

import html
import json
import math
from dataclasses import asdict, dataclass
from typing import Any

from minivllm.kernels.trace.page import page
from minivllm.kernels.trace.records import Access, Launch, Program, Span, TensorInfo, Tile

SCHEMA_VERSION = 1  # of to_json: raised when a field changes its name or meaning
FRAME_HEIGHT = 780  # of the page in a notebook, in pixels


@dataclass(frozen=True)
class Trace:
    """What one call of an operation did. In a notebook it shows itself as a page to step through."""

    operation: str
    launches: tuple[Launch, ...]
    version: int = SCHEMA_VERSION

    def to_json(self) -> str:
        """All of it. Numbers that JSON does not have are the strings "-inf", "inf" and "nan"."""
        return json.dumps(_plain(asdict(self)), allow_nan=False)

    @classmethod
    def from_json(cls, text: str) -> "Trace":
        """The trace that to_json wrote. Raises ValueError for another version of the schema."""
        found = json.loads(text)
        if found.get("version") != SCHEMA_VERSION:
            raise ValueError(f"version: expected a trace of schema {SCHEMA_VERSION}, got {found.get('version')}")
        return cls(found["operation"], tuple(_launch(launch) for launch in found["launches"]))

    def to_html(self) -> str:
        """One page that needs nothing else: no other file, no network."""
        return page(self.operation, self.launches)

    def _repr_html_(self) -> str:
        return (
            f'<iframe srcdoc="{html.escape(self.to_html())}" title="trace of {html.escape(self.operation)}" '
            f'style="width: 100%; height: {FRAME_HEIGHT}px; border: 0"></iframe>'
        )


# ------------------------------------------------------------------ JSON
def _plain(value: Any) -> Any:
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    if isinstance(value, dict):
        return {name: _plain(item) for name, item in value.items()}
    return [_plain(item) for item in value] if isinstance(value, list | tuple) else value


def _launch(found: dict[str, Any]) -> Launch:
    tensors = tuple(TensorInfo(**one | {"shape": tuple(one["shape"])}) for one in found["tensors"])
    programs = tuple(
        Program(
            (one["index"][0], one["index"][1], one["index"][2]),
            tuple(_access(access) for access in one["accesses"]),
            tuple(
                Tile(tile["first_key"], _floats(tile["running_max"]), _floats(tile["running_sum"]))
                for tile in one["tiles"]
            ),
        )
        for one in found["programs"]
    )
    x, y, z = found["grid"]
    lists = {"grid": (x, y, z), "tensors": tensors, "programs": programs, "source": tuple(found["source"])}
    return Launch(**found | lists)


def _access(found: dict[str, Any]) -> Access:
    lists = {
        "spans": _spans(found["spans"]),
        "axes": tuple(_spans(axis) for axis in found["axes"]),
        "values": None if found["values"] is None else _floats(found["values"]),
    }
    return Access(**found | lists)


def _spans(pairs: list[list[int]]) -> tuple[Span, ...]:
    return tuple((start, stop) for start, stop in pairs)


def _floats(values: list[float | str]) -> tuple[float, ...]:
    return tuple(float(value) for value in values)
