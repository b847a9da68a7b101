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
# # Speculative decoding, and when it pays
#
# A step that computes one token reads all weights of the model. A step that computes five reads them once as well. So
# somebody guesses the next four, one step checks them all, and the right ones are kept. Answers do not change; only the
# number of steps does. This page guesses by hand, measures what a guess costs, and says when to.

# %%
import statistics
import time

from charts import grid, lines, words

from minivllm import LLM, SamplingParams
from minivllm.speculative.ngram import NgramTable

# float32: the number of rows in a step changes last bits, and in bfloat16 these may decide between two equal tokens
llm = LLM(max_model_len=512, kv_cache_memory_bytes=50_000_000, dtype="float32")
engine = llm.llm_engine
tokenizer = llm.get_tokenizer()
NUM_TOKENS = 32

# %% [markdown]
# ## Guess by hand
#
# The scheduler takes drafts from `Request.draft_token_ids`, whoever wrote them there. The next step computes them
# behind the newest token. Row by row it draws what the model says; as long as that is the draft, the next row counts
# too.


# %%
def run(prompt: str, guess, num_tokens: int = NUM_TOKENS) -> tuple[list[int], list[tuple[int, int, float]]]:
    """The answer's tokens, and per step (drafts, tokens that came out, seconds). guess: the request -> drafts."""
    assert llm.reset_prefix_cache()
    request_id = engine.add_request(prompt, SamplingParams(temperature=0, max_tokens=num_tokens, ignore_eos=True))
    request = engine.scheduler.requests[request_id]
    steps = []
    while engine.has_unfinished_requests():
        before = request.num_output_tokens
        request.draft_token_ids = guess(request) if before else []
        num_drafts, started = len(request.draft_token_ids), time.perf_counter()
        engine.step()
        steps.append((num_drafts, request.num_output_tokens - before, time.perf_counter() - started))
    return request.output_token_ids, steps[1:]  # without the prompt's step


PROMPT = "Once upon a time there was a"
truth, plain_steps = run(PROMPT, lambda request: [])
print(f"without drafts: {len(plain_steps)} steps for {len(truth) - 1} tokens")


def knows_the_answer(request) -> list[int]:
    return truth[request.num_output_tokens :][:4]


def wrong_now_and_then(request) -> list[int]:
    first = request.num_output_tokens
    return [0 if (first + i) % 7 in (3, 4) else token for i, token in enumerate(truth[first : first + 4])]


runs = {"always right": knows_the_answer, "wrong now and then": wrong_now_and_then, "always wrong": lambda _: [0] * 4}
figures = {}
for name, guess in runs.items():
    token_ids, figures[name] = run(PROMPT, guess)
    assert token_ids == truth  # whatever the drafts are
    print(f"{name}: {len(figures[name])} steps, the same {len(token_ids)} tokens")

# %% [markdown]
# Each line is a step: drafts that came true, the token that the model drew itself, and drafts in vain.

# %%
KINDS = {"draft, right": "#2e9e6b", "drawn by the model": "#3969ac", "draft, in vain": "#e4b7a0"}


def show_steps(steps: list[tuple[int, int, float]]):
    right, drawn, vain = KINDS
    rows = [[right] * (new - 1) + [drawn] + [vain] * (drafts - new + 1) for drafts, new, _ in steps[:10]]
    return grid(rows, row_labels=[f"step {number}" for number in range(1, len(rows) + 1)], legend=KINDS)


show_steps(figures["wrong now and then"])

# %% [markdown]
# ## What a guess costs
#
# A step with k drafts computes k + 1 rows. Here the time of a step is measured for several k in turns, with drafts
# that are always wrong, relative to a step without any. As long as a step waits for weights to come from memory, more
# rows are nearly free and the line is flat; from some point on the rows have to be computed, and it rises. Where that
# is depends on the machine. (One that is busy with other things shows noise.)

# %%
seconds: dict[int, list[float]] = {k: [] for k in (0, 1, 2, 4, 8)}
for k in list(seconds) * 2:
    seconds[k] += [spent for drafts, _, spent in run(PROMPT, lambda _, k=k: [0] * k, 16)[1] if drafts == k]
cost = {k: statistics.median(times) / statistics.median(seconds[0]) for k, times in seconds.items()}
lines({"time of a step": list(cost.items())}, x_label="drafts in a step", y_label="times a step without drafts")

# %% [markdown]
# ## When it pays
#
# If every draft comes true with probability a, a step with k drafts gives 1 + a + a² + ... + a^k tokens: a draft counts
# only when all before it did. Divided by the cost above, that is the speed relative to no drafts. Below 1 it is a loss.

# %%
speed = {f"a = {a:.0%}": [(k, sum(a**i for i in range(k + 1)) / cost[k]) for k in cost] for a in (0.9, 0.7, 0.5, 0.2)}
lines(speed, x_label="drafts in a step", y_label="expected speed, 1 = without drafts")

# %% [markdown]
# So it depends on two things: what the machine asks for more rows, and how good the guesses are. When many requests run
# at once the rows are filled anyway, and every draft takes a place that a request could use: the engine stops guessing
# then (`disable_by_batch_size`).
#
# ## Where guesses come from
#
# The cheapest source is the text itself: what followed these last tokens the last time? `NgramTable` is that, and
# costs a few dictionary entries per token. In a list, whose words come back, many of them are right; in a story it
# finds little to say.

# %%
LIST = "Name: Anna, Age: 31\nName: Ben, Age: 42\nName: Carl, Age: 28\nName:"
SHADES = {"draft, right": "#a9dcc4", "drawn by the model": "#cfe0f3"}


def with_ngrams(prompt: str):
    table = NgramTable(2, 4)
    token_ids, steps = run(prompt, lambda request: table.propose(request.all_token_ids, 4))
    pieces, position = [(tokenizer.decode(token_ids[:1]), "drawn by the model")], 1
    for _, new, _ in steps:
        kinds = ["draft, right"] * (new - 1) + ["drawn by the model"]
        pieces += [(tokenizer.decode([token]), kind) for token, kind in zip(token_ids[position:], kinds, strict=False)]
        position += new
    drafts = sum(drafts for drafts, _, _ in steps)
    right = sum(new - 1 for _, new, _ in steps)
    print(f"{len(token_ids) - 1} tokens in {len(steps)} steps; {right} of {drafts} drafts were right")
    return words(pieces, SHADES)


with_ngrams(LIST)

# %%
with_ngrams(PROMPT)

# %% [markdown]
# ## In the engine
#
#     LLM(speculative_config={"method": "ngram", "num_speculative_tokens": 8})
#
# and `"draft_model"` with a second, smaller model. A request whose drafts fail pauses (`min_acceptance_rate`), so
# that a story costs nothing. `minivllm/speculative/README.md` has the measurements; `minivllm lab start
# rejection_sampling` is the rule for drafts that were drawn at random.
