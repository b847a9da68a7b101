"""From a caller's prompt and parameters to a checked request: every refusal names its parameter."""

import copy
import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer as Backend
from tokenizers import processors

from minivllm.engine.input_processor import (
    MAX_BAD_WORDS_TOKENS,
    MAX_TRUNCATED_CHARS,
    InputProcessor,
    check_fits_pool,
    check_request_id,
    normalize_messages,
)
from minivllm.engine.tokenizer import TemplateTraits, Tokenizer
from minivllm.errors import ClientError, ConfigError, ContextLengthError, InvalidRequestError
from minivllm.sampling_params import SamplingParams

from .tiny_tokenizers import CHAT_TEMPLATE, SPECIAL, TEXT, tiny_tokenizer, wrap

TOKENIZER = tiny_tokenizer("byte_level", CHAT_TEMPLATE)
VOCAB_SIZE = TOKENIZER.vocab_size + 8  # the logits are wider than the tokenizer
MAX_MODEL_LEN = 64
EOS = TOKENIZER.eos_token_id


def type_name(value: object) -> str:
    """A test id for values that do not print well."""
    return type(value).__name__


def processor(**changes: object) -> InputProcessor:
    settings = {"vocab_size": VOCAB_SIZE, "max_model_len": MAX_MODEL_LEN, "eos_token_ids": (EOS, 7)}
    return InputProcessor(**({"tokenizer": TOKENIZER} | settings | changes))


def refused(
    parameter: str, prompt: object = "abc", params: SamplingParams | None = None, **options: object
) -> ClientError:
    with pytest.raises(ClientError) as caught:
        processor().process("r", prompt, params, **options)
    assert caught.value.parameter == parameter
    return caught.value


# ---------------------------------------------------------------------- prompts
@pytest.mark.parametrize("form", ["text", "dict", "ids", "dict of ids", "tuple", "both"])
def test_every_form_of_a_prompt_gives_its_token_ids(form):
    text = "Hello world"
    ids = TOKENIZER.encode(text)
    prompt = {
        "text": text,
        "dict": {"prompt": text},
        "ids": ids,
        "dict of ids": {"prompt_token_ids": ids},
        "tuple": tuple(ids),
        "both": {"prompt": text, "prompt_token_ids": ids},
    }[form]
    request = processor().process("r", prompt)
    assert request.prompt_token_ids == ids
    assert request.prompt == (None if form in ("ids", "dict of ids", "tuple") else text)
    assert request.request_id == "r"


@pytest.mark.parametrize(
    ("prompt", "parameter"),
    [
        ("", "prompt"),
        ([], "prompt"),
        ({}, "prompt"),
        (None, "prompt"),
        (5, "prompt"),
        ({"prompt": ""}, "prompt"),
        ({"prompt": 5}, "prompt"),
        ({"prompt": ["a"]}, "prompt"),
        ({"prompt": 5, "prompt_token_ids": [1]}, "prompt"),
        ({"prompt_token_ids": []}, "prompt_token_ids"),
        ({"prompt_token_ids": "abc"}, "prompt_token_ids"),
        ({"prompt_embeds": "AAAA"}, "prompt"),
        ({"prompt": "a", "multi_modal_data": {}}, "prompt"),
        (["a", "b"], "prompt"),
        ([1, True], "prompt"),
        ([1, 2.0], "prompt"),
        ([1, None], "prompt"),
        ([[1]], "prompt"),
        ([-1], "prompt"),
        ([VOCAB_SIZE], "prompt"),
        ([10**5000], "prompt"),
        ({"prompt_token_ids": [2**31]}, "prompt_token_ids"),
        ("a \ud800 b", "prompt"),
        ("x" * 10_000_000, "prompt"),
    ],
    ids=type_name,
)
def test_a_bad_prompt_is_refused_by_name(prompt, parameter):
    message = refused(parameter, prompt).message
    assert 0 < len(message) < 400


def test_ids_that_only_the_logits_have_are_allowed():
    ids = [TOKENIZER.vocab_size, VOCAB_SIZE - 1, 0]
    assert processor().process("r", ids).prompt_token_ids == ids


def test_text_beyond_the_logits_is_refused():
    small = processor(vocab_size=20, eos_token_ids=())
    with pytest.raises(InvalidRequestError, match="in \\[0, 19\\]"):
        small.process("r", TEXT[0])


