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
# # Quickstart
#
# minivllm runs language models: a small engine in Python that can be read from end to end. This page shows what you can
# do with it in five minutes. It needs no GPU and, once the default model is there (98 MB), no network.

# %%
import math

from charts import words

from minivllm import LLM, SamplingParams, StructuredOutputsParams

llm = LLM(max_model_len=512, kv_cache_memory_bytes=100_000_000)  # SmolLM2-135M-Instruct; or LLM("your/folder")

# %% [markdown]
# ## Text goes on
#
# `generate` takes one prompt or many, and computes them together.

# %%
PROMPTS = ["The three primary colours are", "Water boils at", "Once upon a time there was a"]
greedy = SamplingParams(temperature=0, max_tokens=16)
for output in llm.generate(PROMPTS, greedy, use_tqdm=False):
    print(f"{output.prompt!r} -> {output.outputs[0].text!r}")

# %% [markdown]
# ## Chat
#
# `chat` takes messages and writes them as the model was taught to read them. `stream` gives the text while it grows.

# %%
question = [{"role": "user", "content": "What is the capital of France?"}]
answer = llm.chat(question, SamplingParams(temperature=0, max_tokens=40), use_tqdm=False)[0]
print(answer.outputs[0].text)
print(f"({len(answer.prompt_token_ids)} prompt tokens, {len(answer.outputs[0].token_ids)} tokens, ", end="")
print(f"ended by {answer.outputs[0].finish_reason})")

# %%
shown = ""
for output in llm.stream("A short poem about rain:\n", SamplingParams(temperature=0, max_tokens=40)):
    text = output.outputs[0].text
    print(text[len(shown) :], end="")
    shown = text

# %% [markdown]
# ## How sure was it?
#
# With `logprobs` the engine tells the probability of every token it drew. The darker, the surer.

# %%
params = SamplingParams(temperature=0, max_tokens=28, logprobs=0)
output = llm.generate("The capital of France is Paris, and the capital of Italy is", params, use_tqdm=False)[0]
completion = output.outputs[0]
SHADES = {"over 90 %": "#7fb3e6", "over 60 %": "#b4d2ee", "over 30 %": "#dde9f5", "less": "#fbe3cf"}


def shade(probability: float) -> str:
    for limit, name in zip((0.9, 0.6, 0.3), SHADES, strict=False):
        if probability > limit:
            return name
    return "less"


tokenizer = llm.get_tokenizer()
drawn = zip(completion.token_ids, completion.logprobs, strict=True)
words([(tokenizer.decode([token]), shade(math.exp(entry[token].logprob))) for token, entry in drawn], SHADES)

# %% [markdown]
# ## An answer in a given form
#
# A JSON schema, a regular expression or a list of choices: the answer keeps to it, whatever the model would rather say.

# %%
EXAMPLES = """Review: What a lovely film!
Sentiment: positive
Review: I want my money back.
Sentiment: negative
Review: {review}
Sentiment:"""
form = StructuredOutputsParams(choice=[" positive", " negative"])
choice = SamplingParams(temperature=0, max_tokens=8, structured_outputs=form)
for review in ("I loved every minute of it.", "It was dull, and far too long."):
    output = llm.generate(EXAMPLES.format(review=review), choice, use_tqdm=False)[0]
    print(f"{review!r} -> {output.outputs[0].text!r}")

# %% [markdown]
# ## The same prefix is computed once
#
# What was computed stays in the cache until its place is needed. A second question about the same text finds the text
# there.

# %%
TEXT = "Rivers carry fresh water from mountains to the sea. " * 12
for ending in ("In short:", "The main idea is"):
    output = llm.generate(TEXT + ending, greedy, use_tqdm=False)[0]
    print(f"{output.num_cached_tokens:3d} of {len(output.prompt_token_ids)} prompt tokens were found in the cache")

# %% [markdown]
# ## Where to go from here
#
# - `minivllm serve` starts a server with OpenAI's API; [10](10_serving_the_ai_sdk.ipynb) talks to one.
# - [01](01_one_step_at_a_time.ipynb) looks at every step of three requests.
# - [06](06_the_sampler.ipynb) shows how a token is chosen, [07](07_structured_output.ipynb) how a form is enforced.
# - `minivllm lab list` has eight exercises, from blocks to rejection sampling.
