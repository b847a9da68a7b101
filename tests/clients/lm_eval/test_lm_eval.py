"""lm-eval's `local-completions` against its own `hf` backend: same tiny model, same documents, both in float32.

In an environment of its own (`tox -e lm-eval`), for what lm-eval brings along. tasks/ holds two tasks over a dozen
local documents; nothing is fetched. Some choices are what the tiny model would write itself, so that is_greedy is not
always false.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from lm_eval import simple_evaluate
from lm_eval.tasks import TaskManager

from tests.sdk.test_sdk import Server, server
from tests.tolerances import HF_LOGPROB_ATOL

TASKS = Path(__file__).parent / "tasks"
NAMES = ["minivllm_choices", "minivllm_rolling"]
CONTEXT_TOKENS = 128  # of the tiny model

Answers = dict[str, list[Any]]  # task -> responses of its documents, in their order


@pytest.fixture(scope="module")
def folder(tiny_model: Callable[[str], Path]) -> Path:
    return tiny_model("llama")


@pytest.fixture(scope="module")
def local_server(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    log = tmp_path_factory.mktemp("lm-eval") / "server.log"
    with server(log, str(folder), "--dtype", "float32", "--served-model-name", "tiny") as started:
        yield started


def evaluate(backend: str, arguments: dict[str, Any], batch_size: int = 1) -> tuple[dict[str, Any], Answers]:
    """The metrics, and what the backend said about every document. Paths in the tasks count from tasks/."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(TASKS)
        done = simple_evaluate(
            model=backend,
            model_args=arguments,
            tasks=NAMES,
            task_manager=TaskManager(include_path=str(TASKS), include_defaults=False),
            batch_size=batch_size,
            bootstrap_iters=0,
            log_samples=True,
        )
    metrics = {
        name: {
            metric: value for metric, value in done["results"][name].items() if "," in metric and "stderr" not in metric
        }
        for name in NAMES
    }
    answers = {
        name: [
            sample["filtered_resps"] for sample in sorted(done["samples"][name], key=lambda sample: sample["doc_id"])
        ]
        for name in NAMES
    }
    return metrics, answers


@pytest.fixture(scope="module")
def truth(folder: Path) -> tuple[dict[str, Any], Answers]:
    arguments = {"pretrained": str(folder), "dtype": "float32", "device": "cpu", "max_length": CONTEXT_TOKENS}
    return evaluate("hf", arguments)


WAYS = {
    "token ids, the tokenizer is a local folder": {"tokenizer_backend": "huggingface"},
    "token ids, the server is the tokenizer": {},
    "texts, four at a time": {"tokenized_requests": False, "batch_size": 4},
    "token ids, four at a time, three at once": {"batch_size": 4, "num_concurrent": 3},
}


@pytest.mark.filterwarnings("default")
@pytest.mark.parametrize("way", WAYS)
def test_the_server_says_what_transformers_says(
    way: str, folder: Path, local_server: Server, truth: tuple[dict[str, Any], Answers]
):
    fields = dict(WAYS[way])
    batch_size = fields.pop("batch_size", 1)
    if "tokenizer_backend" in fields:
        fields["tokenizer"] = str(folder)
    arguments = {
        "model": "tiny",
        "base_url": f"{local_server.url}/completions",
        "max_length": CONTEXT_TOKENS + 1,  # lm-eval takes one off, for the token that it has written
        "max_retries": 1,
        **fields,
    }
    metrics, answers = evaluate("local-completions", arguments, batch_size)
    expected_metrics, expected = truth
    assert metrics["minivllm_choices"] == expected_metrics["minivllm_choices"]
    assert {name: len(rows) for name, rows in answers.items()} == dict.fromkeys(NAMES, 12)

    pairs = [pair for document in answers["minivllm_choices"] for pair in document]
    expected_pairs = [pair for document in expected["minivllm_choices"] for pair in document]
    flags = [greedy for _, greedy in expected_pairs]
    assert [greedy for _, greedy in pairs] == flags and set(flags) == {True, False}
    assert (
        max(abs(ours - theirs) for (ours, _), (theirs, _) in zip(pairs, expected_pairs, strict=True)) <= HF_LOGPROB_ATOL
    )

    rolling, expected_rolling = answers["minivllm_rolling"], expected["minivllm_rolling"]
    ours, theirs = ([row if isinstance(row, float) else row[0] for row in rows] for rows in (rolling, expected_rolling))
    assert all(math.isfinite(value) and value < 0 for value in theirs)
    assert ours == pytest.approx(theirs, abs=HF_LOGPROB_ATOL)
