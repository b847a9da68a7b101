"""Lab: rejection_sampling. Check what a small model guessed, without changing what the large one would say.

A draft model has drawn a few tokens ahead; the target model has computed its probabilities at all of these places in
one forward. A draft x is accepted with probability min(1, target[x] / draft[x]). The first that is refused is replaced
by a token from what the draft model said too seldom: max(0, target - draft), scaled to sum 1. Nothing behind it counts.
When all are accepted there is one token more for free. Tokens then have exactly the target's distribution.

The engine's drafts are certain of themselves (draft[x] = 1), so there a draft is accepted with probability target[x];
it gets the same by drawing from the target and comparing: minivllm/worker/model_runner.py (_sample) and
minivllm/speculative/README.md. Twin in vLLM: v1/sample/rejection_sampler.py.
Source: Leviathan et al., arXiv 2211.17192.
"""

import numpy as np

from minivllm.sample.top_k_top_p import inverse_cdf


def verify(
    draft_token_ids: list[int],
    draft_probs: list[list[float]],
    target_probs: list[list[float]],
    accept_uniforms: list[float],
    draw_uniform: float,
) -> list[int]:
    """The tokens that this step gives: accepted drafts, and one more.

    draft_probs[i], target_probs[i]: probability of every token id at the place of draft i. target_probs has one row
        more, for the place behind the last draft.
    accept_uniforms[i]: a number u in [0, 1) for draft i; it is accepted when u * draft[x] < target[x].
    draw_uniform: for the last token: pick(weights, draw_uniform) below.

        draft_token_ids = [0]   draft_probs = [[1.0, 0.0]]   target_probs = [[0.25, 0.75], [0.5, 0.5]]
        accept_uniforms = [0.1], draw_uniform = 0.9  ->  [0, 1]      accepted, and token 1 from the second row
        accept_uniforms = [0.3], draw_uniform = 0.9  ->  [1]         refused; the rest is [0, 0.75]
    """
    # --- your code
    tokens: list[int] = []
    for i, token_id in enumerate(draft_token_ids):
        target, draft = target_probs[i], draft_probs[i]
        if accept_uniforms[i] * draft[token_id] >= target[token_id]:
            rest = [max(0.0, t - d) for t, d in zip(target, draft, strict=True)]
            return [*tokens, pick(rest, draw_uniform)]
        tokens.append(token_id)
    return [*tokens, pick(target_probs[len(tokens)], draw_uniform)]
    # --- end


def pick(weights: list[float], uniform: float) -> int:
    """An index with probability weights[index] / sum(weights), as the engine draws. Nothing to do here."""
    return inverse_cdf(np.array(weights), uniform)
