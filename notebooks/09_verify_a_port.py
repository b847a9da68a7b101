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
# # How to verify a port
#
# You have written a network again for a new engine. It answers, and the answers look like language. Is it right? This
# notebook takes a network that is right, plants a mistake as people make them, and finds the layer, the part of the
# layer and the kind of the mistake: what `minivllm verify MODEL` does.
#
# First a checkpoint to verify: a small Qwen2 with random weights, written by transformers. Any folder would do.

# %%
import tempfile
from pathlib import Path

import torch
from IPython.display import HTML, display
from transformers import Qwen2Config, Qwen2ForCausalLM

from minivllm.models import layers
from minivllm.verify.html import page
from minivllm.verify.verify import verify_model

torch.manual_seed(7)
config = Qwen2Config(
    vocab_size=307,
    hidden_size=64,
    intermediate_size=96,
    num_hidden_layers=4,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=256,
    initializer_range=0.2,  # large, so that the layers matter
)
folder = Path(tempfile.mkdtemp()) / "small-qwen2"
Qwen2ForCausalLM(config).save_pretrained(folder)

# %% [markdown]
# ## A network that is right
#
# `verify_model` runs the same tokens through transformers and through our engine (scheduler, paged cache, kernels), and
# compares everything that can be compared. `invariance=False` leaves out the long table of engine settings.

# %%
report = verify_model(folder, invariance=False)
print(report.verdict)
for check in report.checks:
    print(f"{check.status:8} {check.section:16} {check.name:45} {check.value}")

# %% [markdown]
# Two computations in float32 never give the same bits, so everything has a tolerance, and greedy choices may be *ties*.
#
# ## The mistake
#
# Now somebody "improves" the engine. Do not read the next cell too closely: finding it without reading is the point.

# %%
right_forward = layers.RotaryEmbedding.forward
layers.RotaryEmbedding.forward = lambda self, positions: right_forward(self, positions + (positions > 9).long())

broken = verify_model(folder, invariance=False)
print(broken.verdict)

# %% [markdown]
# ## What the outside says
#
# A client sees only tokens and log-probabilities. How far do the greedy runs agree?

# %%
for check in broken.checks:
    if check.section in ("greedy", "prompt logprobs", "next token"):
        print(f"{check.status:5} {check.name:35} {check.value:20} {check.detail[:110]}")

# %% [markdown]
# Something is wrong, and a prompt of one token is even answered rightly at first. But where is it? Compare the
# hidden states layer by layer, and every layer is wrong as soon as one before it is:

# %%
outputs = [p for p in broken.points if p.scenario == "whole prompt" and p.point == f"layers.{p.layer}"]
for point in outputs:
    print(f"layer {point.layer}: total error {point.total:.1e}   its own {point.own:.1e}")

# %% [markdown]
# The second number is the trick. transformers is run a second time, and each of its layers is **given our layer's
# input**. Then an error cannot travel: a layer differs only by its own fault. Here every layer has one. Which part?

# %%
for point in broken.points:
    if point.scenario == "whole prompt" and point.layer == 2 and not point.point.endswith(".input"):
        first = "" if point.position is None else f"   <- wrong from position {point.position} on"
        print(f"{point.point:42} {point.own:.1e}{first}")

# %% [markdown]
# The projection of the key is right; the key *in the cache* is wrong, and only from position 10 on. Between the two
# there is one step: the rotation by position. The report had said so:

# %%
for finding in broken.findings:
    print(finding)

# %% [markdown]
# `wrong rotary angle` is a hypothesis that was computed: pairs of numbers kept their lengths, so they were turned, but
# by another angle. Everything on one page, as `minivllm verify MODEL --html report.html` writes it:

# %%
display(HTML(page(broken)))

# %% [markdown]
# ## Repaired
#
# Undo the change, verify again. (In a CI: `minivllm verify MODEL --junit verify.xml`; the exit code is 1 when they
# differ.)

# %%
layers.RotaryEmbedding.forward = right_forward
repaired = verify_model(folder, invariance=False)
print(repaired.verdict)
assert not repaired.failures and broken.findings[0].kind == "wrong rotary angle"

# %% [markdown]
# **Try it:** change `scale` of one layer's attention, drop a bias, swap `gate` and `up`. `tests/verify/planted.py` has
# over twenty such mistakes, each of which must be found in the right layer, in the right part, under its name.
