"""What transformers says: log-probabilities, greedy continuations, final distributions, embeddings.

float32, CPU, eager attention, one sequence at a time: nothing is padded, batched or fused. Every logits change is
one of transformers' own processors, put into minivllm's order (design: allowed ids, bad words, min tokens, bias,
repetition, frequency, presence; then temperature, min_p, top_k, top_p). transformers itself applies min_p last, and
it has no frequency or presence penalty: that formula is written out here as a plain loop.

Knows nothing of minivllm. Called by make.py.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from transformers import DynamicCache
from transformers.generation import logits_process as hf

NUM_TOP_LOGPROBS = 5
RANK_TOLERANCE = 2e-4  # neighbours closer than this may change places: twice the tolerance on a logprob
NO_RIVAL_GAP = 9999.0  # the gap where masks leave one token

LogitsChange = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]  # (ids [1, n], scores [1, vocab]) -> scores


@dataclass
class Steps:
    """One entry per token; the names are the file format's (cases.py)."""

    token_ids: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    ranks: list[int | list[int]] = field(default_factory=list)
    gaps: list[float] = field(default_factory=list)
    top_ids: list[list[int]] = field(default_factory=list)
    top_logprobs: list[list[float]] = field(default_factory=list)

    def add(self, logits: torch.Tensor, token_id: int) -> None:
        """Describe `token_id` among `logits` [vocab_size], the raw ones."""
        logprobs = torch.log_softmax(logits.double(), dim=-1)  # [vocab_size]
        own = logprobs[token_id]
        lowest = 1 + int((logprobs > own + RANK_TOLERANCE).sum())
        highest = int((logprobs >= own - RANK_TOLERANCE).sum())
        best = logprobs.topk(NUM_TOP_LOGPROBS)
        self.token_ids.append(token_id)
        self.logprobs.append(own.item())
        self.ranks.append(lowest if lowest == highest else [lowest, highest])
        self.top_ids.append(best.indices.tolist())
        self.top_logprobs.append(best.values.tolist())

    def as_dict(self, *, with_top: bool) -> dict[str, Any]:
        content: dict[str, Any] = {"token_ids": self.token_ids, "logprobs": self.logprobs, "ranks": self.ranks}
        if self.gaps:
            content["gaps"] = self.gaps
        if with_top:
            content |= {"top_ids": self.top_ids, "top_logprobs": self.top_logprobs}
        return content


class Reference:
    """A transformers decoder as a function from token ids to logits.

    use_cache=False recomputes the whole sequence for every token: slow, and the plainest truth. With a cache the
    ids must grow from call to call, or a new sequence starts.
    """

    def __init__(self, model: Any, *, use_cache: bool = False):
        self.model = model.eval()
        self.use_cache = use_cache
        self._cached_ids: list[int] = []
        self._cache: DynamicCache | None = None

    @torch.inference_mode()
    def logits(self, token_ids: list[int]) -> torch.Tensor:
        """Logits at the positions not yet seen (all of them without a cache). # [num_new_tokens, vocab_size]"""
        if not self.use_cache:
            output = self.model(torch.tensor([token_ids]), use_cache=False)
            return output.logits[0].float()
        num_known = len(self._cached_ids)
        if self._cache is None or token_ids[:num_known] != self._cached_ids or num_known >= len(token_ids):
            num_known, self._cache = 0, DynamicCache(config=self.model.config)
        output = self.model(torch.tensor([token_ids[num_known:]]), past_key_values=self._cache, use_cache=True)
        self._cached_ids = list(token_ids)
        return output.logits[0].float()

    def greedy(
        self,
        prompt: list[int],
        max_tokens: int,
        changes: list[LogitsChange] | None = None,
        stop_token_ids: frozenset[int] = frozenset(),
        min_tokens: int = 0,
    ) -> tuple[Steps, Steps]:
        """(prompt steps: one per prompt token from the second on, output steps). Stops after a stop token."""
        token_ids = list(prompt)
        logits = self.logits(token_ids)
        prompt_steps = Steps()
        for position in range(1, len(prompt)):
            prompt_steps.add(logits[position - 1], prompt[position])
        steps = Steps()
        while True:
            raw = logits[-1]
            scores = apply_changes(raw, token_ids, changes or [])
            best = scores.topk(2).values.double()
            token_id = int(scores.argmax())
            steps.add(raw, token_id)
            steps.gaps.append(min(float(best[0] - best[1]), NO_RIVAL_GAP))
            token_ids.append(token_id)
            num_output = len(token_ids) - len(prompt)
            if num_output >= max_tokens or (token_id in stop_token_ids and num_output >= min_tokens):
                return prompt_steps, steps
            logits = self.logits(token_ids)


