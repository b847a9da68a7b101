"""A random model writes nonsense; its grammar makes it a document that the schema accepts, every time."""

from __future__ import annotations

import json
import re
from typing import Any

import jsonschema
import pytest

from minivllm import LLM
from tests.structured_output.helpers import SCHEMAS, generate, long_tiny_llm, params

SEEDS = range(11)


@pytest.fixture(scope="module")
def llm(tmp_path_factory: pytest.TempPathFactory) -> LLM:
    return long_tiny_llm(tmp_path_factory.mktemp("llama"))


def texts(llm: LLM, **spec: Any) -> list[str]:
    """What ends by itself, greedy and sampled. Most does; what max_tokens cuts is no document yet."""
    requests = [params(llm, temperature=0, **spec)]
    requests += [params(llm, temperature=(0.5, 1.0, 2.0)[seed % 3], seed=seed, **spec) for seed in SEEDS]
    outputs = [output.outputs[0] for output in generate(llm, *requests)]
    assert {output.finish_reason for output in outputs} <= {"stop", "length"}
    ended = [output.text for output in outputs if output.finish_reason == "stop"]
    assert len(ended) >= 0.7 * len(outputs)
    return ended


def structure(text: str) -> str:
    """A document with every string replaced by 0."""
    return re.sub(r'"(\\.|[^"\\])*"', "0", text)


@pytest.mark.parametrize("name", SCHEMAS)
def test_a_document_is_what_its_schema_accepts(llm: LLM, name: str):
    schema = SCHEMAS[name]
    draft_7 = "$schema" in schema or isinstance(schema.get("items"), list)
    validator = (jsonschema.Draft7Validator if draft_7 else jsonschema.Draft202012Validator)(schema)
    found = texts(llm, json=schema)
    for text in found:
        validator.validate(json.loads(text))
        assert not re.search(r"\s", re.sub("[,:] ", "", structure(text)))  # one blank, after a comma or colon
    if "properties" in schema:
        assert all(isinstance(json.loads(text), dict) for text in found)


def test_the_schema_may_be_text(llm: LLM):
    assert {json.loads(text) for text in texts(llm, json='{"enum": [1, 2, 3]}')} <= {1, 2, 3}


def test_a_json_object_is_an_object(llm: LLM):
    assert all(isinstance(json.loads(text), dict) for text in texts(llm, json_object=True))


@pytest.mark.parametrize(
    "regex",
    [
        r"[a-z]{3,8}",
        r"^\d{3}-\d{4}$",
        r"(foo|bar)+x?",
        r"a.c",
        r"(?i)yes|no",
        r"é+[^a-z]{2}",
        r"[^\n/]{1,5}/",
        "^a$|^b$",
    ],
)
def test_the_whole_output_matches_a_regex(llm: LLM, regex: str):
    assert all(re.fullmatch(regex, text) for text in texts(llm, regex=regex))


def test_a_choice_is_one_of_the_strings(llm: LLM):
    choice = ["yes", "no", "a/b", 'with "quotes"', "back\\slash", "two\nlines", "été 😀", "yes, but"]
    found = {text for start in range(3) for text in texts(llm, choice=choice[start:])}
    assert found <= set(choice) and len(found) > 3


@pytest.mark.parametrize(
    "grammar",
    [
        'root ::= "(" item ("," item)* ")"\nitem ::= [a-z]{1,3} | "7"',
        'start: "(" item ("," item)* ")"\nitem: /[a-z]{1,3}/ | "7"',
    ],
    ids=["GBNF", "Lark"],
)
def test_a_grammar_is_followed(llm: LLM, grammar: str):
    bias = {llm.get_tokenizer().encode(")")[-1]: 9.0}
    found = texts(llm, grammar=grammar, logit_bias=bias)
    assert all(re.fullmatch(r"\(([a-z]{1,3}|7)(,([a-z]{1,3}|7))*\)", text) for text in found)
