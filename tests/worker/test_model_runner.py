"""ModelRunner: however a request is cut, cached, preempted and accompanied, it gets what one full forward gives.

The scheduler is the real one, the networks are tiny and random, the truth is transformers' forward over the whole
text at once. The cache starts as NaN and every block is filled with NaN again for each new owner.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from torch.nn.functional import log_softmax, normalize

from minivllm.core.request import Request
from minivllm.models.layers import ModelOptions
from minivllm.outputs import SchedulerOutput, TokenLogprobs
from minivllm.sampling_params import SamplingParams
from minivllm.worker import model_runner
from minivllm.worker.kv_cache import allocate_kv_caches, poison_blocks
from minivllm.worker.model_runner import ModelRunner
from tests.core.helpers import make_scheduler
from tests.models.tiny import VOCAB_SIZE, ours_from, prompt, tiny_config, tiny_hf
from tests.tolerances import HF_HIDDEN_ATOL, HF_LOGPROB_ATOL, HF_TIE_GAP

BLOCK_SIZE = 4
MAX_MODEL_LEN = 64
WINDOW = {"sliding_window": 6, "layer_types": ["sliding_attention", "full_attention", "sliding_attention"]}
NETWORKS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("LlamaConfig", {}),
    "qwen3": ("Qwen3Config", {"head_dim": 16}),
    "gemma3_window": ("Gemma3TextConfig", {"head_dim": 16, **WINDOW}),
}
BUDGETS = [1, BLOCK_SIZE - 1, BLOCK_SIZE, BLOCK_SIZE + 1, 7, 64]
LENGTHS = [1, BLOCK_SIZE - 1, BLOCK_SIZE, BLOCK_SIZE + 1, 7, 2 * BLOCK_SIZE, 2 * BLOCK_SIZE + 1, 23]
PROMPTS = {f"{length} tokens": prompt(length) for length in LENGTHS}
INVARIANT = ModelOptions(dtype=torch.float32, batch_invariant=True)


@pytest.fixture(scope="module", params=NETWORKS)
def pair(request: pytest.FixtureRequest) -> tuple[Any, Any]:
    """transformers' network and ours."""
    config_class, changes = NETWORKS[request.param]
    network = tiny_hf(tiny_config(config_class, **changes))
    return network, ours_from(network)


@pytest.fixture(scope="module")
def llama() -> tuple[Any, Any]:
    network = tiny_hf(tiny_config("LlamaConfig"))
    return network, ours_from(network)


# ------------------------------------------------------------------ the loop
@dataclass
class Got:
    """What one request got, over all its steps."""

    token_ids: list[int] = field(default_factory=list)
    logprobs: list[TokenLogprobs] = field(default_factory=list)
    prompt_logprobs: list[TokenLogprobs] = field(default_factory=list)
    pooled: list[float] | None = None
    num_cached_tokens: int = 0
    finish_reason: str | None = None
    error: str | None = None


