"""OutputProcessor: whatever way the tokens come, in whatever form the caller wants them, the text is the same; a
sequence ends once, and what breaks one request touches no other."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Sequence
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from minivllm.engine.detokenizer import IncrementalDetokenizer
from minivllm.engine.input_processor import EngineCoreRequest
from minivllm.engine.output_processor import OutputProcessor, ParentRequest, RequestOutputKind
from minivllm.engine.tokenizer import Tokenizer, byte_alphabet
from minivllm.errors import InvalidRequestError
from minivllm.outputs import CompletionOutput, EngineCoreOutput, Logprob, RequestOutput, TokenLogprobs
from minivllm.sampling_params import SamplingParams
from tests.engine.tiny_tokenizers import KINDS, tiny_tokenizer

CUMULATIVE, DELTA, FINAL_ONLY = RequestOutputKind
BYTES = tiny_tokenizer("byte_level")
EOS = BYTES.eos_token_id
PROMPT = BYTES.encode("The quick brown fox")


# ------------------------------------------------------------------ builders
def make_request(request_id: str = "r", prompt: Sequence[int] = PROMPT, **fields: Any) -> EngineCoreRequest:
    """A checked request; what is no field of EngineCoreRequest goes into its SamplingParams."""
    own = {name: fields.pop(name) for name in ("seed", "arrival_time") if name in fields}
    params = SamplingParams(**{"max_tokens": None, **fields})
    return EngineCoreRequest(request_id, "the text", list(prompt), params, **own)


def core(request_id: str, *token_ids: int, **fields: Any) -> EngineCoreOutput:
    """What a step brought for one sequence."""
    return EngineCoreOutput(request_id, list(token_ids), **fields)


def entry(token_id: int, logprob: float, rank: int = 1, *others: tuple[int, float]) -> TokenLogprobs:
    """The sampled token, its rank, and the most likely ones, best first."""
    return TokenLogprobs([token_id, *(t for t, _ in others)], [logprob, *(p for _, p in others)], rank)


def bytes_of(text: str) -> list[int]:
    """A token for every byte, whatever the merges say."""
    return [BYTES.get_vocab()[byte_alphabet()[byte]] for byte in text.encode()]


def cut(items: Sequence[int], cuts: Iterable[int]) -> list[Sequence[int]]:
    """The items in pieces; every cut is a position."""
    return [items[a:b] for a, b in itertools.pairwise([0, *sorted(set(cuts)), len(items)])]


class Run:
    """One request through an OutputProcessor: the outputs a caller got, and the ids the core was told to end."""

    def __init__(self, request: EngineCoreRequest, kind: RequestOutputKind = CUMULATIVE, tokenizer: Any = BYTES):
        self.processor = OutputProcessor(tokenizer)
        self.children = self.processor.add_request(request, kind)
        self.outputs: list[RequestOutput] = []
        self.told: list[str] = []

    def step(self, *outputs: EngineCoreOutput) -> list[RequestOutput]:
        processed = self.processor.process_outputs(outputs)
        self.outputs += processed.request_outputs
        self.told += processed.stopped_request_ids
        return processed.request_outputs

    def pieces(self, pieces: Sequence[Sequence[int]], finish_reason: str = "length", **end: Any) -> Run:
        """Every piece is a step; the last one ends the sequence in the core."""
        for piece in pieces[:-1]:
            self.step(core("r", *piece))
        self.step(core("r", *pieces[-1], finish_reason=finish_reason, **end))
        return self

    @property
    def last(self) -> CompletionOutput:
        return self.outputs[-1].outputs[0]

    def joined(self) -> tuple[str, list[int]]:
        """Text and tokens of all deltas."""
        parts = [output.outputs[0] for output in self.outputs]
        return "".join(part.text for part in parts), [token_id for part in parts for token_id in part.token_ids]


def read_one_by_one(
    tokenizer: Tokenizer, token_ids: Sequence[int], stop: Sequence[str], include: bool, min_tokens: int
) -> tuple[str, int, str | None]:
    """The oracle: (text, number of tokens, stop string), reading one character at a time."""
    detokenizer = IncrementalDetokenizer(tokenizer, PROMPT)
    pieces = [(detokenizer.append([token_id]), number) for number, token_id in enumerate(token_ids, 1)]
    text = ""
    for piece, num_tokens in [*pieces, (detokenizer.flush(), len(token_ids))]:
        for char in piece:
            text += char
            found = max((s for s in stop if text.endswith(s)), key=len, default=None)
            if found is not None and num_tokens > min_tokens:
                return text if include else text.removesuffix(found), num_tokens, found
    return text, len(token_ids), None


def check_all_kinds(
    tokenizer: Tokenizer,
    token_ids: Sequence[int],
    cuts: Iterable[int],
    stop: Sequence[str] = (),
    include: bool = False,
    min_tokens: int = 0,
) -> None:
    """Deltas joined = the whole text = the only output, and all of them what the oracle reads."""
    params = {"stop": list(stop), "include_stop_str_in_output": include, "min_tokens": min_tokens}
    text, num_tokens, found = read_one_by_one(tokenizer, token_ids, stop, include, min_tokens)
    expected = (text, list(token_ids[:num_tokens]))
    pieces = cut(token_ids, cuts)
    runs = {kind: Run(make_request(**params), kind, tokenizer).pieces(pieces) for kind in RequestOutputKind}
    for run in runs.values():
        assert (run.last.finish_reason, run.last.stop_reason) == ("length" if found is None else "stop", found)
        assert run.processor.num_requests == 0
        # The core is told at most once, and only if it does not end the sequence in that very step.
        ends_in_last_piece = found is None or num_tokens > len(token_ids) - len(pieces[-1])
        assert run.told == ([] if ends_in_last_piece else ["r"])
    assert runs[DELTA].joined() == expected
    assert (runs[CUMULATIVE].last.text, runs[CUMULATIVE].last.token_ids) == expected
    assert (runs[FINAL_ONLY].last.text, runs[FINAL_ONLY].last.token_ids) == expected
    assert len(runs[FINAL_ONLY].outputs) == 1
    shown = [output.outputs[0].text for output in runs[CUMULATIVE].outputs]
    assert all(later.startswith(earlier) for earlier, later in itertools.pairwise(shown))


# ------------------------------------------------------------------ text: every cut, every kind
@pytest.mark.parametrize("stop", [(), (" o",), ("é", "x j")], ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_every_cut_of_the_tokens_gives_the_same_text_in_every_kind_of_output(kind: str, stop: tuple[str, ...]):
    tokenizer = tiny_tokenizer(kind)
    token_ids = tokenizer.encode("fox jé", False)[-4:] + tokenizer.encode("😀 over", False)[:6]
    for num_cuts in range(len(token_ids)):
        for cuts in itertools.combinations(range(1, len(token_ids)), num_cuts):
            check_all_kinds(tokenizer, token_ids, cuts, stop)


ids = st.lists(st.integers(3, BYTES.vocab_size - 1), min_size=1, max_size=14)  # most are bytes: halves of characters


@settings(max_examples=300, deadline=None, derandomize=True, database=None)
@given(ids, st.lists(st.integers(1, 13), max_size=6), st.data(), st.booleans(), st.integers(0, 4))
@example(bytes_of("a😀b"), [1, 2, 3, 4], None, False, 0)
def test_deltas_joined_are_the_whole_text_for_random_tokens_cuts_and_stop_strings(
    token_ids: list[int], cuts: list[int], data: Any, include: bool, min_tokens: int
):
    text = read_one_by_one(BYTES, token_ids, (), False, 0)[0]
    stop: list[str] = []
    if data is not None and text:
        starts = data.draw(st.lists(st.integers(0, len(text) - 1), max_size=3), label="stop strings begin at")
        stop = [text[start : start + data.draw(st.integers(1, 4), label="and have length")] for start in starts]
    inside = [position for position in cuts if position < len(token_ids)]
    check_all_kinds(BYTES, token_ids, inside, stop, include, min(min_tokens, len(token_ids)))


def test_half_a_character_waits_and_is_shown_as_unknown_at_the_end():
    first, second, third, fourth = bytes_of("😀")
    run = Run(make_request(), DELTA)
    run.step(core("r", first, second))
    run.step(core("r", third, fourth))
    run.step(core("r", first, finish_reason="length"))
    assert [output.outputs[0].text for output in run.outputs] == ["", "😀", "�"]


def test_text_continues_the_prompt_whose_last_bytes_begin_a_character():
    first, *rest = bytes_of("é")
    run = Run(make_request(prompt=[*PROMPT, first])).pieces([rest])
    assert run.last.text == "é"


# ------------------------------------------------------------------ stop strings
def test_a_stop_string_ends_the_sequence_and_the_core_is_told_once():
    letters = bytes_of("abc")
    run = Run(make_request(stop=["bc"]), DELTA)
    run.step(core("r", letters[0]))
    run.step(core("r", letters[1]))
    run.step(core("r", letters[2]))
    run.step(core("r", letters[0]))  # a step that was on its way when the sequence ended
    assert run.told == ["r"]
    texts = [(output.outputs[0].text, output.finished) for output in run.outputs]
    assert texts == [("a", False), ("", False), ("", True)]  # "b" was held back
    assert (run.last.finish_reason, run.last.stop_reason) == ("stop", "bc")
    assert run.joined()[1] == letters


def test_tokens_behind_the_one_that_completed_the_stop_string_are_dropped():
    """A step of several tokens must give what the same tokens give one by one."""
    token_ids = bytes_of("xaby")
    logprobs = [entry(token_id, -1.0) for token_id in token_ids]
    run = Run(make_request(stop=["ab"], logprobs=0))
    run.step(core("r", *token_ids, logprobs=logprobs))
    assert (run.last.text, run.last.token_ids) == ("x", token_ids[:3])
    assert len(run.last.logprobs) == 3 and run.last.cumulative_logprob == -3.0


def test_a_core_that_ends_the_sequence_in_the_same_step_is_not_told():
    [token_id] = bytes_of("a")
    run = Run(make_request(stop=["a"])).pieces([[token_id]], finish_reason="length")
    assert (run.last.text, run.last.finish_reason, run.last.stop_reason) == ("", "stop", "a")
    assert run.told == []


@pytest.mark.parametrize(("include", "text"), [(False, "fox "), (True, "fox over")])
def test_the_stop_string_is_shown_only_on_request(include: bool, text: str):
    token_ids = BYTES.encode("fox over the", False)
    run = Run(make_request(stop=["over"], include_stop_str_in_output=include)).pieces([token_ids])
    assert (run.last.text, run.last.stop_reason) == (text, "over")


@pytest.mark.parametrize(("min_tokens", "num_tokens"), [(0, 1), (1, 2), (2, 3), (3, 4)])
def test_the_text_of_the_first_min_tokens_tokens_completes_no_stop_string(min_tokens: int, num_tokens: int):
    [token_id] = bytes_of("a")
    run = Run(make_request(stop=["a"], min_tokens=min_tokens)).pieces([[token_id]] * 5)
    assert (len(run.last.token_ids), run.last.text) == (num_tokens, "a" * min_tokens)
    assert run.told == ["r"]


def test_what_only_looked_like_a_stop_string_is_shown_at_the_end():
    token_ids = BYTES.encode("fox ov", False)
    run = Run(make_request(stop=["over"]), DELTA)
    run.step(core("r", *token_ids))
    run.step(core("r", *bytes_of("e"), finish_reason="length"))
    assert [output.outputs[0].text for output in run.outputs] == ["fox ", "ove"]


def test_a_stop_string_that_only_the_end_completes_still_counts():
    """Half a character becomes U+FFFD when nothing can follow any more."""
    first = bytes_of("é")[0]
    run = Run(make_request(stop=["�"])).pieces([[first]], finish_reason="length")
    assert (run.last.text, run.last.finish_reason, run.last.stop_reason) == ("", "stop", "�")


# ------------------------------------------------------------------ eos and stop tokens
def test_the_text_of_the_token_that_ended_the_sequence_is_hidden_and_its_id_is_not():
    words = BYTES.encode("fox", False)
    [tool] = BYTES.encode("<tool>", False)  # an added token that is not special: it has text
    run = Run(make_request()).pieces([[*words, tool]], finish_reason="stop", stop_reason=tool)
    assert (run.last.text, run.last.token_ids) == ("fox", [*words, tool])
    assert (run.last.finish_reason, run.last.stop_reason) == ("stop", tool)
    ordinary = Run(make_request()).pieces([[*words, tool]], finish_reason="length")
    assert ordinary.last.text == "fox<tool>"  # the same token in the middle of an answer


@pytest.mark.parametrize(
    ("params", "text"),
    [
        ({}, "fox"),
        ({"include_stop_str_in_output": True}, "fox"),  # eos is special, and special tokens are skipped
        ({"include_stop_str_in_output": True, "skip_special_tokens": False}, "fox</s>"),
        ({"skip_special_tokens": False}, "fox"),
    ],
    ids=str,
)
def test_eos_is_shown_only_when_both_stops_and_special_tokens_are(params: dict[str, Any], text: str):
    words = BYTES.encode("fox", False)
    run = Run(make_request(**params)).pieces([[*words, EOS]], finish_reason="stop")
    assert (run.last.text, run.last.token_ids, run.last.stop_reason) == (text, [*words, EOS], None)


def test_held_back_text_is_shown_when_eos_ends_the_sequence():
    run = Run(make_request(stop=["over"])).pieces([[*BYTES.encode("fox ov", False), EOS]], finish_reason="stop")
    assert (run.last.text, run.last.stop_reason) == ("fox ov", None)


# ------------------------------------------------------------------ without text
@pytest.mark.parametrize(("tokenizer", "params"), [(None, {}), (BYTES, {"detokenize": False})], ids=["none", "off"])
def test_without_a_tokenizer_or_detokenisation_there_are_ids_and_no_text(tokenizer: Any, params: dict[str, Any]):
    run = Run(make_request(logprobs=1, **params), tokenizer=tokenizer)
    run.step(core("r", 5, logprobs=[entry(5, -1.0, 1, (5, -1.0))], finish_reason="length"))
    assert (run.last.text, run.last.token_ids) == ("", [5])
    assert run.last.logprobs == [{5: Logprob(-1.0, 1, None)}]


# ------------------------------------------------------------------ what an output holds
def test_an_output_is_a_copy_that_later_steps_do_not_change():
    run = Run(make_request(logprobs=0, prompt_logprobs=0))
    first = run.step(core("r", 7, logprobs=[entry(7, -1.0)], prompt_logprobs=[entry(9, -2.0)]))[0]
    run.step(core("r", 8, logprobs=[entry(8, -1.0)], finish_reason="length"))
    assert (first.outputs[0].token_ids, len(first.outputs[0].logprobs)) == ([7], 1)
    assert not first.finished and first.outputs[0].finish_reason is None
    assert "finished_time" not in first.metrics


def test_an_output_names_its_request_prompt_and_cached_tokens():
    run = Run(make_request())
    run.step(core("r", 7, num_cached_tokens=2, finish_reason="length"))
    output = run.outputs[0]
    assert (output.request_id, output.prompt, output.prompt_token_ids) == ("r", "the text", PROMPT)
    assert (output.num_cached_tokens, output.error) == (2, None)


def test_a_chunk_that_brings_no_token_is_no_output():
    run = Run(make_request(prompt_logprobs=0))
    assert run.step(core("r", prompt_logprobs=[entry(9, -2.0)])) == []


def test_metrics_say_when_the_request_came_when_its_first_token_and_when_it_ended():
    now = [10.0]
    processor = OutputProcessor(BYTES, clock=lambda: now[0])
    processor.add_request(make_request(arrival_time=3.0))
    first = processor.process_outputs([core("r", 7)]).request_outputs[0]
    assert first.metrics == {"arrival_time": 3.0, "first_token_time": 10.0}
    now[0] = 11.0
    last = processor.process_outputs([core("r", 7, finish_reason="length")]).request_outputs[0]
    assert last.metrics == {"arrival_time": 3.0, "first_token_time": 10.0, "finished_time": 11.0}


def test_first_token_time_is_taken_even_if_only_the_end_is_shown():
    now = [10.0]
    processor = OutputProcessor(BYTES, clock=lambda: now[0])
    processor.add_request(make_request(), FINAL_ONLY)
    assert processor.process_outputs([core("r", 7)]).request_outputs == []
    now[0] = 11.0
    last = processor.process_outputs([core("r", 7, finish_reason="length")]).request_outputs[0]
    assert (last.metrics["first_token_time"], last.metrics["finished_time"]) == (10.0, 11.0)


# ------------------------------------------------------------------ logprobs
def test_a_position_holds_the_sampled_token_first_and_every_token_once():
    a, b, c = bytes_of("abc")
    run = Run(make_request(logprobs=2))
    outside = entry(c, -5.0, 17, (a, -0.5), (b, -1.0))
    among = entry(b, -1.0, 3, (a, -0.5), (b, -1.0))  # counted with ties its rank is 3, in the list it is the second
    run.step(core("r", c, b, logprobs=[outside, among], finish_reason="length"))
    first, second = run.last.logprobs
    assert list(first.items()) == [(c, Logprob(-5.0, 17, "c")), (a, Logprob(-0.5, 1, "a")), (b, Logprob(-1.0, 2, "b"))]
    assert list(second.items()) == [(b, Logprob(-1.0, 2, "b")), (a, Logprob(-0.5, 1, "a"))]
    assert run.last.cumulative_logprob == -6.0


def test_deltas_bring_the_logprobs_of_their_own_tokens_and_the_sum_over_all():
    run = Run(make_request(logprobs=0), DELTA)
    run.step(core("r", 7, logprobs=[entry(7, -1.0)]))
    run.step(core("r", 8, 9, logprobs=[entry(8, -2.0), entry(9, -4.0)], finish_reason="length"))
    first, second = (output.outputs[0] for output in run.outputs)
    assert [list(position) for position in first.logprobs] == [[7]]
    assert [list(position) for position in second.logprobs] == [[8], [9]]
    assert (first.cumulative_logprob, second.cumulative_logprob) == (-1.0, -7.0)


def test_without_logprobs_there_is_no_sum_either():
    run = Run(make_request()).pieces([[7]])
    assert run.last.logprobs is None and run.last.cumulative_logprob is None


def prompt_entries(count: int) -> list[TokenLogprobs]:
    return [entry(token_id, -1.0) for token_id in PROMPT[1 : 1 + count]]


def test_prompt_logprobs_are_gathered_over_the_chunks_and_the_first_token_has_none():
    run = Run(make_request(prompt_logprobs=0))
    run.step(core("r", prompt_logprobs=prompt_entries(1)))
    run.step(core("r", 7, prompt_logprobs=prompt_entries(len(PROMPT))[1:]))
    run.step(core("r", 8, finish_reason="length"))
    for output in run.outputs:  # cumulative: all of them, every time
        assert output.prompt_logprobs[0] is None
        assert [list(position) for position in output.prompt_logprobs[1:]] == [[t] for t in PROMPT[1:]]


def test_deltas_bring_the_prompt_logprobs_once():
    run = Run(make_request(prompt_logprobs=0), DELTA)
    run.step(core("r", 7, prompt_logprobs=prompt_entries(len(PROMPT))))
    run.step(core("r", 8, finish_reason="length"))
    assert [output.prompt_logprobs and len(output.prompt_logprobs) for output in run.outputs] == [len(PROMPT), None]


def test_deltas_wait_with_the_prompt_logprobs_until_they_are_whole():
    """Child 1 finds its prompt in the cache and draws while child 0, which must compute every position, is at its
    first chunk. The first delta used to take what was there, and the rest was never sent."""
    run = Run(make_request(n=2, prompt_logprobs=0), DELTA)
    run.step(core("0_r", prompt_logprobs=prompt_entries(1)), core("1_r", 7))
    run.step(core("0_r", 7, prompt_logprobs=prompt_entries(len(PROMPT))[1:]), core("1_r", 8))
    run.step(core("0_r", 9, finish_reason="length"), core("1_r", 9, finish_reason="length"))
    found = [output.prompt_logprobs and len(output.prompt_logprobs) for output in run.outputs]
    assert found == [None, len(PROMPT), None]


# ------------------------------------------------------------------ n sequences
def test_a_single_sequence_is_the_request_itself():
    request = make_request()
    assert ParentRequest(request, BYTES).children == [request]


def test_children_have_numbered_ids_and_seeds_and_only_the_first_computes_prompt_logprobs():
    request = make_request(n=3, seed=41, prompt_logprobs=2, logprobs=1)
    children = ParentRequest(request, BYTES).children
    assert [child.request_id for child in children] == ["0_r", "1_r", "2_r"]
    assert [child.seed for child in children] == [41, 42, 43]
    assert [child.sampling_params.prompt_logprobs for child in children] == [2, None, None]
    assert all(child.sampling_params.n == 1 and child.sampling_params.logprobs == 1 for child in children)
    assert request.sampling_params.n == 3  # the caller's own is not changed


def test_seeds_stay_64_bit_integers():
    children = ParentRequest(make_request(n=2, seed=2**63 - 1), BYTES).children
    assert [child.seed for child in children] == [2**63 - 1, -(2**63)]


def test_candidates_that_are_only_compared_compute_their_own_logprobs():
    children = ParentRequest(make_request(n=1, best_of=2), BYTES).children
    assert [child.sampling_params.logprobs for child in children] == [0, 0]
    assert [child.sampling_params.best_of for child in children] == [None, None]


def test_the_answer_of_n_sequences_ends_with_the_last_of_them():
    run = Run(make_request(n=2))
    run.step(core("0_r", 7, finish_reason="length"))
    run.step(core("1_r", 8))
    run.step(core("1_r", 9, finish_reason="length"))
    assert [output.finished for output in run.outputs] == [False, False, True]
    assert [[c.token_ids for c in output.outputs] for output in run.outputs] == [[[7], []], [[7], [8]], [[7], [8, 9]]]
    assert [completion.index for completion in run.outputs[-1].outputs] == [0, 1]
    assert run.outputs[-1].outputs[0].finished()


def test_deltas_of_n_sequences_name_only_those_with_news():
    run = Run(make_request(n=2), DELTA)
    run.step(core("0_r", 7, finish_reason="length"), core("1_r", 8))
    run.step(core("1_r", 9))
    run.step(core("1_r", finish_reason="abort"))
    news = [[(c.index, c.token_ids, c.finish_reason) for c in output.outputs] for output in run.outputs]
    assert news == [[(0, [7], "length"), (1, [8], None)], [(1, [9], None)], [(1, [], "abort")]]


def test_both_sequences_of_one_step_are_one_output():
    run = Run(make_request(n=2))
    assert len(run.step(core("0_r", 7), core("1_r", 8))) == 1


def best_of(*logprobs: float, n: int = 1, **params: Any) -> Run:
    """best_of candidates of one token each: candidate i draws token 10 + i with the given logprob."""
    run = Run(make_request(n=n, best_of=len(logprobs), **params))
    for index, logprob in enumerate(logprobs):
        token_id = 10 + index
        run.step(core(f"{index}_r", token_id, logprobs=[entry(token_id, logprob)], finish_reason="length"))
    return run


def test_best_of_keeps_the_likeliest_and_says_nothing_before_all_have_ended():
    run = best_of(-3.0, -1.0, -4.0, -2.0, n=2)
    assert len(run.outputs) == 1
    kept = [(completion.index, completion.token_ids) for completion in run.outputs[0].outputs]
    assert kept == [(0, [11]), (1, [13])]  # best first, numbered anew


def test_of_equally_likely_candidates_the_earlier_one_is_kept():
    assert [c.token_ids for c in best_of(-2.0, -1.0, -1.0, -1.0, n=2).outputs[0].outputs] == [[11], [12]]


def test_a_candidate_whose_logprob_is_not_a_number_comes_last():
    kept = best_of(math.nan, -9.0, -math.inf, n=2).outputs[0].outputs
    assert [completion.token_ids for completion in kept] == [[11], [10]]  # nan counts as -inf, and came earlier


def test_logprobs_that_only_the_choice_needed_are_not_shown():
    assert best_of(-1.0, -2.0).last.logprobs is None
    assert best_of(-1.0, -2.0).last.cumulative_logprob == -1.0
    assert best_of(-1.0, -2.0, logprobs=0).last.logprobs == [{10: Logprob(-1.0, 1, BYTES.token_text(10))}]


def test_a_complete_candidate_is_better_than_a_likelier_one_that_failed():
    run = Run(make_request(n=1, best_of=2))
    run.step(core("0_r", 10, logprobs=[entry(10, -0.1)]))
    run.step(core("0_r", finish_reason="error", error="NaN"))
    run.step(core("1_r", 11, logprobs=[entry(11, -8.0)], finish_reason="length"))
    assert (run.last.token_ids, run.last.finish_reason) == ([11], "length")


def test_deltas_of_a_choice_are_one_output_with_everything():
    run = Run(make_request(n=1, best_of=2), DELTA)
    run.step(core("0_r", 10, logprobs=[entry(10, -1.0)]))
    run.step(core("0_r", 12, logprobs=[entry(12, -1.0)], finish_reason="length"))
    run.step(core("1_r", 11, logprobs=[entry(11, -9.0)], finish_reason="length"))
    assert len(run.outputs) == 1 and run.last.token_ids == [10, 12]


# ------------------------------------------------------------------ errors
def test_an_error_of_the_core_ends_the_request_and_says_why():
    run = Run(make_request())
    run.step(core("r", *BYTES.encode("fox", False)))
    run.step(core("r", finish_reason="error", error="the logits are NaN"))
    assert run.outputs[-1].finished and run.outputs[-1].error == "the logits are NaN"
    assert (run.last.text, run.last.finish_reason) == ("fox", "error")
    assert run.processor.num_requests == 0


def test_one_of_n_sequences_may_fail_and_the_other_goes_on():
    run = Run(make_request(n=2))
    run.step(core("0_r", finish_reason="error", error="NaN"), core("1_r", 8))
    run.step(core("1_r", 9, finish_reason="length"))
    assert [completion.finish_reason for completion in run.outputs[-1].outputs] == ["error", "length"]
    assert run.outputs[-1].outputs[1].token_ids == [8, 9] and run.outputs[-1].error == "NaN"


def break_token(monkeypatch: pytest.MonkeyPatch, bad_id: int) -> None:
    """A tokenizer that cannot spell one token."""
    good = BYTES.token_bytes

    def token_bytes(token_id: int) -> bytes:
        if token_id == bad_id:
            raise RuntimeError("a secret of this machine")
        return good(token_id)

    monkeypatch.setattr(BYTES, "token_bytes", token_bytes)


def test_a_detokenizer_that_fails_fails_one_request_and_tells_the_core(monkeypatch: pytest.MonkeyPatch):
    a, b = bytes_of("ab")
    break_token(monkeypatch, b)
    processor = OutputProcessor(BYTES)
    for request_id in ("good", "bad"):
        processor.add_request(make_request(request_id))
    processor.process_outputs([core("good", a), core("bad", a)])
    step = processor.process_outputs([core("bad", b), core("good", a)])
    assert step.stopped_request_ids == ["bad"]
    by_id = {output.request_id: output for output in step.request_outputs}
    assert by_id["bad"].finished and by_id["bad"].outputs[0].finish_reason == "error"
    assert by_id["bad"].error == "the output could not be processed (RuntimeError)"  # no inner words
    assert by_id["bad"].outputs[0].text == "a"  # what was shown stays
    last = processor.process_outputs([core("good", a, finish_reason="length")])
    assert last.request_outputs[0].outputs[0].text == "aaa" and processor.num_requests == 0


def test_a_detokenizer_that_fails_at_the_end_tells_the_core_nothing(monkeypatch: pytest.MonkeyPatch):
    [b] = bytes_of("b")
    break_token(monkeypatch, b)
    run = Run(make_request()).pieces([[b]], finish_reason="length")
    assert run.last.finish_reason == "error" and run.told == []


# ------------------------------------------------------------------ aborts
def test_an_abort_before_the_first_token_is_an_empty_last_output():
    run = Run(make_request())
    told, output = run.processor.abort_request("r")
    assert told == ["r"] and output.finished
    assert (output.outputs[0].token_ids, output.outputs[0].finish_reason) == ([], "abort")
    assert "first_token_time" not in output.metrics and "finished_time" in output.metrics


@pytest.mark.parametrize("kind", RequestOutputKind)
def test_an_abort_shows_what_was_held_back(kind: RequestOutputKind):
    run = Run(make_request(stop=["over"]), kind)
    run.step(core("r", *BYTES.encode("fox ov", False)))
    _, output = run.processor.abort_request("r")
    assert output.outputs[0].text == ("ov" if kind is DELTA else "fox ov")
    assert output.outputs[0].finish_reason == "abort"


def test_an_abort_ends_only_the_sequences_that_still_run():
    run = Run(make_request(n=2))
    run.step(core("0_r", 7, finish_reason="length"), core("1_r", 8))
    told, output = run.processor.abort_request("r")
    assert told == ["1_r"]
    assert [completion.finish_reason for completion in output.outputs] == ["length", "abort"]


def test_an_abort_of_a_choice_gives_the_best_of_what_is_there():
    run = Run(make_request(n=1, best_of=2))
    run.step(core("0_r", 10, logprobs=[entry(10, -0.1)]))
    run.step(core("1_r", 11, logprobs=[entry(11, -8.0)], finish_reason="length"))
    told, output = run.processor.abort_request("r")
    assert told == ["0_r"] and [completion.token_ids for completion in output.outputs] == [[11]]


def test_after_an_abort_late_outputs_and_a_second_abort_are_nothing():
    run = Run(make_request())
    run.processor.abort_request("r")
    assert run.step(core("r", 7, finish_reason="length")) == [] and run.told == []
    assert run.processor.abort_request("r") == ([], None)
    assert run.processor.abort_request("never there") == ([], None)


def test_an_abort_of_a_finished_request_is_nothing():
    run = Run(make_request()).pieces([[7]])
    assert run.processor.abort_request("r") == ([], None)


def test_an_abort_whose_text_cannot_be_made_is_an_error(monkeypatch: pytest.MonkeyPatch):
    run = Run(make_request())
    monkeypatch.setattr(IncrementalDetokenizer, "flush", lambda self: 1 / 0)
    told, output = run.processor.abort_request("r")
    assert told == ["r"]
    assert output.error == "the output could not be processed (ZeroDivisionError)"


# ------------------------------------------------------------------ ids
def test_an_id_that_is_in_use_is_refused_and_the_first_request_goes_on():
    run = Run(make_request())
    with pytest.raises(InvalidRequestError, match="request_id 'r' is in use") as caught:
        run.processor.add_request(make_request())
    assert caught.value.parameter == "request_id"
    run.pieces([[7]])
    assert run.last.token_ids == [7]
    run.processor.add_request(make_request())  # free again


def test_the_id_of_a_sequence_of_another_request_is_in_use_too():
    run = Run(make_request(n=2))
    with pytest.raises(InvalidRequestError, match="in use"):
        run.processor.add_request(make_request("1_r"))
    assert run.processor.num_requests == 1


# ------------------------------------------------------------------ embeddings
def pooling_request(request_id: str) -> EngineCoreRequest:
    return EngineCoreRequest(request_id, "the text", PROMPT, None)


def test_an_embedding_is_one_output_with_its_vector():
    run = Run(pooling_request("e"))
    [output] = run.step(core("e", finish_reason="stop", pooler_output=[0.6, 0.8]))
    assert (output.request_id, output.outputs.embedding, output.prompt_token_ids) == ("e", [0.6, 0.8], PROMPT)
    assert output.finished and output.error is None and run.processor.num_requests == 0


def test_a_failed_embedding_has_an_error_and_no_vector():
    run = Run(pooling_request("e"))
    [output] = run.step(core("e", finish_reason="error", error="NaN"))
    assert (output.outputs.embedding, output.error) == ([], "NaN")


def test_an_aborted_embedding_has_no_last_output():
    run = Run(pooling_request("e"))
    assert run.processor.abort_request("e") == (["e"], None)
    assert run.processor.num_requests == 0
