"""The product behaves the same under `python -O`, which leaves every assert out."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

from tests.house.bad_input import BAD_PARAMS, BAD_PROMPTS, BAD_SETTINGS, answers
from tests.house.source import ROOT

REFUSALS = (
    "InvalidRequestError(",
    "ContextLengthError(",
    "ModelNotFoundError(",
    "ConfigError(",
    "ValueError(None): ",  # of the kernels, which know no requests
)


def test_wrong_input_is_refused_the_same_way_without_asserts(tiny_model: Callable[[str], Path]):
    folder = tiny_model("llama")
    ordinary = answers(folder)
    *wrong, free_blocks, good = ordinary
    assert len(wrong) > len(BAD_PARAMS) + len(BAD_PROMPTS) + len(BAD_SETTINGS)
    for line in wrong:
        assert line.startswith(REFUSALS), line
    assert free_blocks == "free blocks: 31"  # nothing of all this is left behind; block 0 is never given away
    assert good.startswith("no error: [")

    command = [sys.executable, "-O", "-m", "tests.house.bad_input", str(folder)]
    optimised = subprocess.run(command, cwd=ROOT, env=os.environ, capture_output=True, text=True, check=False)
    assert optimised.returncode == 0, optimised.stderr
    assert json.loads(optimised.stdout) == ordinary