def test_the_callers_list_is_copied():
    ids = [5, 6, 7]
    request = processor().process("r", ids)
    ids.append(8)
    assert request.prompt_token_ids == [5, 6, 7]


def test_a_prompt_may_fill_the_context_but_for_one_token():
    request = processor().process("r", [5] * (MAX_MODEL_LEN - 1), SamplingParams(max_tokens=None))
    assert request.max_tokens == 1
    error = refused("prompt", [5] * MAX_MODEL_LEN)
    assert isinstance(error, ContextLengthError) and error.code == "context_length_exceeded"
    assert f"{MAX_MODEL_LEN} tokens" in error.message and "shorten it by 1" in error.message


def test_a_text_that_cannot_fit_is_refused_before_it_is_tokenised(monkeypatch):
    monkeypatch.setattr(type(TOKENIZER), "encode", lambda *_: pytest.fail("tokenised"))
    limit = MAX_MODEL_LEN * TOKENIZER.max_chars_per_token
    error = refused("prompt", "x" * (limit + 1))
    assert isinstance(error, ContextLengthError)
    assert f"{limit + 1} characters" in error.message


def test_a_text_that_makes_no_token_is_refused():
    spaces = processor(tokenizer=tiny_tokenizer("word_piece"))
    with pytest.raises(InvalidRequestError, match="no token"):
        spaces.process("r", "   ")


def test_without_a_tokenizer_only_ids_are_accepted():
    bare = processor(tokenizer=None)
    assert bare.process("r", [1, 2]).prompt_token_ids == [1, 2]
    for prompt, params, name in [
        ("text", None, "prompt"),
        ([1], SamplingParams(stop=["x"]), "stop"),
        ([1], SamplingParams(bad_words=["x"]), "bad_words"),
    ]:
        with pytest.raises(InvalidRequestError, match="tokenizer") as caught:
            bare.process("r", prompt, params)
        assert caught.value.parameter == name
    with pytest.raises(InvalidRequestError, match="tokenizer"):
        bare.render_chat([{"role": "user", "content": "Hi"}])


# ---------------------------------------------------------------------- max_tokens and room
def test_max_tokens_is_lowered_to_the_room_and_the_caller_can_tell():
    ids = [5] * 60
    request = processor().process("r", ids, SamplingParams(max_tokens=100))
    assert (request.max_tokens, request.sampling_params.max_tokens, request.max_tokens_clamped) == (4, 4, True)
    request = processor().process("r", ids, SamplingParams(max_tokens=4))
    assert (request.max_tokens, request.max_tokens_clamped) == (4, False)
    request = processor().process("r", ids, SamplingParams(max_tokens=None))
    assert (request.max_tokens, request.max_tokens_clamped) == (4, False)


def test_min_tokens_beyond_the_room_is_refused():
    refused("min_tokens", [5] * 60, SamplingParams(max_tokens=100, min_tokens=50))


def test_the_callers_sampling_params_are_not_changed():
    params = SamplingParams(max_tokens=1000, stop=["x"], logit_bias={1: 2.0})
    before = copy.deepcopy(params)
    processor().process("r", "abc", params)
    assert params == before


@settings(max_examples=100, deadline=None, derandomize=True, database=None)
@given(st.integers(1, 200), st.integers(0, 200), st.integers(1, 20), st.integers(1, 17))
def test_a_request_fits_the_pool_exactly_when_its_tokens_do(num_prompt, max_tokens, num_blocks, block_size):
    fits = num_prompt + max_tokens <= num_blocks * block_size
    try:
        check_fits_pool(num_prompt, max_tokens, num_blocks, block_size)
    except ContextLengthError as error:
        assert not fits
        for number in (num_prompt, max_tokens, num_prompt + max_tokens, num_blocks, block_size):
            assert str(number) in error.message
    else:
        assert fits


def test_a_request_that_can_never_fit_the_pool_is_refused_and_an_open_one_takes_what_there_is():
    small = processor(num_blocks=3, block_size=8)
    with pytest.raises(ContextLengthError, match="10 prompt tokens \\+ 20 max_tokens = 30 tokens need 4 blocks of 8"):
        small.process("r", [5] * 10, SamplingParams(max_tokens=20))
    assert small.process("r", [5] * 10, SamplingParams(max_tokens=None)).max_tokens == 14
    assert small.process("r", [5] * 10, SamplingParams(max_tokens=14)).max_tokens == 14
    with pytest.raises(ContextLengthError) as caught:
        small.process("r", [5] * 24, SamplingParams(max_tokens=None))
    assert caught.value.parameter == "prompt"
    with pytest.raises(ContextLengthError):
        small.process_pooling("r", [5] * 25)


