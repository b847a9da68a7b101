"""Which class serves which architecture, and what it can do."""

from types import SimpleNamespace
from typing import Any

import pytest

from minivllm.models import registry
from minivllm.models.bert import BertModel
from minivllm.models.gemma import Gemma3ForCausalLM
from minivllm.models.hf_backend import TransformersForCausalLM
from minivllm.models.llama import LlamaForCausalLM, MistralForCausalLM
from minivllm.models.qwen import Qwen2ForCausalLM, Qwen3ForCausalLM


def named(*architectures: str) -> Any:
    return SimpleNamespace(architectures=list(architectures))


@pytest.mark.parametrize(
    ("name", "expected", "is_encoder", "generates_text"),
    [
        ("LlamaForCausalLM", LlamaForCausalLM, False, True),
        ("MistralForCausalLM", MistralForCausalLM, False, True),
        ("Qwen2ForCausalLM", Qwen2ForCausalLM, False, True),
        ("Qwen3ForCausalLM", Qwen3ForCausalLM, False, True),
        ("Gemma3ForCausalLM", Gemma3ForCausalLM, False, True),
        ("LlamaModel", LlamaForCausalLM, False, False),
        ("MistralModel", MistralForCausalLM, False, False),
        ("Qwen2Model", Qwen2ForCausalLM, False, False),
        ("Qwen3Model", Qwen3ForCausalLM, False, False),
        ("BertModel", BertModel, True, False),
        ("BertForMaskedLM", BertModel, True, False),
        ("GPT2LMHeadModel", TransformersForCausalLM, False, True),
        ("OPTForCausalLM", TransformersForCausalLM, False, True),
    ],
)
def test_who_serves_it_and_what_it_can_do(name: str, expected: Any, is_encoder: bool, generates_text: bool):
    """GPT2LMHeadModel was taken for a network without a head, because of how its name ends."""
    assert registry.model_class(named(name)) is expected
    assert registry.is_encoder(named(name)) is is_encoder
    assert registry.generates_text(named(name)) is generates_text


def test_every_name_of_the_table_is_tested_above():
    marks = test_who_serves_it_and_what_it_can_do.pytestmark
    assert registry.MODELS.keys() <= {case[0] for mark in marks for case in mark.args[1]}


def test_the_first_name_that_is_known_decides():
    assert registry.model_class(named("MyOwnModel", "Qwen3ForCausalLM", "LlamaForCausalLM")) is Qwen3ForCausalLM


@pytest.mark.parametrize("architectures", [None, [], ["Nonsense"], ["llamaforcausallm"]])
def test_an_unknown_name_goes_to_transformers(architectures: Any):
    assert registry.model_class(SimpleNamespace(architectures=architectures)) is TransformersForCausalLM


def test_the_table_cannot_be_changed():
    with pytest.raises(TypeError):
        registry.MODELS["LlamaForCausalLM"] = BertModel