class Loop:
    """A scheduler and a runner on one poisoned cache: what LLMEngine does, without text."""

    def __init__(
        self,
        model: Any,
        *,
        num_blocks: int = 96,
        poison: bool = True,
        runner: dict[str, Any] | None = None,
        **limits: Any,
    ):
        limits.setdefault("max_model_len", MAX_MODEL_LEN)
        self.scheduler = make_scheduler(num_blocks, BLOCK_SIZE, **limits)
        caches = allocate_kv_caches(model.kv_cache_specs, num_blocks, BLOCK_SIZE, torch.float32, poison=poison)
        self.runner = ModelRunner(model, caches, BLOCK_SIZE, limits["max_model_len"], poison=poison, **(runner or {}))
        self.got: dict[str, Got] = {}

    def add(self, request_id: str, token_ids: list[int], max_tokens: int = 9, **params: Any) -> None:
        """A generating request: greedy, with the five best logprobs, unless `params` say otherwise."""
        params = {"temperature": 0.0, "logprobs": 5, "max_tokens": None, **params}
        sampling_params = SamplingParams(**params)
        self._add(
            Request(
                request_id,
                token_ids,
                sampling_params,
                max_tokens=max_tokens,
                seed=len(self.got),
                skip_prefix_cache=sampling_params.prompt_logprobs is not None,
            )
        )

    def add_pooling(self, request_id: str, token_ids: list[int]) -> None:
        every_position = self.runner.pooling_type != "LAST"
        self._add(Request(request_id, token_ids, None, skip_prefix_cache=every_position))

    def _add(self, request: Request) -> None:
        request.arrival = len(self.got)
        self.got[request.request_id] = Got()
        self.scheduler.add_request(request)

    def step(self) -> SchedulerOutput:
        step = self.scheduler.schedule()
        result = self.runner.execute_model(step)
        for output in self.scheduler.update_from_output(step, result):
            got = self.got[output.request_id]
            got.token_ids += output.new_token_ids
            got.logprobs += output.logprobs or []
            got.prompt_logprobs += output.prompt_logprobs or []
            got.pooled = output.pooler_output
            got.num_cached_tokens = output.num_cached_tokens
            got.finish_reason, got.error = output.finish_reason, output.error
        return step

    def run(self) -> dict[str, Got]:
        """Until everybody has ended and the worker has heard of it."""
        while self.scheduler.has_work:
            self.step()
        assert self.runner.states == {}, "the worker forgets what has ended"
        self.scheduler.check_integrity()
        assert all(got.finish_reason for got in self.got.values())
        return self.got


def full_forward(network: Any, token_ids: list[int]) -> torch.Tensor:
    """Log-probabilities of one pass of transformers over everything.  # [len(token_ids), vocab_size]"""
    return log_softmax(network(torch.tensor([token_ids])).logits[0].float(), -1)


def assert_row(expected: torch.Tensor, entry: TokenLogprobs) -> None:
    """One position: the token's own logprob and the best ones, against a row [vocab_size]."""
    difference = (expected[entry.token_ids] - torch.tensor(entry.logprobs)).abs().max()
    assert difference <= HF_LOGPROB_ATOL, f"log-probabilities differ by {float(difference):.2e}"


def assert_is_full_forward(network: Any, token_ids: list[int], got: Got, num_tokens: int = 9) -> None:
    """Every drawn token is the best one of the full forward (or ties with it), with its log-probabilities."""
    assert got.error is None and len(got.token_ids) == len(got.logprobs) == num_tokens
    expected = full_forward(network, token_ids + got.token_ids)
    for index, (token_id, entry) in enumerate(zip(got.token_ids, got.logprobs, strict=True)):
        row = expected[len(token_ids) - 1 + index]
        assert row.max() - row[token_id] < HF_TIE_GAP, f"output token {index} is not the best one"
        assert entry.token_ids[0] == token_id
        assert_row(row, entry)


# ------------------------------------------------------------------ test number one
@pytest.mark.parametrize("budget", BUDGETS)
def test_number_one_cached_chunked_decoding_equals_one_full_forward(pair: tuple[Any, Any], budget: int):
    """Prompts around one and two blocks, cut by the budget, all in one batch; then once more out of the cache."""
    network, model = pair
    loop = Loop(model, max_num_batched_tokens=budget)
    for name, token_ids in PROMPTS.items():
        loop.add(name, token_ids)
    cold = loop.run()
    assert all(got.num_cached_tokens == 0 for got in cold.values())
    for name, token_ids in PROMPTS.items():
        loop.add(f"{name} again", token_ids)
    warm = loop.run()
    for name, token_ids in PROMPTS.items():
        assert warm[f"{name} again"].num_cached_tokens == (len(token_ids) - 1) // BLOCK_SIZE * BLOCK_SIZE
        assert_is_full_forward(network, token_ids, cold[name])
        assert_is_full_forward(network, token_ids, warm[f"{name} again"])


