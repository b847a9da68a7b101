"""Lab: top_p. Keep the most likely tokens that together have the share p (nucleus sampling).

The long tail of a vocabulary has tens of thousands of tokens that are each very unlikely and together are not. top_p
cuts it: the smallest set of most likely tokens whose probabilities sum up to at least p, and the draw is among them.

    probabilities  0.5  0.3  0.15  0.05      p = 0.6: the first two (0.8); with the first alone it would be 0.5

The engine does this in minivllm/sample/top_k_top_p.py (restrict), without sorting the vocabulary.
Twin in vLLM: v1/sample/ops/topk_topp_sampler.py. Source: Holtzman et al., arXiv 1904.09751.
"""

import math


def top_p(logits: list[float], temperature: float, p: float) -> dict[int, float]:
    """token id -> probability of being drawn, for the tokens that may be drawn; the probabilities sum up to 1.

    Of two tokens with equal logits the one with the lower id comes first.

    logits: one per token id. temperature: > 0; logits are divided by it. p: 0 < p <= 1.

        logits = [log 0.3, log 0.5, log 0.05, log 0.15]
        top_p(logits, 1.0, 0.6)  ->  {1: 0.625, 0: 0.375}
    """
    # --- your code
    largest = max(logits)
    weights = [math.exp((logit - largest) / temperature) for logit in logits]
    share = p * sum(weights)
    kept: list[int] = []
    mass = 0.0
    for token_id in sorted(range(len(logits)), key=lambda token_id: (-logits[token_id], token_id)):
        if mass >= share:
            break
        kept.append(token_id)
        mass += weights[token_id]
    return {token_id: weights[token_id] / mass for token_id in kept}
    # --- end
