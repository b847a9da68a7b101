"""The tokenizer face: loading from folders and GGUF files, encode, decode, chat templates."""

import json
import threading
from pathlib import Path

import gguf
import pytest
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from minivllm.engine.tokenizer import Tokenizer, byte_alphabet, load_tokenizer, read_template_traits
from minivllm.errors import ConfigError, InvalidRequestError
from minivllm.hub import ModelSource, resolve_model

from .tiny_tokenizers import CHAT_TEMPLATE, KINDS, TEXT, tiny_tokenizer


# ---------------------------------------------------------------------- builders
def folder_source(path: Path) -> ModelSource:
    return ModelSource("folder", path, path.name)


def save_folder(path: Path, kind: str, **config: object) -> ModelSource:
    """A model folder with tokenizer.json and tokenizer_config.json, as transformers writes them."""
    tiny_tokenizer(kind).hf_tokenizer.save_pretrained(path)
    config_file = path / "tokenizer_config.json"
    config_file.write_text(json.dumps(json.loads(config_file.read_text()) | config))
    return folder_source(path)


def write_gguf(path: Path, *, pre: str = "gpt-2", model: str = "gpt2", **changes: object) -> ModelSource:
    """A file with a vocabulary and nothing else: control tokens, all bytes, some merges."""
    letters = byte_alphabet()
    merged = ["ĠĠ", "ĊĊ", "ĠĠĠ", "Ġa", "12"]
    tokens = ["<|end|>", "<|start|>", "<｜odd｜>", "<tool>", *letters.values(), *merged]
    merges = ["Ġ Ġ", "Ċ Ċ", "ĠĠ Ġ", "Ġ a", "1 2"]
    fields = {"bos": 1, "eos": 0, "add_bos": False, "template": CHAT_TEMPLATE} | changes
    writer = gguf.GGUFWriter(str(path), "llama")
    writer.add_tokenizer_model(model)
    writer.add_tokenizer_pre(pre)
    writer.add_token_list(tokens)
    writer.add_token_types([3, 3, 3, 4] + [1] * (len(tokens) - 4))
    writer.add_token_merges(merges)
    writer.add_bos_token_id(fields["bos"])
    writer.add_eos_token_id(fields["eos"])
    if fields["add_bos"] is not None:
        writer.add_add_bos_token(fields["add_bos"])
    if fields["template"]:
        writer.add_chat_template(fields["template"])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    return ModelSource("gguf", path, path.name)


@pytest.fixture(scope="module")
def default_tokenizer() -> Tokenizer:
    tokenizer = load_tokenizer(resolve_model(None, show_progress=False))
    assert tokenizer is not None
    return tokenizer


# ---------------------------------------------------------------------- folders
@pytest.mark.parametrize("kind", KINDS)
def test_a_folder_gives_the_ids_of_transformers(tmp_path, kind):
    tokenizer = load_tokenizer(save_folder(tmp_path, kind))
    theirs = AutoTokenizer.from_pretrained(str(tmp_path))
    assert tokenizer.vocab_size == len(theirs)
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id) == (theirs.bos_token_id, theirs.eos_token_id)
    for text in [*TEXT, "  two  blanks\n\n1", "<s> in a text</s>", "", "\x00\x01"]:
        for special in (True, False):
            ids = tokenizer.encode(text, add_special_tokens=special)
            assert ids == theirs.encode(text, add_special_tokens=special)
            for skip in (True, False):
                expected = theirs.decode(ids, skip_special_tokens=skip, clean_up_tokenization_spaces=False)
                assert tokenizer.decode(ids, skip_special_tokens=skip) == expected