def test_a_capped_prompt_between_decoding_ones_equals_one_full_forward(pair: tuple[Any, Any]):
    """Who draws stands before and behind somebody who does not."""
    network, model = pair
    loop = Loop(model, max_num_batched_tokens=12, long_prefill_token_threshold=3)
    loop.add("before", PROMPTS["1 tokens"], max_tokens=14)
    loop.add("capped", PROMPTS["23 tokens"])
    loop.add("after", PROMPTS["3 tokens"], max_tokens=14)
    assert loop.step().num_scheduled_tokens == {"before": 1, "capped": 3, "after": 3}
    shares = [loop.step().num_scheduled_tokens for _ in range(3)]
    assert shares == [{"before": 1, "capped": 3, "after": 1}] * 3
    got = loop.run()
    assert_is_full_forward(network, PROMPTS["1 tokens"], got["before"], num_tokens=14)
    assert_is_full_forward(network, PROMPTS["23 tokens"], got["capped"])
    assert_is_full_forward(network, PROMPTS["3 tokens"], got["after"], num_tokens=14)


def test_requests_that_share_a_prefix_in_the_same_step_equal_one_full_forward(pair: tuple[Any, Any]):
    """The second and third read, in the step in which they come, keys that the first writes in this very step."""
    network, model = pair
    common = PROMPTS["23 tokens"]
    texts = {"a": common, "b": common, "c": [*common[:16], 5, 6]}
    loop = Loop(model)
    for name, token_ids in texts.items():
        loop.add(name, token_ids)
    step = loop.step()
    assert step.num_scheduled_tokens == {"a": 23, "b": 3, "c": 2}
    got = loop.run()
    for name, token_ids in texts.items():
        assert_is_full_forward(network, token_ids, got[name])


def test_a_conversation_goes_on_from_generated_blocks(pair: tuple[Any, Any]):
    network, model = pair
    loop = Loop(model)
    loop.add("turn 1", PROMPTS["7 tokens"])
    first = loop.run()["turn 1"]
    text = [*PROMPTS["7 tokens"], *first.token_ids, 3, 4]
    loop.add("turn 2", text)
    second = loop.run()["turn 2"]
    assert second.num_cached_tokens == 12  # 7 + 8 computed tokens: three blocks, of which two hold drawn tokens
    assert_is_full_forward(network, text, second)


# ------------------------------------------------------------------ preemption
TIGHT = 1 + 10  # the null block and ten: the longest request takes eight


@pytest.mark.parametrize("caching", [True, False], ids=["caching", "no-caching"])
@pytest.mark.parametrize("budget", [5, 64])
def test_preempted_and_resumed_requests_equal_one_full_forward(pair: tuple[Any, Any], budget: int, caching: bool):
    network, model = pair
    loop = Loop(model, num_blocks=TIGHT, max_num_batched_tokens=budget, enable_prefix_caching=caching)
    for name, token_ids in PROMPTS.items():
        loop.add(name, token_ids)
    got = loop.run()
    assert loop.scheduler.num_preemptions > 0
    for name, token_ids in PROMPTS.items():
        assert_is_full_forward(network, token_ids, got[name])