# ---------------------------------------------------------------------- sampling parameters
def test_none_means_the_models_own_defaults():
    config = {
        "temperature": 0.6,
        "top_p": 0.9,
        "top_k": 40,
        "min_p": 0.1,
        "repetition_penalty": 1.1,
        "max_new_tokens": 9,
        "eos_token_id": 2,
        "do_sample": True,
    }
    params = processor(generation_config=config).process("r", "abc").sampling_params
    assert (params.temperature, params.top_p, params.top_k, params.min_p) == (0.6, 0.9, 40, 0.1)
    assert (params.repetition_penalty, params.max_tokens) == (1.1, 9)
    assert processor().process("r", "abc").sampling_params == SamplingParams()


def test_a_callers_value_wins_over_the_models_default():
    with_defaults = processor(generation_config={"temperature": 0.6, "top_p": 0.9, "top_k": None})
    params = with_defaults.default_sampling_params(top_p=0.5, max_tokens=None)
    assert (params.temperature, params.top_p, params.max_tokens) == (0.6, 0.5, None)
    with pytest.raises(InvalidRequestError) as caught:
        with_defaults.default_sampling_params(top_p=2)
    assert caught.value.parameter == "top_p"


def test_a_bad_generation_config_is_found_at_start_up():
    with pytest.raises(ConfigError, match="generation_config.json: temperature"):
        processor(generation_config={"temperature": 9})


@pytest.mark.parametrize("name", ["stop_token_ids", "allowed_token_ids", "logit_bias"])
@pytest.mark.parametrize("token_id", [VOCAB_SIZE, 10**9])
def test_token_ids_are_compared_with_the_logits_width(name, token_id):
    def value(i):
        return {i: 1.0} if name == "logit_bias" else [i]

    message = refused(name, params=SamplingParams(**{name: value(token_id)})).message
    assert str(VOCAB_SIZE - 1) in message
    processor().process("r", "abc", SamplingParams(**{name: value(VOCAB_SIZE - 1)}))


def test_bad_words_are_spelled_at_the_start_and_behind_a_blank():
    request = processor().process("r", "abc", SamplingParams(bad_words=["the", " the", "zq"]))
    spelled = [TOKENIZER.decode(ids) for ids in request.bad_words_token_ids]
    assert spelled == ["the", " the", "zq", " zq"]


def test_bad_words_make_a_bounded_number_of_tokens():
    words = [f"{'Ω' * 40}{i}" for i in range(20)]
    message = refused("bad_words", params=SamplingParams(bad_words=words)).message
    assert str(MAX_BAD_WORDS_TOKENS) in message
    refused("bad_words", params=SamplingParams(bad_words=["\udc00"]))


def test_eos_and_stop_ids_reach_the_core():
    request = processor().process("r", "abc", SamplingParams(stop_token_ids=[9]))
    assert request.eos_token_ids == {EOS, 7}
    assert request.stop_token_ids == {EOS, 7, 9}
    request = processor().process("r", "abc", SamplingParams(stop_token_ids=[9], ignore_eos=True))
    assert (request.eos_token_ids, request.stop_token_ids) == (frozenset(), {9})


def test_a_given_seed_is_kept_and_others_follow_the_engines():
    assert processor().process("r", "abc", SamplingParams(seed=-5)).seed == -5
    first, again = processor(seed=3), processor(seed=3)
    drawn = [first.process("r", "abc").seed for _ in range(3)]
    assert drawn == [again.process("r", "abc").seed for _ in range(3)]
    assert len(set(drawn)) == 3
    assert all(0 <= seed < 2**63 for seed in drawn)


@pytest.mark.parametrize("salt", ["", "x" * 129, 5, "\ud800"], ids=type_name)
def test_a_bad_cache_salt_is_refused(salt):
    refused("cache_salt", cache_salt=salt)
    refused("cache_salt", prompt={"prompt": "abc", "cache_salt": salt})


