"""Drafting: after each step, which requests get drafts for the next one, and what became of the last ones.

    follow(step, result)   counts accepted drafts, then leaves new ones in Request.draft_token_ids

n-gram drafts are known here; those of a draft model are promised by number and written by the worker inside the next
step. Nothing is left for a request that ended, or while more than disable_by_batch_size run, or while its drafts fail
(speculative/acceptance.py). A draft that its grammar refuses, or that would end the request, is cut with all behind it:
the one could never be drawn, and nothing would follow the other.

Knows no tensor and no text. Called by llm_engine.py. Twin in vLLM: propose_draft_token_ids of gpu_model_runner.py and
update_draft_token_ids of v1/core/sched/scheduler.py.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass

from minivllm.config import SpeculativeConfig
from minivllm.core.request import Request
from minivllm.core.scheduler import Scheduler
from minivllm.engine.stats import SpecDecodeStats
from minivllm.outputs import PROMISED_DRAFT, ModelRunnerOutput, SchedulerOutput
from minivllm.speculative.acceptance import Acceptance
from minivllm.speculative.ngram import NgramTable
from minivllm.structured_output.manager import StructuredOutputManager


@dataclass(slots=True)
class _Drafted:
    """What is kept of one request while it runs."""

    request: Request
    table: NgramTable
    acceptance: Acceptance


class Drafting:
    """Args:
    eos_token_ids: of the model; nothing follows them in a grammar, also where a request ignores them.
    stats: is filled.
    """

    def __init__(
        self,
        config: SpeculativeConfig,
        scheduler: Scheduler,
        grammars: StructuredOutputManager,
        eos_token_ids: frozenset[int],
        stats: SpecDecodeStats,
    ):
        self._config = config
        self._scheduler = scheduler
        self._grammars = grammars
        self._eos_token_ids = eos_token_ids
        self._stats = stats
        self._drafted: dict[str, _Drafted] = {}

    def follow(self, step: SchedulerOutput, result: ModelRunnerOutput) -> None:
        """One step has ended, and everything that it meant for the requests is done."""
        for request_id, drafts in step.draft_token_ids.items():
            self._count(request_id, len(drafts), len(result.sampled_token_ids.get(request_id, ())) - 1)
        for request_id in [key for key in self._drafted if key not in self._scheduler.requests]:
            del self._drafted[request_id]
        if len(self._scheduler.running) > self._config.disable_by_batch_size:
            return
        for request in self._scheduler.running:
            if request.request_id in result.sampled_token_ids:
                request.draft_token_ids = self._propose(request)

    def _count(self, request_id: str, num_drafts: int, num_accepted: int) -> None:
        request = self._scheduler.requests.get(request_id)
        if num_accepted < 0:  # an error, or it was aborted meanwhile
            return
        self._stats.observe(num_drafts, num_accepted)
        if request is not None:
            self._drafted[request_id].acceptance.observe(num_drafts, num_accepted, request.num_tokens)

    def _propose(self, request: Request) -> list[int]:
        config, request_id = self._config, request.request_id
        drafted = self._drafted.get(request_id)
        if drafted is None or drafted.request is not request:  # or the id of one that was aborted since
            table = NgramTable(config.shortest_lookup, config.longest_lookup)
            drafted = _Drafted(request, table, Acceptance(config.min_acceptance_rate))
            self._drafted[request_id] = drafted
        if not drafted.acceptance.allows(request.num_tokens):
            return []
        if config.method == "draft_model":
            return [PROMISED_DRAFT] * config.num_speculative_tokens
        drafts = drafted.table.propose(request.all_token_ids, config.num_speculative_tokens)
        ends = request.eos_token_ids | request.stop_token_ids
        if request_id in self._grammars:
            drafts = drafts[: self._grammars.validate_tokens(request_id, drafts)]
            ends |= self._eos_token_ids
        return list(itertools.takewhile(lambda token_id: token_id not in ends, drafts))
