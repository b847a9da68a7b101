"""The comparison workloads are the published ones: a figure is only comparable when the work is the same."""

import hashlib
import json
import runpy
from pathlib import Path

import pytest

MODULE = runpy.run_path(str(Path(__file__).parents[1] / "benchmarks" / "workload.py"))
requests_of_round = MODULE["requests_of_round"]


def totals(requests):
    """(number of requests, prompt tokens, output tokens)"""
    return len(requests), sum(len(ids) for ids, _ in requests), sum(n for _, n in requests)


@pytest.mark.parametrize(
    ("name", "published"), [("w32", (32, 4560, 2531)), ("single", (1, 64, 128)), ("prompt1024", (1, 1024, 1))]
)
def test_workload_has_the_published_number_of_tokens(name, published):
    assert totals(requests_of_round(name, 0)) == published


def test_w32_has_the_published_token_ids():
    digest = hashlib.sha256(json.dumps(requests_of_round("w32", 0)).encode()).hexdigest()
    assert digest == "a7ffd6da42586c165b2b795a2bc5c59efdd1c69e22eadd6fbfa2f64c172670cb"


def test_rounds_share_lengths_but_no_first_block():
    first, second = requests_of_round("w32", 0), requests_of_round("w32", 1)
    assert totals(first) == totals(second)
    assert not {tuple(ids[:16]) for ids, _ in first} & {tuple(ids[:16]) for ids, _ in second}
    assert all(20 <= token_id < 49_000 for ids, _ in second for token_id in ids)
