"""What a trace is made of: plain records (document.py makes a file of them).

    Trace
    ├─ header          settings of the engine, versions, whether it begins with an empty engine
    └─ events          in the order in which they happened
       ├─ Added        a request came                  Aborted, CacheReset
       └─ Step         one step of the engine
          └─ Row       what it meant for one request: decision, blocks, slots, prefix hits, kernel
             └─ Draw   one token: how it was drawn, and the logits behind every stage of the sampler

SCHEMA_VERSION grows when a field changes its meaning or goes; a new field is no new version. Seconds are on a clock
that starts with the trace. A sequence is what the scheduler runs: a request, or one of its n children ("0_ID", ...).

Knows no engine, no tensor and no file. Called by everybody in trace/. Twin in vLLM: none.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType

from minivllm.sampling_params import SamplingParams

SCHEMA, SCHEMA_VERSION = "minivllm.trace", 1


@dataclass(slots=True)
class Candidate:
    """A token at one stage of the sampler."""

    token_id: int
    text: str
    logit: float  # behind the stage
    probability: float  # among the tokens that are left


@dataclass(slots=True)
class Stage:
    """The logits behind one stage of the sampler. `changed`: some logit is another one than before it."""

    name: str
    setting: float | None = None  # of the request, where the stage has one number
    changed: bool = False
    num_left: int = 0  # tokens that can still be drawn
    top: list[Candidate] = field(default_factory=list)  # likeliest first


@dataclass(slots=True)
class Draw:
    """One token. `digest` is of the model's logits [vocab_size]: equal digests, equal bits.

    A sampled token is where u falls among the probabilities laid end to end, `low` <= u < `high`.
    Of a recording only position, token_id and digest are kept.
    """

    position: int  # index in the request's output
    token_id: int
    digest: str
    text: str = ""
    u: float | None = None  # None: greedy
    low: float | None = None
    high: float | None = None
    why: str = ""
    stages: list[Stage] = field(default_factory=list)


@dataclass(slots=True)
class Row:
    """One step, one request: one that computes, or one that waits or was preempted."""

    request_id: str
    action: str  # outputs.DECISION_REASONS has them all
    reason: str
    num_scheduled_tokens: int = 0
    num_computed_tokens: int = 0  # before the step
    new_block_ids: list[int] = field(default_factory=list)  # all of its table when it is admitted
    slot_mapping: list[int] = field(default_factory=list)  # [num_scheduled_tokens]: block_id * block_size + offset
    prefix_hits: dict[int, str] = field(default_factory=dict)  # block id -> hash, found in the cache at admission
    draft_token_ids: list[int] = field(default_factory=list)
    kernel: str = ""  # of attention
    draws: list[Draw] = field(default_factory=list)
    new_token_ids: list[int] = field(default_factory=list)  # of its output: drawn ones, then those a grammar forces
    new_texts: list[str] = field(default_factory=list)  # of each; left out of a recording
    embedding_digest: str = ""  # of an embedding's numbers
    finish_reason: str | None = None  # the step has ended it
    error: str | None = None


@dataclass(slots=True)
class Step:
    """One step. Its three times: scheduled, computed, and its outputs made; scheduling itself takes microseconds."""

    number: int
    rows: list[Row] = field(default_factory=list)
    num_free_blocks: int = 0  # when it is scheduled
    named_blocks: dict[int, str] = field(default_factory=dict)  # block id -> hash, of the blocks this step fills
    failed: bool = False
    scheduled_seconds: float = 0.0
    computed_seconds: float = 0.0
    ended_seconds: float = 0.0

    @property
    def num_tokens(self) -> int:
        return sum(row.num_scheduled_tokens for row in self.rows)

    def row(self, request_id: str) -> Row | None:
        """What the step meant for this request; None: nothing."""
        return next((row for row in self.rows if row.request_id == request_id), None)


@dataclass(slots=True)
class Added:
    """A request as it was queued: enough to queue it again. Its children (n > 1) have rows of their own."""

    request_id: str
    prompt_token_ids: list[int]
    sampling_params: SamplingParams | None = None
    prompt: str | None = None
    eos_token_ids: list[int] = field(default_factory=list)
    stop_token_ids: list[int] = field(default_factory=list)
    bad_words_token_ids: list[list[int]] = field(default_factory=list)
    cache_salt: str | None = None
    priority: int = 0
    seed: int = 0
    max_tokens: int = 0
    prompt_texts: list[str] = field(default_factory=list)  # of each token; left out of a recording
    added_seconds: float = 0.0


@dataclass(slots=True)
class Aborted:
    """Its caller gave it up."""

    request_id: str


@dataclass(slots=True)
class CacheReset:
    """Every cached prefix was forgotten."""


Event = Added | Aborted | CacheReset | Step
EVENTS: Mapping[str, type] = MappingProxyType(
    {"added": Added, "aborted": Aborted, "cache_reset": CacheReset, "step": Step}
)


def belongs_to(sequence_id: str, request_id: str) -> bool:
    """Whether a sequence is this request or one of its children."""
    number, _, parent = sequence_id.partition("_")
    return sequence_id == request_id or (number.isdigit() and parent == request_id)
