"""A tiny random model with a context long enough for documents, and the schemas that SDKs send."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from golden.tiny import write_tiny_model
from minivllm import LLM, RequestOutput, SamplingParams, StructuredOutputsParams
from minivllm.engine.tokenizer import Tokenizer
from minivllm.structured_output.grammar import GrammarTokenizer
from minivllm.structured_output.manager import StructuredOutputManager

PROMPT = {"prompt_token_ids": [5, 6, 7, 8]}


def long_tiny_llm(folder: Path, **options: Any) -> LLM:
    """The tiny llama with room for 512 tokens. Its second eos is a token with a text, as in the golden cases."""
    write_tiny_model("llama", folder)
    config = json.loads((folder / "config.json").read_text())
    config["max_position_embeddings"] = 512
    (folder / "config.json").write_text(json.dumps(config))
    return LLM(folder, **{"dtype": "float32", "num_gpu_blocks_override": 1200, **options})


def closing_bias(tokenizer: Tokenizer) -> dict[int, float]:
    """A random model would write strings and lists for ever: make it like what closes them."""
    return {
        tokenizer.encode(text)[-1]: bias
        for text, bias in (('"', 9.0), ("}", 12.0), ("]", 12.0), ("n", 6.0), (".", -9.0))
    }


def params(
    llm: LLM, *, temperature: float = 1.0, seed: int = 0, max_tokens: int = 300, **fields: Any
) -> SamplingParams:
    """SamplingParams with the one grammar that `fields` hold, and whatever else they hold."""
    kinds = ("json", "regex", "choice", "grammar", "json_object")
    spec = StructuredOutputsParams(**{kind: fields.pop(kind) for kind in kinds if kind in fields})
    bias = fields.pop("logit_bias", None) or closing_bias(llm.get_tokenizer())
    return SamplingParams(
        temperature=temperature, seed=seed, max_tokens=max_tokens, logit_bias=bias, structured_outputs=spec, **fields
    )


def generate(llm: LLM, *requests: SamplingParams, prompt: Any = PROMPT) -> list[RequestOutput]:
    """One batch."""
    return llm.generate([prompt] * len(requests), list(requests), use_tqdm=False)


def manager_of(tokenizer: Tokenizer, **changes: Any) -> StructuredOutputManager:
    """A manager beside no engine."""
    vocab_size = changes.get("vocab_size", tokenizer.vocab_size)
    eos_token_ids = changes.get("eos_token_ids", frozenset({tokenizer.eos_token_id}))
    return StructuredOutputManager(tokenizer.backend, vocab_size, eos_token_ids)


def grammar_tokenizer(tokenizer: Tokenizer, **changes: Any) -> GrammarTokenizer:
    """The vocabulary of a tiny tokenizer."""
    vocab_size = changes.get("vocab_size", tokenizer.vocab_size)
    return GrammarTokenizer(
        tokenizer.backend, vocab_size, changes.get("eos_token_ids", frozenset({tokenizer.eos_token_id}))
    )


def thing(**properties: Any) -> dict[str, Any]:
    """An object with exactly these properties."""
    return {
        "type": "object",
        "properties": properties,
        "required": list(properties),
        "additionalProperties": False,
    }


TEXT = {"type": "string"}
DRAFT_7 = "http://json-schema.org/draft-07/schema#"
RECIPE = {
    "$schema": DRAFT_7,
    **thing(
        recipe=thing(
            name=TEXT,
            ingredients={"type": "array", "items": thing(name=TEXT, amount=TEXT)},
            steps={"type": "array", "items": TEXT},
        )
    ),
}
SCHEMAS: dict[str, Any] = {
    "recipe": RECIPE,
    "story": thing(
        title=TEXT,
        characters={"type": "array", "items": thing(name=TEXT, age={"type": "integer", "minimum": 1, "maximum": 99})},
    ),
    "weather": {
        "type": "object",
        "properties": {
            "city": {"type": "string", "description": "The city", "minLength": 1, "maxLength": 12},
            "unit": {"type": "string", "enum": ["celsius", "fahrenheit"], "default": "celsius"},
        },
        "required": ["city"],
        "additionalProperties": False,
        "$schema": DRAFT_7,
    },
    "calculator without type": {
        "properties": {
            "a": {"type": "integer", "minimum": -9007199254740991, "maximum": 9007199254740991},
            "operator": {"enum": ["+", "-", "*", "/"]},
        },
        "required": ["a", "operator"],
        "additionalProperties": False,
    },
    "tuple": {"type": "array", "items": [TEXT, {"type": "boolean"}], "minItems": 2, "maxItems": 2},
    "enum": thing(result={"type": "string", "enum": ["positive", "negative", 'a "quoted" one', "naïve\n"]}),
    "array": thing(elements={"type": "array", "items": thing(id={"const": 7}), "minItems": 1, "maxItems": 3}),
    "nullable": thing(a={"type": ["string", "null"]}, b={"anyOf": [{"type": "boolean"}, {"type": "null"}]}),
    "ref to definitions": {"definitions": {"x": thing(y={"type": "null"})}, **thing(a={"$ref": "#/definitions/x"})},
    "ref to $defs": {"$defs": {"x": {"type": "boolean"}}, **thing(a={"$ref": "#/$defs/x"})},
    "ref to the whole": {
        "type": "object",
        "properties": {"v": {"type": "boolean"}, "next": {"anyOf": [{"$ref": "#"}, {"type": "null"}]}},
        "required": ["v", "next"],
        "additionalProperties": False,
    },
    "anyOf": {"anyOf": [thing(kind={"const": "a"}, n={"type": "boolean"}), thing(kind={"const": "b"})]},
    "oneOf": {"oneOf": [thing(kind={"const": "a"}, s=TEXT), thing(kind={"const": "b"}, t=TEXT)]},
    "bounds": thing(
        i={"type": "integer", "minimum": 5, "exclusiveMaximum": 120},
        x={"type": "number", "exclusiveMinimum": 0, "maximum": 1.5},
        five={"type": "integer", "multipleOf": 5, "minimum": 0, "maximum": 1000},
    ),
    "minItems, maxItems": {"type": "array", "items": {"type": "boolean"}, "minItems": 3, "maxItems": 5},
    "pattern": thing(zip={"type": "string", "pattern": "^[0-9]{5}(-[0-9]{4})?$"}),
    "record": {"type": "object", "propertyNames": {"type": "string"}, "additionalProperties": {"type": "boolean"}},
    "record of known names": {"propertyNames": {"enum": ["a", "b"]}, "additionalProperties": {"type": "boolean"}},
    "any": {},
    "formats": thing(
        day={"type": "string", "format": "date"}, odd={"type": "string", "format": "cuid", "maxLength": 4}
    ),
    "allOf": {"allOf": [thing(a={"type": "boolean"}), {"minProperties": 1}]},
}
