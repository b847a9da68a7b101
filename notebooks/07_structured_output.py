# ---
# jupyter:
#   jupytext:
#     text_representation:
#       extension: .py
#       format_name: percent
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # Structured output is a mask
#
# "Answer in JSON" is a wish. A *grammar* is a rule: before each draw it says which tokens may come next, and the
# logits of all others become minus infinity. The model still chooses, among what is allowed. This page looks at that
# mask, one bit for each token of the vocabulary.

# %%
import json

import numpy as np
import torch
from charts import bars, words

from minivllm import LLM, SamplingParams, StructuredOutputsParams
from minivllm.sample import SamplingMetadata, SamplingRow, final_probabilities

llm = LLM(max_model_len=512, kv_cache_memory_bytes=50_000_000)
tokenizer = llm.get_tokenizer()
grammars = llm.llm_engine.structured_output  # one manager for all requests of an engine

# %% [markdown]
# ## A wish and a rule
#
# The same prompt without and with the rule that the answer has four digits.

# %%
PROMPT = "Question: In which year did the Second World War end?\nAnswer:"
year = StructuredOutputsParams(regex=r"( in)? [0-9]{4}")
for form in (None, year):
    params = SamplingParams(temperature=0, max_tokens=12, structured_outputs=form)
    print(repr(llm.generate(PROMPT, params, use_tqdm=False)[0].outputs[0].text))

# %% [markdown]
# ## The mask
#
# The grammar follows the text like a machine that reads it: in each state it knows what may come. The mask has one bit
# per token, 32 of them in an integer: 6 KB for 49,152 tokens.


# %%
def allowed_tokens(request_id: str) -> np.ndarray:  # [num_allowed]
    """Ids of the tokens that may come next."""
    row = grammars.bitmasks({request_id: ()})[request_id]  # [ceil(vocab_size / 32)] int32
    return np.flatnonzero(np.unpackbits(row.view(np.uint8), bitorder="little"))


grammars.add_request("year", grammars.compile(year))
for token_id in [None, *tokenizer.encode(" 19", add_special_tokens=False)]:
    if token_id is not None:
        grammars.accept_tokens("year", [token_id])
    allowed = allowed_tokens("year")
    shown = [tokenizer.decode([one]) for one in allowed[:12]]
    place = "at the start" if token_id is None else f"after {tokenizer.decode([token_id])!r}"
    print(f"{place:12}: {len(allowed):3d} tokens may come, as {shown}")
grammars.remove_request("year")

# %% [markdown]
# ## What it does to a draw
#
# The twenty likeliest tokens at the beginning of the answer, before and after the mask. What was forbidden has no
# share, and the rest is scaled to 1: *the mask changes no order among what it allows.*

# %%
greedy = SamplingParams(temperature=0, max_tokens=1, logprobs=20)
entry = llm.generate(PROMPT, greedy, use_tqdm=False)[0].outputs[0].logprobs[0]
ids = sorted(entry, key=lambda token_id: entry[token_id].rank)[:20]
logits = torch.full((1, 49_152), -torch.inf)  # [1, vocab_size]
logits[0, ids] = torch.tensor([entry[token_id].logprob for token_id in ids])

grammars.add_request("draw", grammars.compile(year))
bitmask = torch.from_numpy(grammars.bitmasks({"draw": ()})["draw"])[None]  # [1, vocab_size / 32]
grammars.remove_request("draw")
row = SamplingRow(SamplingParams(temperature=1.0), seed=0, vocab_size=49_152, prompt_token_ids=[])


def shares(mask: torch.Tensor | None) -> dict[str, float]:  # mask: [1, vocab_size / 32] int32
    drawn_from = final_probabilities(logits, SamplingMetadata.from_requests([row], mask))[0]  # [vocab_size]
    return {repr(tokenizer.decode([one])): float(drawn_from[one]) for one in ids}


bars({"without": shares(None), "with the mask": shares(bitmask)}, limit=1.0)

# %% [markdown]
# ## A JSON schema, token by token
#
# A schema is a larger machine of the same kind. The colours say how much choice the model had at each token. Where
# there is only one way to go on, the engine does not even ask the model: such tokens are *forced*, and several of
# them are computed in one step.

# %%
SCHEMA = {
    "type": "object",
    "properties": {
        "city": {"type": "string", "maxLength": 20},
        "inhabitants": {"type": "integer"},
        "continent": {"enum": ["Africa", "America", "Asia", "Europe"]},
    },
    "required": ["city", "inhabitants", "continent"],
    "additionalProperties": False,
}
form = StructuredOutputsParams(json=SCHEMA)
params = SamplingParams(temperature=0, max_tokens=80, structured_outputs=form)
completion = llm.generate("Facts about the largest city of Japan as JSON:\n", params, use_tqdm=False)[0].outputs[0]

CHOICE = {"one token": "#cfd4da", "2 to 30": "#cfe3f6", "31 to 1000": "#8fbfe8", "more": "#f3b58a"}


def how_many(num_allowed: int) -> str:
    return next(name for name, most in zip(CHOICE, (1, 30, 1000, 10**9), strict=True) if num_allowed <= most)


grammars.add_request("city", grammars.compile(form))
pieces, forced = [], 0
for token_id in completion.token_ids:
    pieces.append((tokenizer.decode([token_id]), how_many(len(allowed_tokens("city")))))
    forced += bool(grammars.forced_tokens("city"))
    grammars.accept_tokens("city", [token_id])
grammars.remove_request("city")
print(f"{forced} of {len(pieces)} tokens could not have been others")
words(pieces, CHOICE)

# %% [markdown]
# The form is the grammar's, the content is the model's: a small one writes a wrong number in perfect JSON.
#
# ## It always parses
#
# Twenty answers at a high temperature, all different, all valid:

# %%
wild = SamplingParams(temperature=1.5, max_tokens=120, structured_outputs=form, seed=7, n=20)
answers = llm.generate("Facts about a city as JSON:\n", wild, use_tqdm=False)[0].outputs
parsed = [json.loads(answer.text) for answer in answers if answer.finish_reason == "stop"]
assert parsed and all(set(one) == set(SCHEMA["required"]) for one in parsed)
assert all(isinstance(one["inhabitants"], int) for one in parsed)
print(f"{len(parsed)} of {len(answers)} ended by themselves, and every one of these parses:")
for one in parsed[:5]:
    print("  ", one)

# %% [markdown]
# What was cut off by `max_tokens` is not valid: a grammar forces the form of an answer, not its length. An integer
# has no last digit unless the schema says so.
#
# ## Where it is
#
# `minivllm/structured_output/` compiles the grammar and fills the mask, `minivllm/sample/sampler.py` applies it first
# of all, `kernels/ops/token_bitmask/` does so on a GPU.
