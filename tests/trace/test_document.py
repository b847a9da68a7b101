"""A trace's file: what is written is read again, and what is no trace is refused in words."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest

from minivllm import LLM, ClientError, SamplingParams, StructuredOutputsParams
from minivllm.sampling_params import AnswerForm, CallForm
from minivllm.trace import Trace
from minivllm.trace.document import event_line, plain
from minivllm.trace.records import EVENTS, Added, Draw, Row, Step, belongs_to


def test_a_trace_is_read_as_it_was_written(trace: Trace, tmp_path: Path):
    trace.save(tmp_path / "t.jsonl")
    again = Trace.load(tmp_path / "t.jsonl")
    assert again == trace and again.to_json() == trace.to_json()
    assert all(isinstance(json.loads(line), dict) for line in trace.lines())


FORM = AnswerForm(
    thinking="may",
    text=StructuredOutputsParams(json={"type": "object", "kind": "no record"}),
    calls=(CallForm("<call>", {"type": "object"}), CallForm("<other>", True, "</other>")),
)


@pytest.mark.parametrize(
    "params",
    [
        None,
        SamplingParams(),
        SamplingParams(
            temperature=0, logit_bias={3: 1.5, 40: -100.0}, max_tokens=None, stop=["a", "\ud83d"], logprobs=2
        ),
        SamplingParams(structured_outputs=StructuredOutputsParams(json={"type": "object"}), allowed_token_ids=[1, 2]),
        SamplingParams(structured_outputs=StructuredOutputsParams(choice=["a", "b"]), bad_words=["c"]),
        SamplingParams(structured_outputs=FORM, n=2),
    ],
)
def test_every_kind_of_sampling_params_survives(params: SamplingParams | None):
    added = Added("1", [1, 2], params, bad_words_token_ids=[[3], [4, 5]])
    line = event_line(added)
    read = Trace.from_json([json.dumps(HEADER), line]).events[0]
    assert read == added and line.encode() and type(read.sampling_params) is type(params)


HEADER = {"schema": "minivllm.trace", "version": 1}


def test_fields_with_their_default_are_left_out():
    assert plain(Row("1", "decode", "why")) == {"request_id": "1", "action": "decode", "reason": "why"}
    assert plain(Draw(0, 5, "ab", u=0.0))["u"] == 0.0  # 0.0 is not None
    assert plain(Step(3, [Row("1", "a", "b", prefix_hits={7: "ff"})]))["rows"][0]["prefix_hits"] == {7: "ff"}
    assert all(dataclasses.is_dataclass(kind) for kind in EVENTS.values())


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "expected a trace"),
        ("[1]", "line 1 of the trace is no JSON object"),
        ('{"schema": "minivllm.trace", "version": 2}', "version 2"),
        ('{"schema": "other", "version": 1}', "got 'other'"),
        (f'{json.dumps(HEADER)}\n{{"event": "step", "num', "line 2 of the trace is no JSON object"),
        (f'{json.dumps(HEADER)}\n{{"event": "nothing"}}', "no event 'nothing'"),
        (f'{json.dumps(HEADER)}\n{{"event": "step"}}', "a Step that is none"),
        (f'{json.dumps(HEADER)}\n{{"event": "step", "number": 1, "colour": 2}}', "a Step that is none"),
        (f'{json.dumps(HEADER)}\n{{"event": "step", "number": 1, "rows": 5}}', "a Step that is none"),
    ],
)
def test_what_is_no_trace_is_refused_in_words(text: str, message: str):
    with pytest.raises(ClientError, match=message):
        Trace.from_json(text)


def test_a_file_that_cannot_be_read_is_refused(tmp_path: Path):
    with pytest.raises(ClientError, match="cannot read"):
        Trace.load(tmp_path / "none")
    (tmp_path / "bytes").write_bytes(b"\xff\xfe")
    with pytest.raises(ClientError, match="not UTF-8"):
        Trace.load(tmp_path / "bytes")


def test_children_belong_to_their_parent_and_nobody_else():
    assert belongs_to("1-a", "1-a") and belongs_to("3_1-a", "1-a")
    assert not belongs_to("x_1-a", "1-a") and not belongs_to("1-ab", "1-a")


def test_the_llm_s_trace_takes_what_generate_takes(llm: LLM):
    params = [SamplingParams(max_tokens=n, ignore_eos=True) for n in (1, 3)]
    trace = llm.trace(["the", {"prompt_token_ids": [5, 6]}], params)
    assert [len(trace.output_token_ids(key)) for key in trace.request_ids] == [1, 3]
    assert trace.requests[1].prompt is None and len(trace.requests[1].prompt_texts) == 2
    with pytest.raises(ClientError, match="must hold at least one prompt"):
        llm.trace([])