def apply_changes(raw: torch.Tensor, token_ids: list[int], changes: list[LogitsChange]) -> torch.Tensor:
    """`raw` [vocab_size] after all changes, as a new tensor. # [vocab_size]"""
    ids, scores = torch.tensor([token_ids]), raw[None].clone()
    for change in changes:
        scores = change(ids, scores)
    return scores[0]


def logits_changes(
    params: dict[str, Any], num_prompt_tokens: int, stop_token_ids: frozenset[int], bad_words: list[list[int]]
) -> list[LogitsChange]:
    """Everything before the argmax that `params` (fields of SamplingParams) asks for, in minivllm's order."""
    changes: list[LogitsChange] = []
    if params.get("allowed_token_ids"):
        allowed = list(params["allowed_token_ids"])
        changes.append(hf.PrefixConstrainedLogitsProcessor(lambda batch_id, ids: allowed, num_beams=1))
    if bad_words:
        changes.append(hf.NoBadWordsLogitsProcessor(bad_words))
    if params.get("min_tokens"):
        ids = sorted(stop_token_ids)
        changes.append(hf.MinNewTokensLengthLogitsProcessor(num_prompt_tokens, params["min_tokens"], ids))
    if params.get("logit_bias"):
        bias: Any = {(token_id,): float(value) for token_id, value in params["logit_bias"].items()}
        changes.append(hf.SequenceBiasLogitsProcessor(bias))
    if params.get("repetition_penalty", 1.0) != 1.0:
        changes.append(hf.RepetitionPenaltyLogitsProcessor(float(params["repetition_penalty"])))
    frequency, presence = params.get("frequency_penalty", 0.0), params.get("presence_penalty", 0.0)
    if frequency or presence:
        changes.append(_count_penalties(num_prompt_tokens, frequency, presence))
    return changes


def _count_penalties(num_prompt_tokens: int, frequency: float, presence: float) -> LogitsChange:
    """OpenAI's formula: logit -= frequency * (times in the output) + presence * (is in the output)."""

    def change(ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        for token_id, count in Counter(ids[0, num_prompt_tokens:].tolist()).items():
            scores[0, token_id] -= frequency * count
            scores[0, token_id] -= presence
        return scores

    return change


def final_distribution(logits: torch.Tensor, params: dict[str, Any]) -> tuple[dict[int, float], float]:
    """({token id: probability} of what can still be drawn, best first; margin).

    margin: how far, relatively, the nearest token is from being kept instead of dropped, or the reverse. A tiny
    margin makes a case that rounding decides; make.py refuses those.
    """
    scores = logits[None].double() / params["temperature"]  # [1, vocab_size]
    ids: Any = torch.empty((1, 0), dtype=torch.long)  # these processors do not look at it
    margin = 1.0
    if params.get("min_p"):
        weights = torch.softmax(scores, dim=-1)
        ratios = weights / weights.max()
        margin = min(margin, float((ratios / params["min_p"] - 1.0).abs().min()))
        scores = hf.MinPLogitsWarper(params["min_p"])(ids, scores)  # ours: first; transformers: last
    if params.get("top_k"):
        best = scores.topk(params["top_k"] + 1).values[0]
        if torch.isfinite(best[-2]):  # else min_p has left fewer than top_k
            margin = min(margin, float(1.0 - torch.exp(best[-1] - best[-2])))
        scores = hf.TopKLogitsWarper(params["top_k"])(ids, scores)
    if params.get("top_p", 1.0) < 1.0:
        mass = torch.softmax(scores, dim=-1).sort(descending=True).values.cumsum(-1)
        margin = min(margin, float((mass - params["top_p"]).abs().min()))
        scores = hf.TopPLogitsWarper(params["top_p"])(ids, scores)
    probabilities = torch.softmax(scores, dim=-1)[0]
    order = probabilities.argsort(descending=True)
    kept = order[: int((scores[0] > -torch.inf).sum())]
    return {int(token_id): float(probabilities[token_id]) for token_id in kept}, margin


@torch.inference_mode()
def embedding(model: Any, prompt: list[int], pooling: str) -> list[float]:
    """The L2-normalised sentence vector of one prompt. # [hidden_size]"""
    hidden_states = model(torch.tensor([prompt])).last_hidden_state[0].double()  # [num_tokens, hidden_size]
    pooled = {"CLS": hidden_states[0], "LAST": hidden_states[-1], "MEAN": hidden_states.mean(dim=0)}[pooling]
    return torch.nn.functional.normalize(pooled, dim=0).tolist()