def test_a_cache_salt_is_kept():
    assert processor().process("r", {"prompt": "abc", "cache_salt": "s"}).cache_salt == "s"
    assert processor().process("r", "abc", cache_salt="x" * 128).cache_salt == "x" * 128
    assert processor().process("r", "abc").cache_salt is None


@pytest.mark.parametrize("priority", [None, 1.0, True, "1", 2**63, 10**5000], ids=type_name)
def test_a_bad_priority_is_refused(priority):
    refused("priority", priority=priority)


def test_arrival_is_stamped_by_the_engines_clock():
    assert processor(clock=lambda: 12.5).process("r", "abc").arrival_time == 12.5
    assert processor().process("r", "abc", arrival_time=1.0).arrival_time == 1.0


def test_a_pooling_request_may_fill_the_context():
    request = processor().process_pooling("r", [5] * MAX_MODEL_LEN)
    assert request.sampling_params is None and request.max_tokens == 0
    with pytest.raises(ContextLengthError):
        processor().process_pooling("r", [5] * (MAX_MODEL_LEN + 1))


# ---------------------------------------------------------------------- chat
PLAIN = TemplateTraits()
LISTS = TemplateTraits(loops_over_content=True)
BOTH = TemplateTraits(loops_over_content=True, tests_for_string=True)


def user(content: object) -> list[dict]:
    return [{"role": "user", "content": content}]


def test_a_conversation_becomes_a_prompt_without_a_second_bos():
    prompt = processor().render_chat(user("Hi"))
    assert prompt["prompt"] == "<|user|>Hi</s><|assistant|>"
    assert prompt["prompt_token_ids"] == TOKENIZER.encode(prompt["prompt"], add_special_tokens=False)
    assert processor().process("r", prompt).prompt_token_ids == prompt["prompt_token_ids"]


def test_a_conversation_that_cannot_fit_is_refused_before_it_is_tokenised():
    with pytest.raises(ContextLengthError) as caught:
        processor().render_chat(user("x" * 100_000))
    assert caught.value.parameter == "messages"


def test_continuing_and_beginning_a_message_exclude_each_other():
    with pytest.raises(InvalidRequestError) as caught:
        processor().render_chat(user("Hi"), continue_final_message=True)
    assert caught.value.parameter == "continue_final_message"


def text_part(text: str) -> dict:
    return {"type": "text", "text": text}


@pytest.mark.parametrize(
    ("content", "traits", "expected"),
    [
        ("a", PLAIN, "a"),
        ("a", BOTH, "a"),
        ("a", LISTS, [text_part("a")]),
        ([text_part("a"), {"type": "text", "text": "b", "cache": 1}], PLAIN, "a\nb"),
        ([text_part("a"), text_part("b")], LISTS, [text_part("a"), text_part("b")]),
        ([text_part("a"), text_part("b")], BOTH, [text_part("a"), text_part("b")]),
        ([], PLAIN, ""),
    ],
)
def test_content_takes_the_form_that_the_template_reads(content, traits, expected):
    assert normalize_messages(user(content), traits)[0]["content"] == expected


def test_developer_becomes_system_where_the_template_does_not_know_it():
    messages = [
        {"role": "system", "content": "a"},
        {"role": "user", "content": "b"},
        {"role": "developer", "content": [text_part("c")]},
    ]
    assert normalize_messages(messages, PLAIN) == [{"role": "system", "content": "a\n\nc"}, *user("b")]
    knows = TemplateTraits(knows_developer=True)
    assert [m["role"] for m in normalize_messages(messages, knows)] == ["system", "user", "developer"]
    two_systems = [{"role": "system", "content": "a"}, *user("b"), {"role": "system", "content": "c"}]
    assert normalize_messages(two_systems, PLAIN) == two_systems


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [('{"a": 1}', {"a": 1}), ({"a": 1}, {"a": 1}), ("", {}), (None, {}), ("{bad", {}), ("[1]", {}), ("[" * 99999, {})],
    ids=type_name,
)
def test_tool_call_arguments_become_an_object(arguments, expected, caplog):
    call = {"id": "1", "type": "function", "function": {"name": "f", "arguments": arguments}}
    message = {"role": "assistant", "content": None, "tool_calls": [call]}
    result = normalize_messages([message], PLAIN)[0]
    assert result["tool_calls"][0]["function"] == {"name": "f", "arguments": expected}
    assert "content" not in result
    assert call["function"]["arguments"] == arguments
    assert ("[0].tool_calls[0].function.arguments is no JSON object" in caplog.text) == bool(arguments and not expected)


