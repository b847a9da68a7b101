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
# # The sampler, stage by stage
#
# A model gives one number per token of its vocabulary, the *logits*. The sampler makes one token of them. Its stages
# and their order are written at the top of `minivllm/sample/sampler.py`; here each one is looked at alone, on logits of
# a real model.

# %%
import math

import numpy as np
import torch
from charts import bars, lines

from minivllm import LLM, SamplingParams
from minivllm.sample import SamplingMetadata, SamplingRow, final_probabilities, sample
from minivllm.sample.random import uniform
from minivllm.sample.top_k_top_p import inverse_cdf

llm = LLM(max_model_len=256, kv_cache_memory_bytes=20_000_000)
tokenizer = llm.get_tokenizer()

# %% [markdown]
# ## Logits of a real model
#
# The engine keeps logits to itself, but it tells the logarithms of the twenty largest probabilities. Logits matter only
# up to a constant that is added to all of them, so these twenty *are* logits, of a vocabulary of twenty tokens.

# %%
PROMPT = "The old man opened the door and saw a"
answer = llm.generate(PROMPT, SamplingParams(max_tokens=1, temperature=0, logprobs=20), use_tqdm=False)[0]
entry = answer.outputs[0].logprobs[0]
best = sorted(entry.items(), key=lambda item: item[1].rank)[:20]
names = [tokenizer.decode([token_id]).strip() or repr(token_id) for token_id, _ in best]
logits = torch.tensor([[one.logprob for _, one in best]], dtype=torch.float32)  # [1, 20]


def probabilities(**fields: float) -> dict[str, float]:
    """What the engine's own sampler draws from, with these sampling parameters."""
    row = SamplingRow(SamplingParams(**fields), seed=0, vocab_size=len(names), prompt_token_ids=[])
    shares = final_probabilities(logits, SamplingMetadata.from_requests([row]))[0]  # [20]
    return {name: float(share) for name, share in zip(names, shares, strict=True) if share > 0}


print(PROMPT, "...")
bars({"temperature 1": probabilities(temperature=1.0)})

# %% [markdown]
# ## Temperature
#
# Logits are divided by it. A low temperature makes the likely tokens likelier; in the limit of 0 only the first is
# left, which is called greedy. A high one makes the row flat.

# %%
bars({f"temperature {t}": probabilities(temperature=t) for t in (0.0, 0.5, 1.0, 2.0)}, limit=1.0)

# %% [markdown]
# ## Three ways to cut the tail
#
# `top_k` keeps the k largest. `top_p` keeps the smallest set that has the share p together. `min_p` keeps what has at
# least that share *of the largest*. Each throws the rest out and scales what is left to 1. The engine applies min_p,
# then top_k, then top_p, all after the temperature.

# %%
bars(
    {
        "nothing": probabilities(temperature=1.0),
        "top_k 5": probabilities(temperature=1.0, top_k=5),
        "top_p 0.6": probabilities(temperature=1.0, top_p=0.6),
        "min_p 0.3": probabilities(temperature=1.0, min_p=0.3),
    }
)

# %% [markdown]
# The order matters. After a temperature of 2 the row is flat, so the same top_p lets more tokens in:

# %%
kept = {
    f"top_p {p}": [(t, len(probabilities(temperature=t, top_p=p))) for t in (0.25, 0.5, 1.0, 1.5, 2.0)]
    for p in (0.5, 0.8, 0.95)
}
lines(kept, x_label="temperature", y_label="tokens that may be drawn")

# %% [markdown]
# ## Penalties
#
# They look back at what was written. A request that has just produced the most likely token twice, with a frequency
# penalty of 1: its logit is lowered by 1 for each time.

# %%
with_penalty = SamplingParams(temperature=1.0, frequency_penalty=1.0)
row = SamplingRow(with_penalty, seed=0, vocab_size=len(names), prompt_token_ids=[], output_token_ids=[0, 0])
penalised = final_probabilities(logits, SamplingMetadata.from_requests([row]))[0]  # [20]
before, after = probabilities(temperature=1.0), dict(zip(names, penalised.tolist(), strict=True))
bars({"before": before, f"after {names[0]!r} twice": after})

# %% [markdown]
# Lowering a logit by 2 divides the weight by exp(2), and then everything is scaled to 1 again:

# %%
weight = before[names[0]] * math.exp(-2)
assert math.isclose(after[names[0]], weight / (1 - before[names[0]] + weight), rel_tol=1e-5)

# %% [markdown]
# ## The draw
#
# One uniform number u picks a token: the first whose cumulated probability is larger than u. The number depends on the
# request's seed and on the position in its output, and on nothing else. So a request gives the same answer alone, in a
# batch, and after it was preempted.

# %%
shares = np.array(list(before.values()))  # [20]
for position in range(6):
    u = uniform(seed=42, position=position)
    print(f"position {position}: u = {u:.3f} -> {names[inverse_cdf(shares, u)]!r}")

# %% [markdown]
# Many draws have the frequencies that the probabilities say:

# %%
NUM_DRAWS = 4000
seeds = [
    SamplingRow(SamplingParams(temperature=1.0), seed=seed, vocab_size=len(names), prompt_token_ids=[])
    for seed in range(NUM_DRAWS)
]
drawn = sample(logits.repeat(NUM_DRAWS, 1), SamplingMetadata.from_requests(seeds)).sampled_token_ids
counts = np.bincount(drawn, minlength=len(names)) / NUM_DRAWS  # [20]
bars({"probability": before, f"share of {NUM_DRAWS} draws": dict(zip(names, counts.tolist(), strict=True))})

# %% [markdown]
# ## Try it
#
# - `minivllm lab start top_p` is the exercise to this page.
# - What does `min_p=0.3` keep at temperature 2? Guess before you look.
# - The engine never sorts the vocabulary. `minivllm/sample/top_k_top_p.py` says how it finds the tokens all the same.