@pytest.mark.parametrize("name", NETWORKS)
def test_preemption_chunks_and_company_change_no_bit_in_batch_invariant_mode(name: str):
    """Drawn tokens too: a request's draws depend on its seed and the position only."""
    config_class, changes = NETWORKS[name]
    model = ours_from(tiny_hf(tiny_config(config_class, **changes)), INVARIANT)
    wishes: dict[str, dict[str, Any]] = {
        "7 tokens": {"temperature": 1.3},
        "8 tokens": {"temperature": 0.0},
        "9 tokens": {"temperature": 0.8, "top_p": 0.9},
        "23 tokens": {"temperature": 1.0, "prompt_logprobs": 2},
    }
    results = []
    for num_blocks, budget in ((96, 64), (TIGHT, 64), (TIGHT, 5)):
        loop = Loop(model, num_blocks=num_blocks, max_num_batched_tokens=budget, runner={"batch_invariant": True})
        for wish, params in wishes.items():
            loop.add(wish, PROMPTS[wish], **params)
        got = loop.run()
        assert (loop.scheduler.num_preemptions > 0) == (num_blocks == TIGHT)
        results.append({wish: (one.token_ids, one.logprobs, one.prompt_logprobs) for wish, one in got.items()})
    assert results[0] == results[1] == results[2]


def test_the_worker_forgets_a_preempted_request_and_learns_it_anew(llama: tuple[Any, Any]):
    _, model = llama
    loop = Loop(model, num_blocks=TIGHT)
    loop.add("a", prompt(20), max_tokens=3)
    loop.add("b", prompt(20, seed=1), max_tokens=3)
    loop.step()
    assert set(loop.runner.states) == {"a", "b"}
    step = loop.step()  # a's token 21 takes a block from b
    assert step.preempted_req_ids == ["b"]
    assert set(loop.runner.states) == {"a"}
    loop.step()
    assert loop.step().num_scheduled_tokens == {"b": 5}
    state = loop.runner.states["b"]
    assert (state.num_prompt_tokens, state.num_tokens) == (20, 22)  # one token from before, one from now
    assert state.row is not None and state.row.num_output_tokens == 2


# ------------------------------------------------------------------ prompt logprobs
@pytest.mark.parametrize("budget", BUDGETS)
def test_prompt_logprobs_across_chunks_equal_those_of_one_pass(pair: tuple[Any, Any], budget: int):
    network, model = pair
    loop = Loop(model, max_num_batched_tokens=budget)
    loop.add("warm", PROMPTS["23 tokens"])
    loop.run()  # the prefix is known now, and must not be used: every position's logits are wanted
    for name, token_ids in PROMPTS.items():
        loop.add(name, token_ids, max_tokens=2, prompt_logprobs=3)
    got = loop.run()
    for name, token_ids in PROMPTS.items():
        assert got[name].num_cached_tokens == 0
        entries = got[name].prompt_logprobs
        assert [entry.token_ids[0] for entry in entries] == token_ids[1:]  # nothing predicts the first token
        assert all(len(entry.token_ids) == 1 + 3 for entry in entries)
        expected = full_forward(network, token_ids)
        for row, entry in zip(expected, entries, strict=False):
            assert_row(row, entry)
            own = row[entry.token_ids[0]]
            at_least, at_most = (row > own + HF_TIE_GAP).sum() + 1, (row > own - HF_TIE_GAP).sum()
            assert at_least <= entry.rank <= at_most
        assert_is_full_forward(network, token_ids, got[name], num_tokens=2)


def test_prompt_logprobs_after_a_preemption_are_complete_and_told_once(llama: tuple[Any, Any]):
    network, model = llama
    loop = Loop(model, num_blocks=TIGHT, max_num_batched_tokens=24)
    loop.add("a", prompt(20), max_tokens=12)
    loop.add("b", prompt(20, seed=1), max_tokens=3, prompt_logprobs=0)
    got = loop.run()["b"]
    assert loop.scheduler.num_preemptions > 0
    assert [entry.token_ids for entry in got.prompt_logprobs] == [[token_id] for token_id in prompt(20, seed=1)[1:]]
    for row, entry in zip(full_forward(network, prompt(20, seed=1)), got.prompt_logprobs, strict=False):
        assert_row(row, entry)