def test_empty_tool_calls_and_null_fields_are_dropped_and_tool_results_become_text():
    messages = [
        {"role": "assistant", "content": "a", "tool_calls": [], "name": None},
        {"role": "tool", "content": [text_part("r"), text_part("s")], "tool_call_id": "1"},
    ]
    assert normalize_messages(messages, LISTS) == [
        {"role": "assistant", "content": [text_part("a")]},
        {"role": "tool", "content": "r\ns", "tool_call_id": "1"},
    ]


@pytest.mark.parametrize(
    "messages",
    [
        [],
        None,
        "hi",
        {},
        [None],
        ["hi"],
        [[]],
        [{}],
        [{"role": "user"}],
        [{"content": "a"}],
        [{"role": "", "content": "a"}],
        [{"role": 5, "content": "a"}],
        [{"role": 10**5000, "content": "a"}],
        user(None),
        user(5),
        user({"type": "text", "text": "a"}),
        user([5]),
        user([{"type": "text"}]),
        user([{"type": "text", "text": 5}]),
        user([{"type": "image_url", "image_url": {"url": "file:///etc/passwd"}}]),
        user([{"type": ["text"]}]),
        user("\ud800"),
        [{"role": "assistant", "content": None}],
        [{"role": "assistant", "content": None, "tool_calls": 5}],
        [{"role": "assistant", "content": None, "tool_calls": [5]}],
        [{"role": "assistant", "content": None, "tool_calls": [{"type": "custom", "function": {}}]}],
        user("a") * 2049,
    ],
    ids=type_name,
)
def test_bad_messages_are_refused(messages):
    with pytest.raises(InvalidRequestError) as caught:
        processor().render_chat(messages)
    assert caught.value.parameter == "messages"
    assert len(caught.value.message) < 400


@pytest.mark.parametrize("tools", [5, "x", [5], [{}] * 129])
def test_bad_tools_are_refused(tools):
    with pytest.raises(InvalidRequestError) as caught:
        processor().render_chat(user("Hi"), tools=tools)
    assert caught.value.parameter == "tools"


@pytest.mark.parametrize(
    ("field", "value"), [("n", 0), ("n", 1000), ("top_k", -5), ("temperature", math.nan), ("seed", "x"), ("stop", [""])]
)
def test_parameters_changed_after_they_were_checked_are_checked_again(field, value):
    """n = 0 made generate wait for ever, and a bad top_k failed the other requests of its step."""
    params = SamplingParams()
    setattr(params, field, value)
    refused(field, params=params)


# ---------------------------------------------------------------------- truncation
def framing_tokenizer() -> Tokenizer:
    """As BERT's: puts a token in front of every prompt and one behind it."""
    backend = Backend.from_str(TOKENIZER.backend.to_str())
    special = [(token, backend.token_to_id(token)) for token in SPECIAL[1:]]
    backend.post_processor = processors.TemplateProcessing(single="<s> $A </s>", special_tokens=special)
    return wrap(backend)


BERT = framing_tokenizer()


def lengths(**options: object) -> tuple[int, int | None]:
    """(tokens, truncated_to) of a prompt of 20 tokens."""
    request = processor().process("r", list(range(20)), **options)
    return len(request.prompt_token_ids), request.truncated_to


def test_a_prompt_is_cut_only_on_request_and_only_when_it_is_longer():
    assert lengths() == (20, None)
    assert lengths(truncate_prompt_tokens=None) == (20, None)
    assert lengths(truncate_prompt_tokens=20) == lengths(truncate_prompt_tokens=-1) == (20, None)
    assert lengths(truncate_prompt_tokens=7) == (7, 7)


def test_minus_one_is_the_longest_prompt_that_fits():
    long = [5] * 100
    generating = processor().process("r", long, truncate_prompt_tokens=-1)
    assert (len(generating.prompt_token_ids), generating.truncated_to) == (MAX_MODEL_LEN - 1, MAX_MODEL_LEN - 1)
    pooling = processor().process_pooling("r", long, truncate_prompt_tokens=-1)
    assert (len(pooling.prompt_token_ids), pooling.truncated_to) == (MAX_MODEL_LEN, MAX_MODEL_LEN)
    # all of the context was asked for: the room for the output is left nevertheless, and said
    assert processor().process("r", long, truncate_prompt_tokens=MAX_MODEL_LEN).truncated_to == MAX_MODEL_LEN - 1


