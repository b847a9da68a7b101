"""Beam search: keep the `beam_width` most likely continuations, step by step.

    beams  ──expand──▶  the 2 * beam_width likeliest next tokens of each
                        eos ones      -> completed
                        the best rest -> beams of the next step

It runs over the engine, never inside the scheduler: a beam is an ordinary request for one token, and its prefix is
found in the prefix cache, so a step costs one token per beam.

Knows no engine: `expand` is given by the caller (llm.py, the HTTP layer).
Twin in vLLM: vllm/beam_search.py. Scores differ from transformers' generate(num_beams=), whose length counts
generated tokens only.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from minivllm.outputs import BeamSearchSequence, Logprob
from minivllm.sampling_params import BeamSearchParams

# One dict per sequence: the next token's logprobs, at least 2 * beam_width of them.
Expand = Callable[[Sequence[list[int]]], Sequence[dict[int, Logprob]]]


def beam_search(
    prompt_token_ids: list[int],
    params: BeamSearchParams,
    max_tokens: int,
    eos_token_ids: frozenset[int],
    expand: Expand,
) -> list[BeamSearchSequence]:
    """The `beam_width` best sequences, best first. Their tokens include the prompt.

    Args:
        max_tokens: params.max_tokens, clamped to the room left in the context.
    """
    beams = [BeamSearchSequence(tokens=list(prompt_token_ids), cum_logprob=0.0)]
    completed: list[BeamSearchSequence] = []
    for _ in range(max_tokens):
        if not beams:  # every continuation ended in eos
            break
        candidates = []
        for beam, logprobs in zip(beams, expand([beam.tokens for beam in beams]), strict=True):
            for token_id in logprobs:
                longer = _extend(beam, token_id, logprobs)
                if token_id in eos_token_ids and not params.ignore_eos:
                    longer.finish_reason = "stop"
                    completed.append(longer)
                else:
                    candidates.append(longer)
        # Equal scores keep the order in which they were found, so the search is deterministic.
        candidates.sort(key=lambda beam: -beam.cum_logprob)
        beams = candidates[: params.beam_width]
    finished = completed + beams
    finished.sort(key=lambda beam: -score(beam, params.length_penalty))
    return finished[: params.beam_width]


def score(beam: BeamSearchSequence, length_penalty: float) -> float:
    """cumulative_logprob / length ** length_penalty; a closing eos does not count as length."""
    length = len(beam.tokens) - (beam.finish_reason == "stop")
    return beam.cum_logprob / max(length, 1) ** length_penalty


def _extend(beam: BeamSearchSequence, token_id: int, logprobs: dict[int, Logprob]) -> BeamSearchSequence:
    """All continuations of one beam share its position's logprobs: a copy for each would be width x width x width."""
    return BeamSearchSequence(
        tokens=[*beam.tokens, token_id],
        cum_logprob=beam.cum_logprob + logprobs[token_id].logprob,
        logprobs=[*beam.logprobs, logprobs],
    )