def test_logits_of_a_long_prompt_are_never_all_there_at_once(llama: tuple[Any, Any], monkeypatch: pytest.MonkeyPatch):
    _, model = llama
    sizes: list[int] = []
    compute = model.compute_logits

    def watched(hidden_states: torch.Tensor) -> torch.Tensor:  # [num_rows, hidden_size] -> [num_rows, vocab_size]
        sizes.append(len(hidden_states))
        return compute(hidden_states)

    with monkeypatch.context() as patch:
        patch.setattr(model_runner, "PROMPT_LOGPROBS_ROWS", 5)
        patch.setattr(model, "compute_logits", watched)
        loop = Loop(model)
        loop.add("r", PROMPTS["23 tokens"], max_tokens=1, prompt_logprobs=1)
        pieces = loop.run()["r"].prompt_logprobs
    assert sizes == [5, 5, 5, 5, 2, 1]  # 22 rows predict the prompt, the last one the output
    whole = Loop(model)
    whole.add("r", PROMPTS["23 tokens"], max_tokens=1, prompt_logprobs=1)
    assert [entry.token_ids for entry in pieces] == [entry.token_ids for entry in whole.run()["r"].prompt_logprobs]


# ------------------------------------------------------------------ who draws
def test_only_requests_whose_tokens_are_all_computed_get_logits(
    llama: tuple[Any, Any], monkeypatch: pytest.MonkeyPatch
):
    _, model = llama
    sizes: list[int] = []
    compute = model.compute_logits
    loop = Loop(model, max_num_batched_tokens=16)
    loop.add("a", PROMPTS["7 tokens"], max_tokens=3)
    loop.add("b", PROMPTS["23 tokens"], max_tokens=1)
    with monkeypatch.context() as patch:
        patch.setattr(model, "compute_logits", lambda rows: sizes.append(len(rows)) or compute(rows))
        shares = [loop.step().num_scheduled_tokens for _ in range(3)]
    assert shares == [{"a": 7, "b": 9}, {"a": 1, "b": 14}, {"a": 1}]
    assert sizes == [1, 2, 1]  # in the first step b is in the middle of its prompt


def test_a_request_may_fill_the_context_to_its_last_token(llama: tuple[Any, Any]):
    network, model = llama
    loop = Loop(model, max_model_len=24)
    loop.add("r", PROMPTS["23 tokens"])
    loop.add("s", PROMPTS["9 tokens"], max_tokens=40)
    got = loop.run()
    assert (len(got["r"].token_ids), got["r"].finish_reason) == (1, "length")
    assert (len(got["s"].token_ids), got["s"].finish_reason) == (15, "length")
    assert_is_full_forward(network, PROMPTS["9 tokens"], got["s"], num_tokens=15)


def test_logprobs_come_to_those_who_asked_and_with_as_many_alternatives(llama: tuple[Any, Any]):
    _, model = llama
    loop = Loop(model)
    for name, logprobs in (("none", None), ("own", 0), ("three", 3)):
        loop.add(name, PROMPTS["7 tokens"], max_tokens=2, logprobs=logprobs)
    got = loop.run()
    assert got["none"].token_ids == got["own"].token_ids == got["three"].token_ids
    assert got["none"].logprobs == []
    assert [len(entry.token_ids) for entry in got["own"].logprobs] == [1, 1]
    assert [len(entry.token_ids) for entry in got["three"].logprobs] == [4, 4]


def test_a_step_with_no_tokens_forgets_and_computes_nothing(llama: tuple[Any, Any], monkeypatch: pytest.MonkeyPatch):
    _, model = llama
    loop = Loop(model)
    loop.add("a", PROMPTS["7 tokens"])
    loop.add("b", PROMPTS["8 tokens"])
    loop.step()
    nothing = SchedulerOutput(
        step=2, scheduled_new_reqs=[], scheduled_cached_reqs=[], num_scheduled_tokens={},
        total_num_scheduled_tokens=0, preempted_req_ids=["b"], finished_req_ids=["a", "never seen"], decisions=[],
    )  # fmt: skip
    with monkeypatch.context() as patch:
        patch.setattr(model, "forward", lambda *_: pytest.fail("there is nothing to compute"))
        result = loop.runner.execute_model(nothing)
    assert loop.runner.states == {}
    assert (result.sampled_token_ids, result.logprobs, result.prompt_logprobs) == ({}, {}, {})
    assert (result.pooler_output, result.errors) == ({}, {})


