"""Changes to the logits that depend on what the request has seen or asked for: masks, bias, penalties.

Everything works in place on `logits`, a numpy view [num_reqs, vocab_size] fp32, and touches only the ids named
(masks of whole rows excepted). Penalties need the counts of all tokens seen; PenaltyState keeps them from token to
token, so a step costs O(distinct ids) and never a walk over the text.

It does NOT know temperature, chance or the order of the steps. Called by sample/metadata.py (state) and
sample/sampler.py (application).
Twin in vLLM: v1/sample/ops/penalties.py, v1/sample/ops/bad_words.py, v1/sample/logits_processor/builtin.py.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Mapping, Sequence

import numpy as np
import numpy.typing as npt

from minivllm.sampling_params import SamplingParams

Logits = npt.NDArray[np.float32]
TokenIds = npt.NDArray[np.int64]

_FLOAT32_MAX = float(np.finfo(np.float32).max)


def within(token_ids: Iterable[int], vocab_size: int) -> TokenIds:
    """The ids that are columns of the logits, distinct and ascending. The others have no logit to change."""
    kept = {token_id for token_id in token_ids if 0 <= token_id < vocab_size}
    return np.array(sorted(kept), dtype=np.int64)  # [num_ids]


class PenaltyState:
    """Which ids one request has seen and how often it produced them. `append` is O(1), amortised.

    The repetition penalty looks at prompt and output, the other two at the output only, so the prompt is
    remembered only when the repetition penalty is on.
    """

    __slots__ = ("_counts", "_slots", "_token_ids", "frequency", "presence", "repetition", "vocab_size")

    def __init__(self, params: SamplingParams, vocab_size: int, prompt_token_ids: Iterable[int]):
        self.repetition = params.repetition_penalty
        self.frequency = params.frequency_penalty
        self.presence = params.presence_penalty
        self.vocab_size = vocab_size
        seen = within(prompt_token_ids, vocab_size) if self.repetition != 1.0 else np.empty(0, dtype=np.int64)
        self._slots = {token_id: slot for slot, token_id in enumerate(seen.tolist())}
        self._token_ids = np.zeros(2 * len(seen) + 64, dtype=np.int64)  # [capacity]
        self._token_ids[: len(seen)] = seen
        self._counts = np.zeros(len(self._token_ids), dtype=np.float64)  # [capacity] times in the output

    def append(self, token_id: int) -> None:
        """Count one output token. An id outside the logits is ignored."""
        slot = self._slots.get(token_id)
        if slot is None:
            if not 0 <= token_id < self.vocab_size:
                return
            slot = self._slots[token_id] = len(self._slots)
            if slot == len(self._token_ids):
                self._token_ids = np.concatenate([self._token_ids, np.zeros_like(self._token_ids)])
                self._counts = np.concatenate([self._counts, np.zeros_like(self._counts)])
            self._token_ids[slot] = token_id
        self._counts[slot] += 1.0

    @property
    def token_ids(self) -> TokenIds:
        """The ids seen, each once.  # [num_seen]"""
        return self._token_ids[: len(self._slots)]

    @property
    def output_counts(self) -> npt.NDArray[np.float64]:
        """How often each of `token_ids` is in the output.  # [num_seen]"""
        return self._counts[: len(self._slots)]


class BadWords:
    """Token sequences that must not be completed. Matches against output tokens only, as vLLM does."""

    __slots__ = ("_recent", "_singles", "_words")

    def __init__(self, words: Iterable[Sequence[int]], vocab_size: int):
        known = [tuple(word) for word in words if word and 0 <= word[-1] < vocab_size]
        self._singles = [word[0] for word in known if len(word) == 1]
        self._words = [(word[:-1], word[-1]) for word in known if len(word) > 1]
        longest = max((len(prefix) for prefix, _ in self._words), default=0)
        self._recent: deque[int] = deque(maxlen=longest)

    def append(self, token_id: int) -> None:
        self._recent.append(token_id)

    def banned_next(self) -> list[int]:
        """The ids that would complete a bad word now."""
        recent = tuple(self._recent)
        return self._singles + [last for prefix, last in self._words if recent[-len(prefix) :] == prefix]


def apply_grammar_bitmask(logits: Logits, bitmask: npt.NDArray[np.int32]) -> None:
    """-inf where the bit is 0. bitmask: [num_reqs, ceil(vocab_size / 32)]; bit t % 32 of word t // 32 is token t.

    Rows of ones (requests without a grammar) cost one comparison per word. ValueError on another shape.
    """
    num_reqs, vocab_size = logits.shape
    if bitmask.shape != (num_reqs, -(-vocab_size // 32)):
        raise ValueError(
            f"grammar_bitmask must have shape {(num_reqs, -(-vocab_size // 32))} for logits of shape "
            f"{logits.shape}, got {bitmask.shape}"
        )
    for row in np.flatnonzero((bitmask != -1).any(axis=1)):
        octets = np.ascontiguousarray(bitmask[row], dtype="<i4").view(np.uint8)
        refused = np.unpackbits(~octets, count=vocab_size, bitorder="little")  # [vocab_size]
        np.copyto(logits[row], -np.inf, where=refused.view(np.bool_))


def apply_allowed_token_ids(logits: Logits, allowed: Mapping[int, TokenIds]) -> None:
    """All other ids of these rows become -inf."""
    for row, token_ids in allowed.items():
        kept = logits[row, token_ids]
        logits[row] = -np.inf
        logits[row, token_ids] = kept


def apply_banned_token_ids(logits: Logits, banned: Mapping[int, Sequence[int]]) -> None:
    """These ids become -inf."""
    for row, token_ids in banned.items():
        logits[row, token_ids] = -np.inf


def apply_logit_bias(logits: Logits, biases: Mapping[int, tuple[TokenIds, Logits]]) -> None:
    """Adds each bias to its id."""
    for row, (token_ids, bias) in biases.items():
        logits[row, token_ids] += bias


def apply_penalties(logits: Logits, states: Mapping[int, PenaltyState]) -> None:
    """Repetition (positive logits divided, negative multiplied), then frequency x count, then presence.

    One gather and one scatter for all rows together. Computed in float64 and rounded once. A logit that is not
    finite stays as it is (masked stays masked, NaN stays visible); a finite one stays finite.
    """
    if not states:
        return
    sizes = [len(state.token_ids) for state in states.values()]
    rows = np.repeat(np.fromiter(states, np.int64, len(states)), sizes)  # [num_seen]
    token_ids = np.concatenate([state.token_ids for state in states.values()])  # [num_seen]
    counts = np.concatenate([state.output_counts for state in states.values()])  # [num_seen]
    settings = np.array([(state.repetition, state.frequency, state.presence) for state in states.values()])
    repetition, frequency, presence = np.repeat(settings, sizes, axis=0).T  # 3 x [num_seen]

    before = logits[rows, token_ids].astype(np.float64)  # [num_seen]
    with np.errstate(over="ignore", invalid="ignore"):  # the clip below is the answer to both
        after = np.where(before > 0, before / repetition, before * repetition)
        after -= frequency * counts + presence * (counts > 0)
        after = np.clip(after, -_FLOAT32_MAX, _FLOAT32_MAX)
    logits[rows, token_ids] = np.where(np.isfinite(before), after, before)
