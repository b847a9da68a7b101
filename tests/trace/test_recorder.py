"""What a trace says against what the engine really held, decided, wrote and drew."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from minivllm import LLM, SamplingParams, ServerError, StructuredOutputsParams
from minivllm.errors import ClientError
from minivllm.trace import Trace, record
from minivllm.trace.records import Aborted, CacheReset
from tests.trace.conftest import PARAMS, PROMPTS

GREEDY = SamplingParams(temperature=0, max_tokens=6, ignore_eos=True)


def test_a_traced_run_gives_the_same_tokens_as_one_that_nobody_watches(crowded: Callable[[], LLM], trace: Trace):
    outputs = crowded().generate(PROMPTS, PARAMS, use_tqdm=False)
    traced = [trace.output_token_ids(request_id) for request_id in trace.request_ids]
    assert traced == [output.outputs[0].token_ids for output in outputs]
    assert [trace.prompt_of(key).prompt for key in trace.request_ids] == PROMPTS


def test_every_decision_table_and_slot_is_the_engine_s_own(crowded: Callable[[], LLM]):
    engine = crowded().llm_engine
    for prompt in PROMPTS:
        engine.add_request(prompt, PARAMS)
    pool = engine.scheduler.kv_cache.pool
    execute, seen = engine._executor.execute_model, []

    def look(step, bitmask):
        tables = {key: table.block_ids for key, table in engine.scheduler.kv_cache.tables.items()}
        hashes = {block.block_id: block.block_hash.hex()[:16] for block in pool.blocks if block.block_hash}
        seen.append((tables, hashes, pool.num_free_blocks, [tuple(d) for d in engine.decisions()]))
        result = execute(step, bitmask)
        states = engine._executor._runner.states
        lengths.append({key: states[key].num_computed_tokens for key in step.num_scheduled_tokens})
        return result

    lengths: list[dict[str, int]] = []
    engine._executor.execute_model = look
    with record(engine) as trace:
        while engine.has_unfinished_requests():
            engine.step()
    assert any(row.action == "preempt" for step in trace.steps for row in step.rows)
    assert any(row.prefix_hits for step in trace.steps for row in step.rows)
    moments = list(trace.moments())
    assert len(moments) == len(seen) > 20
    for moment, (tables, hashes, num_free, decisions), computed in zip(moments, seen, lengths, strict=True):
        step = moment.step
        assert moment.tables == tables and moment.hashes == hashes and step.num_free_blocks == num_free
        assert [(row.request_id, row.action, row.num_scheduled_tokens) for row in step.rows] == [
            decision[:3] for decision in decisions
        ]
        for row in step.rows:
            if row.num_scheduled_tokens:
                positions = range(computed[row.request_id], computed[row.request_id] + row.num_scheduled_tokens)
                block_ids = tables[row.request_id]
                assert row.num_computed_tokens == computed[row.request_id]
                assert row.slot_mapping == [block_ids[p // 8] * 8 + p % 8 for p in positions]
            for block_id, block_hash in row.prefix_hits.items():
                assert hashes[block_id] == block_hash


def test_each_draw_says_where_u_fell_and_which_stages_changed_something(trace: Trace):
    draws = [draw for step in trace.steps for row in step.rows for draw in row.draws]
    assert draws
    for draw in draws:
        assert draw.low <= draw.u < draw.high and f"u = {draw.u:.4f}" in draw.why
        assert [stage.name for stage in draw.stages if stage.changed] == ["penalties", "temperature", "top_k", "top_p"]
        settings = {stage.name: stage.setting for stage in draw.stages if stage.setting is not None}
        assert settings == {"temperature": 0.8, "min_p": 0.0, "top_k": 20.0, "top_p": 0.9}
        numbers = [stage.num_left for stage in draw.stages]
        assert numbers == sorted(numbers, reverse=True) and numbers[0] == 320 and numbers[-1] <= 20
        after_penalties = draw.stages[5].top[0].probability
        assert draw.stages[-1].top[0].probability >= after_penalties
    assert {draw.text for draw in draws} - {""}


def test_a_greedy_draw_names_the_runner_up_and_its_digest_is_of_the_model_s_logits(llm: LLM):
    llm.reset_prefix_cache()
    runner, rows = llm.llm_engine._executor._runner, []
    compute = runner.model.compute_logits
    runner.model.compute_logits = lambda hidden: rows.append(compute(hidden)) or rows[-1].clone()
    try:
        trace = llm.trace("the value", GREEDY, num_top=2)
    finally:
        del runner.model.compute_logits
    draws = [draw for step in trace.steps for row in step.rows for draw in row.draws]
    assert len(draws) == len(rows) == 6
    for position, (draw, logits) in enumerate(zip(draws, rows, strict=True)):
        best = torch.topk(logits[0], 2).indices.tolist()
        assert draw.position == position and draw.u is None and draw.token_id == best[0]
        assert [one.token_id for one in draw.stages[-1].top] == best
        assert draw.why.startswith("greedy: ") and repr(draw.stages[-1].top[1].text) in draw.why
        assert draw.digest == hashlib.sha256(logits[0].numpy()).hexdigest()[:16]


def test_children_forced_tokens_and_aborts_are_told(llm: LLM):
    choice = SamplingParams(structured_outputs=StructuredOutputsParams(choice=["red green blue"]), max_tokens=20)
    outputs = []
    with record(llm.llm_engine) as trace:
        outputs += llm.generate("the", choice, use_tqdm=False)
        outputs += llm.generate("the", SamplingParams(n=2, max_tokens=3, ignore_eos=True), use_tqdm=False)
        for _ in llm.stream("the value", PARAMS):
            break
        assert llm.reset_prefix_cache()
    one, first, second, aborted = trace.request_ids
    assert trace.output_token_ids(one) == outputs[0].outputs[0].token_ids
    assert len(trace.output_token_ids(one)) > sum(
        len(row.draws) for step in trace.steps for row in step.rows if row.request_id == one
    )
    assert (first, second) == tuple(f"{i}_{outputs[1].request_id}" for i in (0, 1))
    assert trace.prompt_of(second).request_id == outputs[1].request_id
    assert [trace.output_token_ids(key) for key in (first, second)] == [o.token_ids for o in outputs[1].outputs]
    assert trace.text_of(first) == outputs[1].outputs[0].text
    assert trace.events[-2:] == [Aborted(aborted), CacheReset()]
    assert list(trace.moments())[-1].tables.keys() == {aborted}


def test_a_trace_that_begins_in_the_middle_knows_what_was_there(llm: LLM):
    engine, pool = llm.llm_engine, llm.llm_engine.scheduler.kv_cache.pool
    llm.reset_prefix_cache()
    stream = llm.stream("the value is what the value", PARAMS)
    next(stream)
    with record(engine) as trace:
        next(stream)
        hashes = {block.block_id: block.block_hash.hex()[:16] for block in pool.blocks if block.block_hash}
        tables = {key: table.block_ids for key, table in engine.scheduler.kv_cache.tables.items()}
    stream.close()
    (moment,) = trace.moments()
    assert moment.hashes == hashes and len(hashes) >= 2 and moment.tables == tables
    assert Trace.from_json(trace.to_json()) == trace


def test_a_step_that_raises_is_told(crowded: Callable[[], LLM], caplog: pytest.LogCaptureFixture):
    llm = crowded()
    runner = llm.llm_engine._executor._runner
    runner.path.forward = lambda batch: 1 / 0
    with caplog.at_level(logging.CRITICAL), record(llm.llm_engine) as trace, pytest.raises(ServerError):
        llm.generate("the", GREEDY, use_tqdm=False)
    assert trace.steps[0].failed and trace.steps[0].rows[0].finish_reason == "error"


def test_one_watcher_at_a_time_and_none_afterwards(llm: LLM):
    with record(llm.llm_engine), pytest.raises(ServerError, match="recorded already"):
        llm.trace("the", GREEDY)
    assert llm.llm_engine._watcher is None
    with pytest.raises(ZeroDivisionError), record(llm.llm_engine):
        1 / 0  # noqa: B018
    assert llm.llm_engine._watcher is None


# ------------------------------------------------------------------ the file
def test_a_file_is_written_as_it_comes_and_keeps_no_stages(llm: LLM, tmp_path: Path):
    llm.reset_prefix_cache()
    file, lines = tmp_path / "run.jsonl", []
    with record(llm.llm_engine, num_top=0, file=file) as trace:
        for _ in llm.stream("the value", GREEDY):
            lines.append(len(file.read_text().splitlines()))
    assert trace.events == [] and lines == [3, 4, 5, 6, 7, 8]
    (request_id,) = Trace.load(file).request_ids
    draws = [draw for step in Trace.load(file).steps for draw in step.row(request_id).draws]
    assert len(draws) == 6 and all(draw.digest and not draw.stages for draw in draws)
    assert Trace.load(file).requests[0].prompt_texts == []


def test_a_full_disk_ends_the_recording_and_not_the_run(llm: LLM, caplog: pytest.LogCaptureFixture):
    with caplog.at_level(logging.ERROR), record(llm.llm_engine, num_top=0, file="/dev/full"):
        (output,) = llm.generate("the value", GREEDY, use_tqdm=False)
    assert len(output.outputs[0].token_ids) == 6 and "the recording ends here" in caplog.text


def test_a_file_that_cannot_be_written_is_refused_before_anything_runs(llm: LLM, tmp_path: Path):
    with pytest.raises(ClientError, match="cannot write"), record(llm.llm_engine, file=tmp_path / "no" / "f"):
        pass
    assert llm.llm_engine._watcher is None