# ------------------------------------------------------------------ poison
def test_a_new_owner_finds_nothing_of_the_last_one(llama: tuple[Any, Any]):
    """Under poison every slot that the owner has not written is NaN, so a read too far shows in the output."""
    _, model = llama
    loop = Loop(model, num_blocks=4, enable_prefix_caching=False)
    loop.add("a", PROMPTS["9 tokens"], max_tokens=3)
    loop.run()
    assert all(not cache[:, 1:].isnan().all() for pair in loop.runner.kv_caches for cache in pair)
    loop.add("b", PROMPTS["5 tokens"])
    loop.step()
    [first, second] = loop.scheduler.kv_cache.tables["b"].block_ids
    for layer in loop.runner.kv_caches:
        for cache in layer:  # [num_kv_heads, num_blocks, block_size, head_size]
            assert not cache[:, first].isnan().any()
            assert not cache[:, second, :1].isnan().any() and cache[:, second, 1:].isnan().all()
    for _ in range(4):
        loop.step()
    third = loop.scheduler.kv_cache.tables["b"].block_ids[2]  # a block that it has grown into, for its ninth token
    for layer in loop.runner.kv_caches:
        for cache in layer:
            assert not cache[:, third, :1].isnan().any() and cache[:, third, 1:].isnan().all()


def test_without_poison_the_same_tokens_come_out(llama: tuple[Any, Any]):
    network, model = llama
    loop = Loop(model, num_blocks=TIGHT, poison=False)
    for name, token_ids in PROMPTS.items():
        loop.add(name, token_ids)
    for name, got in loop.run().items():
        assert_is_full_forward(network, PROMPTS[name], got)


# ------------------------------------------------------------------ faults
@pytest.fixture
def broken_token() -> Iterator[tuple[Any, Any, int]]:
    """transformers' network, ours with NaN as the embedding of one token, and that token. PROMPTS do not meet it."""
    network = tiny_hf(tiny_config("LlamaConfig"))
    model = ours_from(network)
    loop = Loop(model)
    for name, token_ids in PROMPTS.items():
        loop.add(name, token_ids)
    met = {i for name, got in loop.run().items() for i in PROMPTS[name] + got.token_ids}
    token_id = min(set(range(VOCAB_SIZE)) - met)
    model.model.embed_tokens.weight[token_id] = torch.nan
    yield network, model, token_id


@pytest.mark.parametrize("budget", [5, 64])
def test_a_request_with_nan_logits_errs_alone(broken_token: tuple[Any, Any, int], budget: int):
    """The NaN flows through all layers of one request, beside others in the same tensors. Who comes later with the
    same beginning computes it anew: in the step of the NaN, attention's 0 x NaN may have spoilt it as well."""
    network, model, token_id = broken_token
    loop = Loop(model, max_num_batched_tokens=budget)
    *early, late = PROMPTS
    for name in early:
        if name == "9 tokens":  # somewhere in the middle
            loop.add("bad", [*PROMPTS[late][:8], token_id, *PROMPTS["3 tokens"]])
        loop.add(name, PROMPTS[name])
    got = loop.run()
    assert got["bad"].finish_reason == "error" and "NaN" in got["bad"].error
    assert got["bad"].token_ids == []
    loop.add(late, PROMPTS[late])
    assert loop.run()[late].num_cached_tokens == 0
    for name, token_ids in PROMPTS.items():
        assert_is_full_forward(network, token_ids, got[name])