def test_a_generating_model_keeps_the_end_and_an_embedding_model_the_beginning():
    ids = list(range(20))
    assert processor().process("r", ids, truncate_prompt_tokens=5).prompt_token_ids == ids[-5:]
    assert processor().process_pooling("r", ids, truncate_prompt_tokens=5).prompt_token_ids == ids[:5]
    for method in (processor().process, processor().process_pooling):
        options = {"truncate_prompt_tokens": 5}
        assert method("r", ids, truncation_side="right", **options).prompt_token_ids == ids[:5]
        assert method("r", ids, truncation_side="left", **options).prompt_token_ids == ids[-5:]


@pytest.mark.parametrize("side", ["left", "right"])
def test_a_text_that_is_cut_keeps_the_tokens_around_it(side):
    """The first and the last token of a BERT belong to every prompt, however short it is."""
    text = "the quick brown fox jumps over the lazy dog"
    first, *inner, last = BERT.encode(text)
    words = processor(tokenizer=BERT, vocab_size=BERT.vocab_size, eos_token_ids=())
    request = words.process_pooling("r", text, truncate_prompt_tokens=6, truncation_side=side)
    kept = inner[:4] if side == "right" else inner[-4:]
    assert request.prompt_token_ids == [first, *kept, last] and request.truncated_to == 6
    assert request.prompt is None  # the text is not what the model sees
    bare = words.process_pooling("r", text, truncate_prompt_tokens=6, truncation_side=side, add_special_tokens=False)
    assert bare.prompt_token_ids == (inner[:6] if side == "right" else inner[-6:])
    with pytest.raises(InvalidRequestError, match="at least 3") as caught:
        words.process_pooling("r", text, truncate_prompt_tokens=2)
    assert caught.value.parameter == "truncate_prompt_tokens"


def test_a_text_too_long_for_the_context_may_be_cut():
    text = "the lazy dog " * 4000
    refused("prompt", text)
    request = processor().process("r", text, truncate_prompt_tokens=-1)
    assert request.prompt_token_ids == TOKENIZER.encode(text)[-(MAX_MODEL_LEN - 1) :]
    refused("prompt", "x" * (MAX_TRUNCATED_CHARS + 1), truncate_prompt_tokens=-1)


@pytest.mark.parametrize(
    ("options", "parameter"),
    [
        ({"truncate_prompt_tokens": 0}, "truncate_prompt_tokens"),
        ({"truncate_prompt_tokens": -2}, "truncate_prompt_tokens"),
        ({"truncate_prompt_tokens": MAX_MODEL_LEN + 1}, "truncate_prompt_tokens"),
        ({"truncate_prompt_tokens": True}, "truncate_prompt_tokens"),
        ({"truncate_prompt_tokens": 2.0}, "truncate_prompt_tokens"),
        ({"truncate_prompt_tokens": "5"}, "truncate_prompt_tokens"),
        ({"truncate_prompt_tokens": 10**5000}, "truncate_prompt_tokens"),
        ({"truncate_prompt_tokens": 5, "truncation_side": "middle"}, "truncation_side"),
        ({"truncation_side": "left"}, "truncation_side"),  # it would have no effect
    ],
    ids=["0", "-2", "long", "true", "float", "text", "huge", "middle", "side only"],
)
def test_a_bad_truncation_is_refused_by_name(options, parameter):
    assert len(refused(parameter, **options).message) < 400


# ---------------------------------------------------------------------- request ids
@pytest.mark.parametrize("value", ["x", "0", "a b", "é" * 10, "x" * 256])
def test_any_text_may_be_a_request_id(value):
    assert check_request_id(value) == value


@pytest.mark.parametrize("value", [5, True, b"x", "", [], {}, "x" * 257, "\ud800"], ids=type_name)
def test_a_bad_request_id_is_refused_by_name(value):
    with pytest.raises(InvalidRequestError, match="request_id must be ") as caught:
        check_request_id(value)
    assert caught.value.parameter == "request_id" and len(caught.value.message) < 400
