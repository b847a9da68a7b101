"""The kernels on a GPU: `tox -e gpu`. Without one nothing here runs, and every test is listed as not run.

With TRITON_INTERPRET=1 and no GPU the same tests run in the interpreter: a rehearsal of the tests, not of the kernels.
"""

from __future__ import annotations

import os

import pytest
import torch

REASON = "not run here: there is no GPU"


def device() -> str | None:
    """Where the kernels run."""
    if torch.cuda.is_available():
        return "cuda"
    return "cpu" if os.environ.get("TRITON_INTERPRET") == "1" else None


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if device() is None:
        for item in items:
            if "tests/gpu" in item.path.as_posix():
                item.add_marker(pytest.mark.skip(reason=REASON))


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    skipped = [report for report in terminalreporter.stats.get("skipped", []) if REASON in str(report.longrepr)]
    if skipped:
        names = sorted({report.nodeid.split("[")[0].split("::")[-1] for report in skipped})
        terminalreporter.section(REASON)
        terminalreporter.write_line(f"{len(skipped)} cases of {len(names)} tests:")
        for name in names:
            terminalreporter.write_line(f"  {name}")