def test_a_request_that_errs_is_among_the_errors_and_nowhere_else(broken_token: tuple[Any, Any, int]):
    _, model, token_id = broken_token
    loop = Loop(model)
    loop.add("bad", [*PROMPTS["3 tokens"], token_id])
    loop.add("good", PROMPTS["4 tokens"])
    result = loop.runner.execute_model(loop.scheduler.schedule())
    assert set(result.errors) == {"bad"}
    assert set(result.sampled_token_ids) == set(result.logprobs) == {"good"}
    assert loop.runner.states["bad"].num_tokens == 4  # nothing was appended


def test_blocks_that_held_nan_are_as_good_as_any_for_their_next_owner(broken_token: tuple[Any, Any, int]):
    network, model, token_id = broken_token
    loop = Loop(model, num_blocks=TIGHT, poison=False)  # nobody cleans up in production either
    loop.add("bad", [token_id] * 36)
    assert loop.run()["bad"].finish_reason == "error"
    assert loop.runner.kv_caches[0][0].isnan().any()
    assert loop.scheduler.kv_cache.pool.num_cached_blocks == 0
    loop.add("next", PROMPTS["23 tokens"])
    assert_is_full_forward(network, PROMPTS["23 tokens"], loop.run()["next"])


def test_nan_that_an_earlier_chunk_wrote_fails_one_request_and_not_everybody_after_it(llama: tuple[Any, Any]):
    """A block goes bad once, in the middle of a prompt. The request errs when it draws, and the bad block stayed in
    the prefix cache: whoever came with this prefix found it, failed as well, and kept it young."""
    network, model = llama
    loop = Loop(model, max_num_batched_tokens=8)
    loop.add("hit by it", PROMPTS["23 tokens"])
    loop.step()
    poison_blocks(loop.runner.kv_caches, [2])
    assert loop.run()["hit by it"].finish_reason == "error"
    loop.add("same prompt", PROMPTS["23 tokens"])
    got = loop.run()["same prompt"]
    assert got.num_cached_tokens == 0
    assert_is_full_forward(network, PROMPTS["23 tokens"], got)


def test_an_embedding_of_nan_is_an_error_and_no_vector(broken_token: tuple[Any, Any, int]):
    """NaN is no JSON number; the caller got a list of them and status 200."""
    _, model, token_id = broken_token
    loop = Loop(model)
    loop.add_pooling("bad", [*PROMPTS["3 tokens"], token_id])
    loop.add_pooling("good", PROMPTS["4 tokens"])
    got = loop.run()
    assert (got["bad"].finish_reason, got["bad"].pooled) == ("error", None)
    assert "NaN" in got["bad"].error
    assert got["good"].finish_reason == "stop" and len(got["good"].pooled) == model.hidden_size


def test_a_model_that_raises_leaves_the_states_as_they_were(llama: tuple[Any, Any], monkeypatch: pytest.MonkeyPatch):
    network, model = llama
    loop = Loop(model)
    loop.add("a", PROMPTS["7 tokens"])
    loop.step()
    with monkeypatch.context() as patch:
        patch.setattr(model, "forward", lambda *_: 1 / 0)
        step = loop.scheduler.schedule()
        with pytest.raises(ZeroDivisionError):
            loop.runner.execute_model(step)
        state = loop.runner.states["a"]
        assert (state.num_computed_tokens, state.num_tokens) == (7, 8)
        [output] = loop.scheduler.fail_step(step, "boom")
        loop.got["a"].finish_reason = output.finish_reason
    loop.add("b", PROMPTS["7 tokens"])
    got = loop.run()
    assert got["a"].finish_reason == "error"
    assert_is_full_forward(network, PROMPTS["7 tokens"], got["b"])


# ------------------------------------------------------------------ pooling
def pooled_by_hand(network: Any, token_ids: list[int], pooling_type: str) -> torch.Tensor:
    """[hidden_size], from one pass of transformers' network without its head."""
    rows = network.get_decoder()(torch.tensor([token_ids])).last_hidden_state[0].double()
    vector = {"CLS": rows[0], "LAST": rows[-1], "MEAN": rows.mean(0)}[pooling_type]
    return normalize(vector, dim=0)


