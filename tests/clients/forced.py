"""A tool whose every argument is bounded: whatever the model, a forced call ends soon and must be of this form."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field

QUESTION = "How warm is it on the fifth?"
MAX_TOKENS = 64


class Temperature(BaseModel):
    """How warm it is on a day"""

    model_config = ConfigDict(extra="forbid")
    unit: Literal["celsius", "fahrenheit"]
    day: int = Field(ge=1, le=31)


def check(arguments: dict[str, Any]) -> None:
    assert set(arguments) == {"unit", "day"}
    Temperature.model_validate(arguments, strict=True)