def test_bos_is_added_where_the_model_wants_it_and_only_on_request(tmp_path):
    source = save_folder(tmp_path, "byte_level")
    content = json.loads((tmp_path / "tokenizer.json").read_text())
    content["post_processor"] = {
        "type": "TemplateProcessing",
        "single": [{"SpecialToken": {"id": "<s>", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}],
        "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 1}}],
        "special_tokens": {"<s>": {"id": "<s>", "ids": [1], "tokens": ["<s>"]}},
    }
    (tmp_path / "tokenizer.json").write_text(json.dumps(content))
    tokenizer = load_tokenizer(source)
    without = tokenizer.encode("abc", add_special_tokens=False)
    assert tokenizer.encode("abc") == [tokenizer.bos_token_id, *without]


def test_a_folder_without_tokenizer_files_has_no_tokenizer(tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    assert load_tokenizer(folder_source(tmp_path)) is None


def test_a_broken_tokenizer_file_is_a_config_error(tmp_path):
    (tmp_path / "tokenizer.json").write_text("{not json")
    with pytest.raises(ConfigError, match="cannot be read"):
        load_tokenizer(folder_source(tmp_path))


def test_no_code_of_a_model_folder_is_run(tmp_path):
    source = save_folder(
        tmp_path, "byte_level", auto_map={"AutoTokenizer": [None, "evil.Evil"]}, tokenizer_class="Evil"
    )
    canary = tmp_path / "canary"
    (tmp_path / "evil.py").write_text(f"open({str(canary)!r}, 'w')\nclass Evil: pass\n")
    try:
        tokenizer = load_tokenizer(source)
    except ConfigError:
        pass
    else:
        assert tokenizer.encode("abc")
    assert not canary.exists()


def test_truncation_and_padding_of_a_tokenizer_file_are_switched_off(tmp_path):
    source = save_folder(tmp_path, "byte_level")
    content = json.loads((tmp_path / "tokenizer.json").read_text())
    content["truncation"] = {"direction": "Right", "max_length": 2, "strategy": "LongestFirst", "stride": 0}
    (tmp_path / "tokenizer.json").write_text(json.dumps(content))
    assert len(load_tokenizer(source).encode(TEXT[0])) > 10


# ---------------------------------------------------------------------- GGUF
def test_a_gguf_tokenizer_keeps_every_id_of_the_file(tmp_path):
    tokenizer = load_tokenizer(write_gguf(tmp_path / "m.gguf"))
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.vocab_size) == (1, 0, 4 + 256 + 5)
    assert tokenizer.all_special_ids == {0, 1, 2}
    assert tokenizer.encode("<|start|><｜odd｜><tool>a<|end|>") == [1, 2, 3, *tokenizer.encode("a"), 0]
    assert tokenizer.decode([1, 2, 3, 0]) == "<|start|><｜odd｜><tool><|end|>"
    assert tokenizer.decode([1, 2, 3, 0], skip_special_tokens=True) == "<tool>"
    assert tokenizer.chat_template == CHAT_TEMPLATE
    for text in TEXT:
        assert tokenizer.decode(tokenizer.encode(text)) == text


def test_the_gguf_decoder_is_a_plain_byte_level(tmp_path):
    tokenizer = load_tokenizer(write_gguf(tmp_path / "m.gguf"))
    assert json.loads(tokenizer.backend.decoder.__getstate__())["type"] == "ByteLevel"
    assert tokenizer.is_byte_level


@pytest.mark.parametrize(
    ("pre", "expected"),
    [("smollm", ["a", "ĊĊ", "1", "2", "ĠĠ", "5"]), ("gpt-2", ["a", "Ċ", "Ċ", "12", "Ġ", "Ġ", "5"])],
)
def test_the_pre_tokenizer_of_the_file_decides_how_digits_are_split(tmp_path, pre, expected):
    tokenizer = load_tokenizer(write_gguf(tmp_path / "m.gguf", pre=pre))
    assert tokenizer.convert_ids_to_tokens(tokenizer.encode("a\n\n12  5")) == expected


@pytest.mark.parametrize(("add_bos", "expected"), [(True, [1]), (False, []), (None, [])])
def test_bos_of_a_gguf_follows_its_flag(tmp_path, add_bos, expected):
    tokenizer = load_tokenizer(write_gguf(tmp_path / "m.gguf", add_bos=add_bos))
    assert tokenizer.encode("a")[:-1] == expected


def test_llama_3_files_without_the_flag_get_bos(tmp_path):
    tokenizer = load_tokenizer(write_gguf(tmp_path / "m.gguf", pre="llama-bpe", add_bos=None))
    assert tokenizer.encode("a")[0] == 1


def test_an_unknown_pre_tokenizer_is_refused_and_not_guessed(tmp_path):
    with pytest.raises(ConfigError, match="'who-knows' is not known"):
        load_tokenizer(write_gguf(tmp_path / "m.gguf", pre="who-knows"))


def test_a_special_id_beyond_the_vocabulary_is_refused(tmp_path):
    with pytest.raises(ConfigError, match="eos_token_id"):
        load_tokenizer(write_gguf(tmp_path / "m.gguf", eos=70000))


def test_a_gguf_without_a_vocabulary_has_no_tokenizer(tmp_path):
    assert load_tokenizer(write_gguf(tmp_path / "m.gguf", model="no_vocab")) is None


def test_the_default_model_splits_text_as_it_was_trained(default_tokenizer):
    """The ids of its tokenizer.json for texts that a plain GPT-2 split gets wrong."""
    expected = {"a\n\n1. b": ["a", "ĊĊ", "1", ".", "Ġb"], "a  5": ["a", "ĠĠ", "5"], " ½": ["Ġ", "Â½"]}
    for text, tokens in expected.items():
        assert default_tokenizer.convert_ids_to_tokens(default_tokenizer.encode(text)) == tokens
    assert (default_tokenizer.bos_token_id, default_tokenizer.eos_token_id) == (1, 2)
    assert default_tokenizer.vocab_size == 49152
    assert default_tokenizer.all_special_ids == set(range(17))


def test_the_default_models_bytes_are_its_text(default_tokenizer):
    ids = default_tokenizer.encode("".join(TEXT))
    assert b"".join(map(default_tokenizer.token_bytes, ids)).decode() == "".join(TEXT)
    for token_id in range(0, default_tokenizer.vocab_size, 7):
        spelled = default_tokenizer.token_bytes(token_id).decode("utf-8", "replace")
        assert default_tokenizer.decode([token_id]) == spelled


def test_the_default_models_template_is_the_one_it_was_tuned_with(default_tokenizer):
    assert default_tokenizer.apply_chat_template([{"role": "user", "content": "Hi"}]) == (
        "<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>\n"
        "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"
    )


# ---------------------------------------------------------------------- ids and texts
@pytest.mark.parametrize("kind", KINDS)
def test_ids_beyond_the_vocabulary_decode_to_nothing(kind):
    tokenizer = tiny_tokenizer(kind)
    beyond = tokenizer.vocab_size + 100
    assert tokenizer.decode([beyond]) == tokenizer.token_text(beyond) == ""
    assert tokenizer.convert_ids_to_tokens([beyond]) == [None]
    the = tokenizer.encode("the", add_special_tokens=False)
    assert tokenizer.decode([beyond, *the, beyond]) == tokenizer.decode(the)


@pytest.mark.parametrize("kind", KINDS)
def test_the_text_of_each_token_keeps_its_blank_so_that_tokens_joined_are_the_text(kind):
    tokenizer = tiny_tokenizer(kind)
    ids = tokenizer.encode("the quick fox", add_special_tokens=False)
    assert "".join(map(tokenizer.token_text, ids)).strip() == tokenizer.decode(ids).strip()


def test_special_tokens_in_a_users_text_become_their_ids_as_in_transformers():
    tokenizer = tiny_tokenizer("byte_level")
    assert tokenizer.encode("a</s>", add_special_tokens=False)[-1] == tokenizer.eos_token_id


@pytest.mark.parametrize("kind", KINDS)
def test_no_token_is_longer_than_max_chars_per_token(kind):
    tokenizer = tiny_tokenizer(kind)
    for token_id in range(tokenizer.vocab_size):
        assert len(tokenizer.token_text(token_id).lstrip(" ")) <= tokenizer.max_chars_per_token


def test_two_threads_may_encode_at_once():
    tokenizer = tiny_tokenizer("byte_level")
    expected = [tokenizer.encode(text) for text in TEXT]
    wrong: list[object] = []

    def work() -> None:
        for _ in range(100):
            try:
                if [tokenizer.encode(text) for text in TEXT] != expected:
                    wrong.append("other ids")
            except BaseException as error:
                wrong.append(error)

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


# ---------------------------------------------------------------------- chat templates
MESSAGES = [{"role": "user", "content": "Hi"}]


def with_template(template: str) -> Tokenizer:
    return tiny_tokenizer("byte_level", template)


def test_a_conversation_is_rendered_with_the_models_template():
    tokenizer = with_template(CHAT_TEMPLATE)
    assert tokenizer.apply_chat_template(MESSAGES) == "<|user|>Hi</s><|assistant|>"
    assert tokenizer.apply_chat_template(MESSAGES, add_generation_prompt=False) == "<|user|>Hi</s>"
    continued = tokenizer.apply_chat_template(MESSAGES, add_generation_prompt=False, continue_final_message=True)
    assert continued == "<|user|>Hi"


def test_a_model_without_a_template_says_so():
    with pytest.raises(InvalidRequestError, match="no chat template") as caught:
        tiny_tokenizer("byte_level").apply_chat_template(MESSAGES)
    assert caught.value.parameter == "messages"


def test_a_template_given_at_start_up_replaces_the_models():
    hf_tokenizer = PreTrainedTokenizerFast(tokenizer_object=tiny_tokenizer("byte_level").backend)
    tokenizer = Tokenizer(hf_tokenizer, chat_template="{{ messages[0]['content'] }}")
    assert tokenizer.apply_chat_template(MESSAGES) == "Hi"


def test_the_templates_own_words_reach_the_caller():
    tokenizer = with_template("{{ raise_exception('roles must alternate') }}")
    with pytest.raises(InvalidRequestError, match="roles must alternate"):
        tokenizer.apply_chat_template(MESSAGES)


@pytest.mark.parametrize(
    "template",
    [
        "{{ ''.__class__.__mro__[1].__subclasses__() }}",
        "{{ messages.__class__.__init__.__globals__ }}",
        "{{ messages.append(1) }}",
        "{% for i in range(10000000) %}{% endfor %}",
        "{{ cycler.__init__.__globals__.os.system('true') }}",
        "{% if %}",
        "{{ messages[0]['content'] + 1 }}",
    ],
)
def test_a_hostile_or_broken_template_is_an_error_of_the_request(template):
    with pytest.raises(InvalidRequestError, match="chat template"):
        with_template(template).apply_chat_template(MESSAGES)


def test_template_variables_are_passed_on_and_reserved_names_are_refused():
    tokenizer = with_template("{{ mood }}{{ bos_token }}")
    assert tokenizer.apply_chat_template(MESSAGES, template_kwargs={"mood": "calm", "unknown": 1}) == "calm<s>"
    for name in ("tokenize", "chat_template", "messages", "bos_token", "return_tensors"):
        with pytest.raises(InvalidRequestError, match=name) as caught:
            tokenizer.apply_chat_template(MESSAGES, template_kwargs={name: "x"})
        assert caught.value.parameter == "chat_template_kwargs"


@pytest.mark.parametrize(
    ("template", "loops", "tests_for_string"),
    [
        (CHAT_TEMPLATE, False, False),
        ("{% for m in messages %}{% for part in m.content %}{{ part.text }}{% endfor %}{% endfor %}", True, False),
        ("{% for m in messages %}{{ m['content'][0]['text'] }}{% endfor %}", True, False),
        (
            "{% for m in messages %}{% set c = m['content'] %}{% for p in c %}{{ p }}{% endfor %}{% endfor %}",
            True,
            False,
        ),
        (
            "{% if m.content is string %}{{ m.content }}{% else %}{% for p in m.content %}x{% endfor %}{% endif %}",
            True,
            True,
        ),
        ("{% for m in messages %}{{ m.content.split('x')[-1] }}{{ messages[0]['content'] }}{% endfor %}", False, False),
        ("{% generation %}{{ messages[0].content | trim }}{% endgeneration %}", False, False),
    ],
)
def test_what_a_template_does_with_content_is_read_from_its_syntax(template, loops, tests_for_string):
    traits = read_template_traits(template)
    assert (traits.loops_over_content, traits.tests_for_string) == (loops, tests_for_string)
    assert not traits.knows_developer
    assert read_template_traits(template + "{# developer #}").knows_developer
