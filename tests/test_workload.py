"""The comparison workloads are the published ones: a figure is only comparable when the work is the same."""

import hashlib
import json
import runpy
from pathlib import Path

import pytest

MODULE = runpy.run_path(str(Path(__file__).parents[1] / "benchmarks" / "workload.py"))
batches_of_round, WORKLOADS = MODULE["batches_of_round"], MODULE["WORKLOADS"]


def requests_of_round(name, round_index):
    """What is measured: the last batch."""
    return batches_of_round(name, round_index)[-1].requests


def totals(requests):
    """(number of requests, prompt tokens, output tokens)"""
    return len(requests), sum(len(ids) for ids, _ in requests), sum(n for _, n in requests)


@pytest.mark.parametrize(
    ("name", "published"),
    [
        ("w32", (32, 4560, 2531)),
        ("single", (1, 64, 128)),
        ("prompt1024", (1, 1024, 1)),
        ("shared_prefix", (1, 1088, 1)),
        ("json", (8, 512, 512)),
    ],
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


def first_blocks(batches):
    return [tuple(ids[:16]) for batch in batches for ids, _ in batch.requests]


@pytest.mark.parametrize("name", WORKLOADS)
def test_no_cache_answers_but_where_the_prefix_is_the_point(name):
    blocks = first_blocks(batches_of_round(name, 0)) + first_blocks(batches_of_round(name, 1))
    assert len(set(blocks)) == len(blocks) - (2 if name == "shared_prefix" else 0)


def test_the_second_prompt_shares_1024_tokens_and_not_the_next():
    first, second = (batch.requests[0][0] for batch in batches_of_round("shared_prefix", 3))
    assert first[:1024] == second[:1024]
    assert first[1024] != second[1024]


def test_the_records_to_copy_come_four_times_and_differ_by_round():
    texts = []
    for round_index in (0, 0, 1):
        batches_of_round("copy", round_index, lambda text: texts.append(text) or [1])
    assert texts[0] == texts[1] != texts[2]
    quarter = len(texts[0]) // 4
    assert texts[0] == texts[0][:quarter] * 4
    assert [json.loads(line)["price"] > 0 for line in texts[0].splitlines()] == [True] * 32
    with pytest.raises(ValueError, match="needs a tokenizer"):
        batches_of_round("copy", 0)


def test_only_the_measured_batch_has_the_schema():
    free, measured = batches_of_round("json", 0)
    assert (free.json_schema, measured.json_schema) == (None, MODULE["RECORDS_SCHEMA"])