@pytest.mark.parametrize("pooling_type", ["CLS", "LAST", "MEAN"])
@pytest.mark.parametrize("budget", BUDGETS)
def test_pooling_across_chunks_equals_pooling_of_one_pass(llama: tuple[Any, Any], pooling_type: str, budget: int):
    network, model = llama
    loop = Loop(model, max_num_batched_tokens=budget, runner={"pooling_type": pooling_type})
    for temperature in ("cold", "warm"):  # the second time LAST starts behind its prefix; the others need every row
        for name, token_ids in PROMPTS.items():
            loop.add_pooling(f"{name}, {temperature}", token_ids)
        got = loop.run()
        for name, token_ids in PROMPTS.items():
            pooled = torch.tensor(got[f"{name}, {temperature}"].pooled, dtype=torch.float64)
            assert (pooled - pooled_by_hand(network, token_ids, pooling_type)).abs().max() <= HF_HIDDEN_ATOL
            assert got[f"{name}, {temperature}"].finish_reason == "stop"


@pytest.mark.parametrize("pooling_type", ["CLS", "LAST", "MEAN"])
def test_a_chunk_of_a_pooling_request_gives_no_vector(llama: tuple[Any, Any], pooling_type: str):
    _, model = llama
    loop = Loop(model, max_num_batched_tokens=4, runner={"pooling_type": pooling_type})
    loop.add_pooling("r", PROMPTS["9 tokens"])
    given = []
    for _ in range(3):
        step = loop.scheduler.schedule()
        result = loop.runner.execute_model(step)
        given.append(list(result.pooler_output))
        loop.scheduler.update_from_output(step, result)
    assert given == [[], [], ["r"]]


@pytest.mark.parametrize("pooling_type", ["CLS", "LAST", "MEAN"])
def test_a_preempted_pooling_request_starts_again(llama: tuple[Any, Any], pooling_type: str):
    network, model = llama
    loop = Loop(model, num_blocks=TIGHT, long_prefill_token_threshold=2, runner={"pooling_type": pooling_type})
    loop.add("generates", prompt(3), max_tokens=30)
    loop.add_pooling("pools", prompt(36))  # two tokens a step: the other one's growth catches up with it
    preempted = []
    while loop.scheduler.has_work:
        preempted += loop.step().preempted_req_ids
    assert preempted == ["pools"]
    pooled = torch.tensor(loop.got["pools"].pooled, dtype=torch.float64)
    assert (pooled - pooled_by_hand(network, prompt(36), pooling_type)).abs().max() <= HF_HIDDEN_ATOL
    assert_is_full_forward(network, prompt(3), loop.got["generates"], num_tokens=30)


def test_an_encoder_needs_no_cache(monkeypatch: pytest.MonkeyPatch):
    network = tiny_hf(tiny_config("BertConfig"), hf_class="BertModel")
    model = ours_from(network)
    loop = Loop(
        model,
        enable_prefix_caching=False,
        enable_chunked_prefill=False,
        runner={"pooling_type": "CLS", "causal": False},
    )
    assert loop.runner.kv_caches == []
    for name, token_ids in PROMPTS.items():
        loop.add_pooling(name, token_ids)
    seen: list[bool] = []
    forward = model.forward
    monkeypatch.setattr(model, "forward", lambda *given: seen.append(given[3].causal) or forward(*given))
    results = loop.run()
    assert seen == [False]  # all in one step, and every token may see every other
    for name, got in results.items():
        rows = network(input_ids=torch.tensor([PROMPTS[name]])).last_hidden_state[0]
        pooled = torch.tensor(got.pooled)
        assert (pooled - normalize(rows[0], dim=0)).abs().max() <= HF_HIDDEN_ATOL
