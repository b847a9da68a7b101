"""The labs with floats: online_softmax, top_p, rejection_sampling; their examples, and what the engine makes of them.

Listed in catalog.py. Twin in vLLM: none.
"""

from __future__ import annotations

import math
import random
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch

from minivllm.kernels.paged_attention import AttentionMetadata, paged_attention
from minivllm.labs.lab import Example, Lab, Mistake, Outcome, small_ones_first
from minivllm.sample.top_k_top_p import inverse_cdf, restrict

SEED = 20250613  # of every random example of this file
NUM_RANDOM = 40
Tile = tuple[list[float], list[list[float]]]
INF = math.inf


# ------------------------------------------------------------------ online_softmax
def attend_in_engine(tiles: list[Tile], size: int) -> Outcome:
    """The reference of paged_attention, in float64. The query is (1, 0, ...) and every key (score, 0, ...), so that the
    scores are those of the example."""
    scores = torch.tensor([score for tile, _ in tiles for score in tile], dtype=torch.float64)  # [num_keys]
    values = torch.tensor([value for _, tile in tiles for value in tile], dtype=torch.float64)  # [num_keys, size]
    num_keys, head_size = len(scores), -(-size // 8) * 8
    k_cache, v_cache = torch.zeros(2, 1, 1, num_keys, head_size, dtype=torch.float64)  # [1, 1, num_keys, head_size]
    k_cache[0, 0, :, 0] = scores
    v_cache[0, 0, :, :size] = values
    query = torch.zeros(1, 1, head_size, dtype=torch.float64)  # [1, 1, head_size]
    query[0, 0, 0] = 1.0
    metadata = AttentionMetadata([0, 1], [num_keys], torch.zeros(1, 1, dtype=torch.int32), torch.tensor([-1]), num_keys)
    out = paged_attention(query, k_cache, v_cache, metadata, scale=1.0, impl="reference")  # [1, 1, head_size]
    return {"returns": out[0, 0, :size].tolist()}


def attend_examples() -> Iterator[Example]:
    """By hand, then random tiles."""

    def case(about: str, *tiles: Tile) -> Example:
        return Example(about, {"tiles": list(tiles), "size": len(tiles[0][1][0])})

    yield case("One tile, equal scores: the mean of the values.", ([0.0, 0.0], [[1.0], [3.0]]))
    yield case("One tile: weights 1/4 and 3/4.", ([0.0, math.log(3)], [[4.0, 0.0], [8.0, 1.0]]))
    yield case("The second tile has the same largest score: the sums simply go on.", ([0.0], [[1.0]]), ([0.0], [[4.0]]))
    yield case(
        "The second tile has a larger score. What was summed up before is too large by exp(new largest - old largest): "
        "both sums must be corrected.",
        ([0.0, 0.0], [[1.0], [3.0]]),
        ([math.log(2)], [[8.0]]),
    )
    yield case(
        "The second tile has a smaller score: the largest one stays.", ([2.0], [[1.0]]), ([0.0, 1.0], [[5.0], [6.0]])
    )
    yield case("exp(1000) is no float; exp(1000 - 1001) is.", ([1000.0], [[1.0]]), ([1001.0], [[2.0]]))
    yield case("exp(-1000) is 0, and 0 / 0 is nothing.", ([-1000.0], [[1.0]]), ([-1001.0], [[2.0]]))
    yield case("A hidden key has no weight.", ([0.0, -INF], [[1.0], [100.0]]), ([0.0], [[3.0]]))
    yield case(
        "All keys of the first tile are hidden. The largest score is still -inf then, and -inf - -inf is NaN.",
        ([-INF, -INF], [[100.0], [100.0]]),
        ([0.0], [[3.0]]),
    )
    chance = random.Random(SEED)
    found = []
    for _ in range(NUM_RANDOM):
        size, spread = chance.randint(1, 4), chance.choice((1.0, 10.0, 500.0))
        tiles = []
        for _ in range(chance.randint(1, 5)):
            num_keys = chance.randint(1, 4)
            scores = [-INF if chance.random() < 0.15 else round(chance.gauss(0, spread), 2) for _ in range(num_keys)]
            tiles.append((scores, [[round(chance.gauss(0, 3), 2) for _ in range(size)] for _ in range(num_keys)]))
        tiles[-1][0][-1] = 0.5
        found.append(case("Random tiles.", *tiles))
    yield from small_ones_first(found)


ONLINE_SOFTMAX = Lab(
    name="online_softmax",
    function="attend",
    title="attention in one pass over tiles of keys, with a running maximum",
    engine="kernels/ops/paged_attention/kernel.py, the loop over tiles (minivllm.kernels.paged_attention)",
    examples=attend_examples,
    expected=attend_in_engine,
    once=("tiles",),
    mistakes=(
        Mistake(
            "rescale = math.exp(largest - new_largest)",
            "rescale = 1.0",
            "It never corrects the sums when a larger score comes. They were made with exp(score - old largest), and "
            "must be multiplied by exp(old largest - new largest) to stand beside the new ones.",
        ),
        Mistake(
            "out[d] * rescale +",
            "out[d] +",
            "It corrects the sum of the weights when a larger score comes, but not the sum of the weighted values. "
            "Both were made with the old largest score.",
        ),
        Mistake(
            "total = total * rescale + sum(weights)",
            "total = total + sum(weights)",
            "It corrects the sum of the weighted values when a larger score comes, but not the sum of the weights. "
            "Both were made with the old largest score.",
        ),
        Mistake(
            "        new_largest = max(largest, *scores)\n        if new_largest == -math.inf:\n            continue\n",
            "        new_largest = 0.0\n        largest = 0.0\n",
            "It takes exp(score) as it is. Large scores overflow, and where all are very small the sum is 0: subtract "
            "the largest score so far, which changes no weight.",
        ),
        Mistake(
            "        if new_largest == -math.inf:\n            continue\n",
            "",
            "It breaks when all keys so far are hidden: the largest score is -inf then, and -inf - -inf is NaN, which "
            "stays in the sums for ever. Such a tile adds nothing.",
        ),
        Mistake(
            "        new_largest = max(largest, *scores)\n",
            "        new_largest = max(scores)\n",
            "It takes the largest score of the tile, not of all tiles so far. Corrections the other way round overflow "
            "when a tile of small scores follows one of large scores, and a hidden tile forgets what it had.",
        ),
        Mistake(
            "    return [number / total for number in out]",
            "    return out",
            "It does not divide by the sum of the weights, at the end, once. Without it they do not sum up to 1.",
        ),
    ),
)


# ------------------------------------------------------------------ top_p
def top_p_in_engine(logits: list[float], temperature: float, p: float) -> Outcome:
    """`restrict`, with the weights scaled to 1."""
    row = np.array(logits, dtype=np.float32)  # [vocab_size]
    ids, weights = restrict(row, float(row.max()), temperature, 0, p, 0.0)
    ids = np.arange(len(row)) if ids is None else ids  # [num_kept]
    shares = weights.astype(np.float64) / weights.sum(dtype=np.float64)  # [num_kept]
    return {"returns": dict(zip(ids.tolist(), shares.tolist(), strict=True))}


def top_p_examples() -> Iterator[Example]:
    """By hand, then random rows. Logits are multiples of 1/8, which float32 holds exactly, as the engine wants them."""

    def case(about: str, logits: list[float], p: float, temperature: float = 1.0) -> Example:
        return Example(about, {"logits": logits, "temperature": temperature, "p": p})

    yield case("The first has 0.73, less than nearly all: both are kept.", [0.0, 1.0], 0.999)
    yield case("The most likely token alone has more than the share: it is kept, alone.", [0.0, 3.0, 1.0], 0.5)
    yield case(
        "The first token has 0.576, which is less than 0.7; with the second it is 0.788. The token that crosses the "
        "share is kept: the set must have at least p.",
        [1.0, 2.0, 1.0],
        0.7,
    )
    yield case("Four equal tokens, p = 0.5: two have exactly the share, and a third is not needed.", [0.0] * 4, 0.5)
    yield case("Equal tokens: lower ids first.", [1.0, 2.0, 1.0, 1.0], 0.7)
    yield case("A high temperature makes the row flat, so more tokens are needed.", [0.0, 2.0, 1.0], 0.8, 4.0)
    yield case("A low temperature makes it steep, so fewer are.", [0.0, 2.0, 1.0], 0.8, 0.25)
    yield case("Large logits: only differences count, exp(1000) is no float.", [1000.0, 1001.0, 999.0], 0.9)
    yield case("A masked token has the logit -inf.", [0.0, -INF, 0.0], 0.9)
    chance = random.Random(SEED)
    found = []
    for _ in range(NUM_RANDOM):
        logits = [chance.randint(-24, 24) / 8 for _ in range(chance.randint(1, 9))]
        temperature = chance.choice((0.5, 1.0, 1.0, 2.0))
        found.append(case("A random row.", logits, chance.choice((0.1, 0.33, 0.61, 0.9, 0.97)), temperature))
    yield from small_ones_first(found)


TOP_P = Lab(
    name="top_p",
    function="top_p",
    title="the smallest set of likely tokens that has the share p",
    engine="minivllm/sample/top_k_top_p.py, restrict",
    examples=top_p_examples,
    expected=top_p_in_engine,
    mistakes=(
        Mistake(
            "        if mass >= share:\n            break\n",
            "        if kept and mass + weights[token_id] > share:\n            break\n",
            "It drops the token that crosses the share. The set must have at least p: keep a token while those before "
            "it have less than p.",
        ),
        Mistake(
            "mass >= share",
            "mass > share",
            "It keeps one token more where the set has exactly the share. At least p is reached already.",
        ),
        Mistake(
            "weights[token_id] / mass for",
            "weights[token_id] / sum(weights) for",
            "The probabilities of the kept tokens do not sum up to 1. What was cut away must be shared among them: "
            "divide by the sum of the kept ones.",
        ),
        Mistake(
            "(logit - largest) / temperature",
            "(logit - largest)",
            "It does not divide the logits by the temperature.",
        ),
        Mistake(
            "    share = p * sum(weights)\n",
            "    if temperature != 1.0:\n        kept = top_p(logits, 1.0, p)\n"
            "        mass = sum(weights[token_id] for token_id in kept)\n"
            "        return {token_id: weights[token_id] / mass for token_id in kept}\n    share = p * sum(weights)\n",
            "It cuts with the probabilities before the temperature. The order is temperature first, then top_p: a high "
            "temperature must let more tokens in.",
        ),
        Mistake(
            "key=lambda token_id: (-logits[token_id], token_id))",
            "key=lambda token_id: (logits[token_id], token_id), reverse=True)",
            "Of equal tokens it takes the one with the higher id. Sorting with reverse=True turns ties round as well: "
            "sort by (-logit, id).",
        ),
        Mistake(
            "(-logits[token_id], token_id)",
            "(logits[token_id], token_id)",
            "It begins with the least likely tokens. The set is filled from the most likely one on.",
        ),
        Mistake(
            "(logit - largest) / temperature",
            "logit / temperature",
            "It takes exp of the logits as they are, which overflows for large ones. Subtract the largest first; the "
            "probabilities stay the same.",
        ),
    ),
)


# ------------------------------------------------------------------ rejection_sampling
def verify_in_engine(
    draft_token_ids: list[int],
    draft_probs: list[list[float]],
    target_probs: list[list[float]],
    accept_uniforms: list[float],
    draw_uniform: float,
) -> Outcome:
    """The rule with arrays, drawing as the engine draws. The engine's own drafts are certain, so it has no code for
    draft_probs."""
    draft, target = np.array(draft_probs), np.array(target_probs)  # [num_drafts, vocab_size], [num_drafts + 1, ...]
    places = np.arange(len(draft_token_ids))  # [num_drafts]
    own = draft[places, draft_token_ids] if len(places) else np.empty(0)  # [num_drafts]
    refused = np.array(accept_uniforms) * own >= target[places, draft_token_ids]  # [num_drafts]
    num_accepted = int(refused.argmax()) if refused.any() else len(places)
    weights = target[num_accepted]  # [vocab_size]
    if num_accepted < len(places):
        weights = np.maximum(0.0, weights - draft[num_accepted])
    return {"returns": [*draft_token_ids[:num_accepted], inverse_cdf(weights, draw_uniform)]}


def verify_examples() -> Iterator[Example]:
    """By hand, then random distributions. Probabilities are multiples of 1/16, exact in binary."""

    def case(about: str, *arguments: Any) -> Example:
        names = ("draft_token_ids", "draft_probs", "target_probs", "accept_uniforms", "draw_uniform")
        return Example(about, dict(zip(names, arguments, strict=True)))

    sure, even = [1.0, 0.0], [0.5, 0.5]
    yield case("No draft: one token, drawn from the target.", [], [], [[0.25, 0.75]], [], 0.5)
    yield case(
        "u = 0.1 < target / draft = 0.25: accepted. It was the last draft, so one more token comes for free.",
        *([0], [sure], [[0.25, 0.75], even], [0.1], 0.9),
    )
    yield case("u = 0.3 >= 0.25: refused. Only token 1 has a rest.", [0], [sure], [[0.25, 0.75], even], [0.3], 0.9)
    yield case(
        "target 0.25 is more than half of draft 0.5: u = 0.4 is below the ratio 0.5, so the draft is accepted.",
        *([0], [[0.5, 0.5]], [[0.25, 0.75], even], [0.4], 0.2),
    )
    yield case(
        "The target finds the draft likelier than the draft model did: always accepted.",
        *([1], [[0.75, 0.25]], [[0.5, 0.5], even], [0.99], 0.2),
    )
    yield case(
        "The draft is refused. The rest is max(0, target - draft) = [0, 0.25, 0.25]: token 0 was said too often by the "
        "draft model, so it cannot come now.",
        *([0], [[0.75, 0.25, 0.0]], [[0.25, 0.5, 0.25], [0.5, 0.25, 0.25]], [0.9], 0.2),
    )
    yield case(
        "The first of two drafts is refused. The second was a guess of what follows it, and is worth nothing.",
        *([0, 1], [sure, [0.0, 1.0]], [[0.25, 0.75], [0.0, 1.0], even], [0.9, 0.1], 0.2),
    )
    yield case(
        "The first is accepted, the second refused.",
        *([0, 1], [sure, [0.0, 1.0]], [[0.75, 0.25], [0.75, 0.25], even], [0.1, 0.9], 0.9),
    )
    chance = random.Random(SEED)
    found = []
    for _ in range(2 * NUM_RANDOM):
        size, num_drafts = chance.randint(2, 4), chance.randint(0, 3)
        draft = [random_distribution(chance, size) for _ in range(num_drafts)]
        target = [random_distribution(chance, size) for _ in range(num_drafts + 1)]
        token_ids = [chance.choices(range(size), row)[0] for row in draft]
        uniforms = [chance.randrange(64) / 64 for _ in token_ids]
        found.append(case("Random distributions.", token_ids, draft, target, uniforms, chance.randrange(64) / 64))
    yield from small_ones_first(found)


def random_distribution(chance: random.Random, size: int) -> list[float]:
    cuts = sorted(chance.choices(range(17), k=size - 1))
    return [(high - low) / 16 for low, high in zip([0, *cuts], [*cuts, 16], strict=True)]


REJECTION_SAMPLING = Lab(
    name="rejection_sampling",
    function="verify",
    title="speculative decoding that keeps the target's distribution",
    engine="minivllm/worker/model_runner.py, _sample; minivllm/speculative/README.md",
    examples=verify_examples,
    expected=verify_in_engine,
    mistakes=(
        Mistake(
            "[max(0.0, t - d) for t, d in zip(target, draft, strict=True)]",
            "target",
            "After a refusal it draws from the target. The refused token has had its chance: with this rule it comes "
            "too often. With target (0.25, 0.75) and a draft model that always says 0, token 0 would come with "
            "probability 0.25 + 0.75 * 0.25 = 0.44. Draw from what was said too seldom: max(0, target - draft).",
        ),
        Mistake(
            "[max(0.0, t - d) for t, d in zip(target, draft, strict=True)]",
            "[0.0 if x == token_id else t for x, t in enumerate(target)]",
            "After a refusal it excludes only the refused token. That is right when the draft model was certain; else "
            "other tokens that it says too often would come too often as well: max(0, target - draft).",
        ),
        Mistake(
            "accept_uniforms[i] * draft[token_id] >= target[token_id]",
            "accept_uniforms[i] >= target[token_id]",
            "It accepts with probability target[x]. A draft model that says x as often as the target does would be "
            "refused most of the time: the probability is target[x] / draft[x].",
        ),
        Mistake(
            "accept_uniforms[i] * draft[token_id] >= target[token_id]",
            "target[token_id] < max(target)",
            "It accepts a draft only when it is the target's most likely token. That is greedy decoding; the answers "
            "of a request with a temperature would lose their variety.",
        ),
        Mistake(
            "return [*tokens, pick(rest, draw_uniform)]\n",
            "tokens.append(pick(rest, draw_uniform))\n            continue\n",
            "It goes on behind a refusal. The later drafts were guesses of what follows the refused token, and their "
            "probabilities were computed behind it: nothing there counts any more.",
        ),
        Mistake(
            "    return [*tokens, pick(target_probs[len(tokens)], draw_uniform)]",
            "    return tokens",
            "When all drafts are accepted it stops. The target has computed one more row, behind the last draft: its "
            "token is free. (And with no draft at all the step would give nothing.)",
        ),
    ),
)
