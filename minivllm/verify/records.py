"""What a verification says, as plain records: the JSON file is `Report.as_dict()`, everything else is drawn from it.

    Report
    ├── checks      one row each: section, name, status, measured value, limit
    ├── findings    where the networks part, and what it looks like
    └── points      every compared value of every layer, for the plots

Knows no torch. Called by all of verify. Twin in vLLM: none.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from typing import Any
from xml.etree import ElementTree

SCHEMA = "minivllm-verify/1"
OK, FAIL, TIE, NOT_RUN = "ok", "fail", "tie", "not run"


@dataclass(frozen=True)
class Check:
    """One row. Only `fail` makes the exit code 1; a tie is a choice that rounding decides."""

    section: str
    name: str
    status: str
    value: str = ""
    limit: str = ""
    detail: str = ""


@dataclass(frozen=True)
class PointError:
    """One value of one layer, ours against transformers'. own: of a layer that was given our input, so the point's own
    fault; total: of the whole network up to here. Both are RMS(difference) / RMS(value) of the worst position, in other
    arithmetics than float32 of the median one."""

    scenario: str
    point: str
    layer: int | None
    own: float
    total: float
    max_abs: float
    mean_abs: float
    cosine: float  # of the worst position
    tolerance: float
    position: int | None  # the first one over the tolerance

    @property
    def is_wrong(self) -> bool:
        return self.position is not None


@dataclass(frozen=True)
class Finding:
    """A place where the networks part. layers: all that show the same; position and token: of the first one."""

    scenario: str
    kind: str
    component: str
    layers: list[int]
    position: int
    token_id: int
    token: str
    evidence: str

    def __str__(self) -> str:
        where = f"layer {self.layers[0]}, " if self.layers else ""
        more = f" (and {len(self.layers) - 1} other layers)" if len(self.layers) > 1 else ""
        at = f"position {self.position}, token {self.token_id} {self.token!r}"
        return f"{self.kind}: {where}{self.component}{more}, {at}. {self.evidence} Seen with {self.scenario}."


@dataclass
class Report:
    """subject: what was verified against what."""

    subject: str
    environment: dict[str, str]
    checks: list[Check] = field(default_factory=list)
    findings: list[Finding] = field(default_factory=list)
    points: list[PointError] = field(default_factory=list)
    logprobs: list[tuple[float, float]] = field(default_factory=list)  # (transformers', ours) of prompt tokens

    @property
    def failures(self) -> list[Check]:
        return [check for check in self.checks if check.status == FAIL]

    @property
    def verdict(self) -> str:
        """One line."""
        if self.failures:
            return f"DIFFERENT: {len(self.failures)} of {len(self.checks)} checks failed"
        counts = {status: sum(check.status == status for check in self.checks) for status in (TIE, NOT_RUN)}
        notes = "".join(f", {number} {status}" for status, number in counts.items() if number)
        return f"EQUAL: {len(self.checks)} checks{notes}"

    def as_dict(self) -> dict[str, Any]:
        """The JSON file. A field may be added under the same schema; none changes its meaning."""
        return {"schema": SCHEMA, "verdict": self.verdict, "passed": not self.failures} | dataclasses.asdict(self)

    def as_junit(self) -> str:
        """JUnit's XML: a test case for every check."""
        suite = ElementTree.Element(
            "testsuite",
            name=f"minivllm verify {self.subject}",
            tests=str(len(self.checks)),
            failures=str(len(self.failures)),
            skipped=str(sum(check.status == NOT_RUN for check in self.checks)),
        )
        for check in self.checks:
            case = ElementTree.SubElement(suite, "testcase", classname=check.section, name=check.name)
            said = f"{check.value} (limit {check.limit}) {check.detail}".strip()
            if check.status == FAIL:
                ElementTree.SubElement(case, "failure", message=said)
            elif check.status == NOT_RUN:
                ElementTree.SubElement(case, "skipped", message=check.detail)
        if self.findings:
            ElementTree.SubElement(suite, "system-out").text = "\n".join(map(str, self.findings))
        return ElementTree.tostring(suite, encoding="unicode")
