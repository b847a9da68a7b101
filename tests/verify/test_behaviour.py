"""What a client sees: a planted difference in text, draws or answers is found; a tie is called a tie."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from minivllm.core import block_hash
from minivllm.engine.llm_engine import read_model_facts
from minivllm.sample import sampler
from minivllm.verify.behaviour import (
    SAMPLING,
    TIE_GAP,
    check_answers,
    check_sampler,
    check_tokenizer,
    compare_run,
    prompts_of,
)
from minivllm.verify.engines import Engines
from minivllm.verify.invariance import check_invariance, compare_answers
from minivllm.verify.records import FAIL, NOT_RUN, OK, TIE, Check
from minivllm.verify.reference import Reference


@pytest.fixture(scope="module")
def model(tiny_model: Callable[[str], Path]) -> Path:
    return tiny_model("llama")


@pytest.fixture(scope="module")
def engines(model: Path) -> Engines:
    return Engines(model)


@pytest.fixture(scope="module")
def reference(model: Path) -> Reference:
    facts = read_model_facts(model)
    return Reference.load(facts.source, facts.hf_config)


def statuses(checks: list[Check]) -> dict[str, str]:
    return {check.name: check.status for check in checks}


# ------------------------------------------------------------------ text
def test_the_tokenizer_and_the_template_of_the_folder_are_found_equal(model: Path, engines: Engines):
    checks = statuses(check_tokenizer(engines.start(), read_model_facts(model).source))
    assert checks == {"text -> ids -> text": OK, "ids of texts": OK, "chat template": OK}


def test_another_template_and_another_tokenizer_are_found(model: Path, engines: Engines, tmp_path: Path):
    other = shutil.copytree(model, tmp_path / "other")
    config = json.loads((other / "tokenizer_config.json").read_text())
    config["chat_template"] = "{% for m in messages %}{{ m.content }}{% endfor %}"
    (other / "tokenizer_config.json").write_text(json.dumps(config))
    tokenizer = json.loads((other / "tokenizer.json").read_text())
    tokenizer["model"]["merges"] = tokenizer["model"]["merges"][:-20]
    (other / "tokenizer.json").write_text(json.dumps(tokenizer))
    checks = statuses(check_tokenizer(engines.start(), read_model_facts(other).source))
    assert checks["ids of texts"] == FAIL and checks["chat template"] == FAIL


# ------------------------------------------------------------------ greedy runs
def run_of(gap: float) -> tuple[str, str]:
    """Ours takes the second best token at the second position, `gap` behind the best."""
    logprobs = torch.full((4, 6), -20.0)
    logprobs[[0, 1, 2, 3], [1, 2, 3, 4]] = -1.0
    logprobs[2, 5] = -1.0 - gap
    return compare_run([0, 0], [2, 5, 4], logprobs, ["a", "b", "c"])


def test_a_greedy_difference_is_a_tie_only_where_rounding_decides():
    status, words = run_of(TIE_GAP / 2)
    assert status == TIE and words.startswith("1 equal tokens, then a tie")
    status, words = run_of(TIE_GAP * 20)
    assert status == FAIL and "3 (-1.00000)" in words and "here b" in words
    assert compare_run([0, 0], [2, 3, 4], torch.eye(6)[[0, 2, 3, 4]].log(), [])[0] == OK


def test_a_wrong_network_fails_in_every_part_that_a_client_sees(engines: Engines, reference: Reference):
    engine = engines.start()
    engine._executor.model.model.norm.weight[3] *= 1.02
    try:
        prompts = prompts_of(engine.tokenizer, 320, 40)[:3]
        checks, pairs = check_answers(engine, reference, prompts, 4)
    finally:
        engine._executor.model.model.norm.weight[3] /= 1.02
    found = {check.section for check in checks if check.status == FAIL}
    assert {"next token", "prompt logprobs"} <= found
    assert len(pairs) == sum(len(prompt) - 1 for prompt in prompts)


# ------------------------------------------------------------------ sampler
def test_every_setting_of_the_sampler_is_equal(reference: Reference):
    checks = check_sampler(reference, [5, 6, 7])
    assert [check.status for check in checks] == [OK] * (len(SAMPLING) + 1)


@pytest.mark.parametrize(("argument", "change", "name"), [(3, 1, "top_k"), (4, 0.05, "top_p"), (5, 0.05, "min_p")])
def test_a_wrong_cut_of_the_sampler_is_found(
    reference: Reference, monkeypatch: pytest.MonkeyPatch, argument: int, change: float, name: str
):
    restrict = sampler.restrict

    def spoiled(*arguments: Any) -> Any:
        values = list(arguments)
        if values[argument] not in (0, 0.0, 1.0):
            values[argument] += change
        return restrict(*values)

    monkeypatch.setattr(sampler, "restrict", spoiled)
    failed = [check.name for check in check_sampler(reference, [5, 6, 7]) if check.status == FAIL]
    assert failed and all(name in one or "draws" in one for one in failed)


def test_draws_that_follow_another_distribution_are_found(reference: Reference, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(sampler, "inverse_cdf", lambda weights, point: int(np.argsort(weights)[int(point * 5)]))
    assert check_sampler(reference, [5, 6, 7])[-1].status == FAIL


# ------------------------------------------------------------------ invariances
def test_a_cache_that_confuses_prefixes_is_found_by_the_table(
    engines: Engines, reference: Reference, monkeypatch: pytest.MonkeyPatch
):
    hash_block = block_hash.hash_block
    monkeypatch.setattr(block_hash, "hash_block", lambda parent, ids, key=None: hash_block(parent, [len(ids)], key))
    prompts = [[7 * i % 300 + 4 for i in range(start, start + 33)] for start in (0, 100)]
    found = statuses(check_invariance(engines, prompts, 4))
    assert FAIL in found.values()
    assert found["kernels: triton, interpreted"] in (OK, FAIL)


def test_equal_answers_ties_and_differences_are_told_apart():
    right: Any = [([1, 2, 3], [-1.0, -1.0, -1.0], [1.0, TIE_GAP / 2, 1.0])]
    assert compare_answers("x", right, right).status == OK
    assert compare_answers("x", [([1, 9, 9], [-1.0] * 3, [])], right).status == TIE
    assert compare_answers("x", [([9, 2, 3], [-1.0] * 3, [])], right).status == FAIL
    assert compare_answers("x", [([1, 2, 3], [-1.0, -1.01, -1.0], [])], right).status == FAIL
    assert NOT_RUN not in (OK, FAIL)
