"""LLM.hook and LLM.capture: transformers' values under transformers' names, request by request, and no side effects."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModel, AutoModelForCausalLM

from golden.tiny import DECODERS, EMBEDDERS, TINY
from minivllm import LLM, InvalidRequestError, SamplingParams, ServerError
from minivllm.worker.hooks import HookContext
from tests.tolerances import HF_ACTIVATION_RTOL

GREEDY = SamplingParams(temperature=0.0, max_tokens=5, ignore_eos=True)
PROMPTS: list[Any] = [{"prompt_token_ids": [3 + (7 * i + n) % 300 for i in range(n)]} for n in (1, 7, 17, 33)]
CROSSES_A_BLOCK = {"prompt_token_ids": list(range(5, 45))}

Values = dict[str, torch.Tensor]  # name of a point -> [num_tokens, ...]


def loaded(folder: Path, **options: Any) -> LLM:
    settings: dict[str, Any] = {"dtype": "float32", "kv_cache_memory_bytes": 16 << 20, **options}
    return LLM(model=str(folder), **settings)


@pytest.fixture
def llama(tiny_model: Callable[[str], Path]) -> Iterator[LLM]:
    yield loaded(tiny_model("llama"))


def answers(llm: LLM, prompts: list[Any] = PROMPTS) -> list[list[int]]:
    return [output.outputs[0].token_ids for output in llm.generate(prompts, GREEDY, use_tqdm=False)]


def logprobs_of(llm: LLM, prompts: list[Any]) -> list[Any]:
    params = SamplingParams(temperature=0.0, max_tokens=3, logprobs=5, ignore_eos=True)
    return [output.outputs[0].logprobs for output in llm.generate(prompts, params, use_tqdm=False)]


# ------------------------------------------------------------------ transformers' values
def values_of_transformers(network: Any, names: list[str], token_ids: list[int]) -> Values:
    """What transformers' modules are given (`.in`) and return, through hooks of torch, for one whole sequence."""
    found: Values = {}

    def keep(name: str, value: Any) -> None:
        tensor = value[0] if isinstance(value, tuple) else value
        rows = tensor[0] if tensor.ndim > 2 or tensor.shape[0] == 1 else tensor
        found[name] = rows.transpose(0, 1) if rows.ndim == 3 and rows.shape[0] != len(token_ids) else rows

    def watch(name: str) -> Any:
        module = network.get_submodule(name.removesuffix(".in"))
        if name.endswith(".in"):
            return module.register_forward_pre_hook(
                lambda _, args, kwargs: keep(name, args[0] if args else kwargs["hidden_states"]), with_kwargs=True
            )
        return module.register_forward_hook(lambda _, args, output: keep(name, output))

    handles = [watch(name) for name in names]
    with torch.no_grad():
        network(torch.tensor([token_ids]))
    for handle in handles:
        handle.remove()
    return found


def assert_same(name: str, ours: torch.Tensor, theirs: torch.Tensor) -> None:
    assert ours.shape == theirs.shape, name
    error = float((ours - theirs).abs().max() / theirs.abs().max().clamp(min=1.0))
    assert error <= HF_ACTIVATION_RTOL, (name, error)


@pytest.mark.parametrize("model", DECODERS)
def test_every_point_of_every_decoder_has_transformers_value_in_ragged_batches_and_chunks(
    model: str, tiny_model: Callable[[str], Path]
) -> None:
    folder = tiny_model(model)
    llm = loaded(folder, max_num_batched_tokens=16)  # prompts of 17 and 33 tokens come in chunks beside decodes
    names = [name for name in llm.hook_points() if ".experts.act_fn" not in name]  # a row per token and expert
    with llm.capture(*names) as captured:
        outputs = llm.generate(PROMPTS, GREEDY, use_tqdm=False)
    network = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    num_layers = TINY[model].config.get("num_hidden_layers") or TINY[model].config["n_layer"]
    assert sum(name.endswith(f".{num_layers - 1}") for name in names) == 1 and len(names) > 10 * num_layers
    for output in outputs:
        token_ids = output.prompt_token_ids + output.outputs[0].token_ids[:-1]
        expected = values_of_transformers(network, names, token_ids)
        for name in names:
            assert_same(name, captured.of(output, name), expected[name])
    steps = captured.steps(outputs[3], names[0])
    assert sum(len(step.context.positions) > 1 for step in steps) > 1, "the longest prompt was to come in chunks"


@pytest.mark.parametrize("model", EMBEDDERS)
def test_every_point_of_an_embedding_model_has_transformers_value(
    model: str, tiny_model: Callable[[str], Path]
) -> None:
    llm = loaded(tiny_model(model))
    names = llm.hook_points()
    with llm.capture(*names) as captured:
        outputs = llm.embed(PROMPTS, use_tqdm=False)
    network = AutoModel.from_pretrained(tiny_model(model), dtype=torch.float32)
    for output in outputs:
        expected = values_of_transformers(network, names, output.prompt_token_ids)
        for name in names:
            assert_same(name, captured.of(output, name), expected[name])


# ------------------------------------------------------------------ what a hook is told
def test_short_and_full_names_and_patterns_mean_the_same_points(llama: LLM) -> None:
    with llama.capture("layers.1.attn.out", "model.layers.1.self_attn", "layers.*.mlp.in") as captured:
        pass
    assert captured.point_names == [
        "model.layers.1.self_attn",
        "model.layers.1.self_attn",
        *(f"model.layers.{layer}.mlp.in" for layer in range(3)),
    ]


def test_the_context_says_whose_rows_these_are(llama: LLM) -> None:
    seen: list[HookContext] = []

    def look(values: torch.Tensor, context: HookContext) -> None:
        assert values.shape == (len(context.positions), 48)
        seen.append(context)

    params = SamplingParams(temperature=1.0, seed=1, max_tokens=3, n=2, ignore_eos=True)
    with llama.hook("embed", look):
        outputs = llama.generate(PROMPTS[1:3], params, use_tqdm=False)
    for index, output in enumerate(outputs):
        for candidate, answer in enumerate(output.outputs):
            own = [c for c in seen if (c.request_id, c.candidate) == (output.request_id, candidate)]
            assert {c.prompt_index for c in own} == {index}
            assert [token for c in own for token in c.token_ids] == output.prompt_token_ids + answer.token_ids[:-1]
            assert [p for c in own for p in c.positions] == list(range(len(output.prompt_token_ids) + 2))
            assert {c.num_prompt_tokens for c in own} == {len(output.prompt_token_ids)}
            assert [c.step for c in own] == sorted({c.step for c in own}) and all(c.block_ids for c in own)


def test_a_wrong_name_lists_the_near_ones_and_sets_nothing(llama: LLM) -> None:
    with pytest.raises(InvalidRequestError, match=r"'layers\.1\.atn'.*model\.layers\.1\.self_attn"):
        llama.capture("layers.1.mlp", "layers.1.atn")
    with pytest.raises(InvalidRequestError, match=r"model\.layers\.2"):
        llama.hook("layers.3", lambda values, context: None)
    assert not llama.llm_engine.hooks


def test_bad_arguments_are_refused(llama: LLM, tiny_model: Callable[[str], Path]) -> None:
    with pytest.raises(InvalidRequestError, match="fn must be a function"):
        llama.hook("layers.0", 3)  # type: ignore[arg-type]
    with pytest.raises(InvalidRequestError, match="at least one name"):
        llama.capture()
    drafting = loaded(tiny_model("llama"), speculative_config={"method": "ngram", "num_speculative_tokens": 2})
    with pytest.raises(InvalidRequestError, match="leave speculative_config out"):
        drafting.capture("layers.0")


def test_asking_for_what_was_not_captured_says_what_was(llama: LLM) -> None:
    with llama.capture("layers.0", "layers.1", prompts=[1]) as captured:
        outputs = llama.generate(PROMPTS[:2], GREEDY, use_tqdm=False)
    with pytest.raises(InvalidRequestError, match=r"one of what was captured: model\.layers\.0, model\.layers\.1"):
        captured.of(outputs[1])
    with pytest.raises(InvalidRequestError, match="one of what was captured"):
        captured.of(outputs[1], "layers.2")
    with pytest.raises(InvalidRequestError, match="Nothing was captured"):
        captured.of(outputs[0], "layers.0")
    assert captured.of(outputs[1].request_id, "layers.0").shape == (7 + 4, 48)


# ------------------------------------------------------------------ changing values
@pytest.mark.parametrize("model", ["llama", "gemma3", "gpt2"])
@pytest.mark.parametrize("name", ["layers.1", "layers.1.in", "layers.1.mlp", "layers.1.attn", "embed"])
def test_ablation_changes_the_requests_it_is_for_as_transformers_does_and_no_bit_of_the_others(
    model: str, name: str, tiny_model: Callable[[str], Path]
) -> None:
    llm = loaded(tiny_model(model), batch_invariant=True)  # whose bits do not depend on their neighbours
    point = llm.llm_engine.hooks.find(name)[0]
    before = logprobs_of(llm, PROMPTS)
    with llm.hook(name, lambda values, context: values * 0.5, prompts=[1, 3]):
        changed = logprobs_of(llm, PROMPTS)
    assert [a == b for a, b in zip(before, changed, strict=True)] == [True, False, True, False]
    assert logprobs_of(llm, PROMPTS) == before, "the hook is gone, and left nothing in the prefix cache"

    network = AutoModelForCausalLM.from_pretrained(tiny_model(model), dtype=torch.float32)
    target = network.get_submodule(point.name.removesuffix(".in"))
    if point.name.endswith(".in"):
        target.register_forward_pre_hook(lambda _, args: (args[0] * 0.5, *args[1:]))
    else:
        target.register_forward_hook(
            lambda _, args, out: (out[0] * 0.5, *out[1:]) if isinstance(out, tuple) else out * 0.5
        )
    for index in (1, 3):
        with torch.no_grad():
            logits = network(torch.tensor([PROMPTS[index]["prompt_token_ids"]])).logits[0, -1]
        expected = torch.log_softmax(logits, -1)
        for token_id, logprob in changed[index][0].items():
            assert_same(name, torch.tensor(logprob.logprob), expected[token_id])


@pytest.mark.parametrize("shard", ["self_attn.q_proj", "self_attn.v_proj", "mlp.gate_proj", "mlp.up_proj"])
def test_one_of_several_outputs_of_one_product_is_changed_alone(llama: LLM, shard: str) -> None:
    sibling = {"q": "self_attn.k_proj", "v": "self_attn.k_proj", "g": "mlp.up_proj", "u": "mlp.gate_proj"}
    other = sibling[shard.split(".")[1][0]]
    with llama.capture(f"layers.0.{other}") as before:
        plain = llama.generate(PROMPTS, GREEDY, use_tqdm=False)
    with (
        llama.hook(f"layers.0.{shard}", lambda values, context: torch.zeros_like(values)),
        llama.capture(f"layers.0.{shard}", f"layers.0.{other}", "layers.0") as after,
    ):
        zeroed = llama.generate(PROMPTS, GREEDY, use_tqdm=False)
    for a, b in zip(plain, zeroed, strict=True):
        length = len(a.prompt_token_ids)
        assert not after.of(b, f"layers.0.{shard}").any()
        assert torch.equal(before.of(a)[:length], after.of(b, f"layers.0.{other}")[:length])


def test_fn_gets_a_copy_and_only_what_it_returns_counts(llama: LLM) -> None:
    before = answers(llama)

    def scribble(values: torch.Tensor, context: HookContext) -> None:
        values.zero_()

    with llama.hook("layers.*.mlp", scribble), llama.hook("layers.*", scribble), llama.hook("embed", scribble):
        assert answers(llama) == before


def test_hooks_of_one_point_see_what_those_before_them_returned(llama: LLM) -> None:
    seen: list[float] = []
    with (
        llama.hook("layers.0.mlp", lambda values, context: torch.full_like(values, 2.0)),
        llama.hook("layers.0.mlp", lambda values, context: values + 1.0),
        llama.hook("layers.0.mlp.out", lambda values, context: seen.append(float(values.mean()))),
    ):
        answers(llama, PROMPTS[:1])
    assert set(seen) == {3.0}


def test_each_of_two_hooks_sees_its_own_requests_of_one_batch(llama: LLM) -> None:
    seen: list[tuple[str, int]] = []
    with (
        llama.hook("layers.0", lambda values, context: seen.append(("first", context.prompt_index)), prompts=[0, 2]),
        llama.hook("layers.0", lambda values, context: seen.append(("second", context.prompt_index)), prompts=[2, 3]),
    ):
        answers(llama)
    assert set(seen) == {("first", 0), ("first", 2), ("second", 2), ("second", 3)}


# ------------------------------------------------------------------ the prefix cache, preemption, streams
def test_a_captured_request_computes_every_position_although_its_prefix_is_cached(llama: LLM) -> None:
    plain = llama.generate(CROSSES_A_BLOCK, GREEDY, use_tqdm=False)[0]
    assert llama.generate(CROSSES_A_BLOCK, GREEDY, use_tqdm=False)[0].num_cached_tokens == 32
    with llama.capture("layers.0") as captured:
        output = llama.generate(CROSSES_A_BLOCK, GREEDY, use_tqdm=False)[0]
    assert output.num_cached_tokens == 0 and captured.of(output).shape == (44, 48)
    assert output.outputs[0].token_ids == plain.outputs[0].token_ids
    assert llama.generate(CROSSES_A_BLOCK, GREEDY, use_tqdm=False)[0].num_cached_tokens == 32


def test_changed_keys_and_values_are_found_by_nobody(llama: LLM) -> None:
    with llama.hook("layers.0", lambda values, context: -values):
        steered = answers(llama, [CROSSES_A_BLOCK])
        again = llama.generate(CROSSES_A_BLOCK, GREEDY, use_tqdm=False)[0]
    assert again.num_cached_tokens == 0 and [again.outputs[0].token_ids] == steered
    after = llama.generate(CROSSES_A_BLOCK, GREEDY, use_tqdm=False)[0]
    assert after.num_cached_tokens == 0 and [after.outputs[0].token_ids] != steered


def test_a_request_with_the_id_of_an_earlier_one_finds_none_of_its_blocks(llama: LLM) -> None:
    engine = llama.llm_engine
    with llama.capture("layers.0") as captured:
        for _ in range(2):
            engine.add_request(CROSSES_A_BLOCK, GREEDY, request_id="same")
            while engine.has_unfinished_requests():
                engine.step()
    assert [p for record in captured.records for p in record.context.positions] == [*range(44), *range(44)]


def test_a_preempted_request_is_captured_whole(tiny_model: Callable[[str], Path]) -> None:
    prompts = [{"prompt_token_ids": list(range(start, start + 30))} for start in (3, 50, 100)]
    params = SamplingParams(temperature=0.0, max_tokens=40, ignore_eos=True)
    roomy, tight = (loaded(tiny_model("llama"), num_gpu_blocks_override=blocks) for blocks in (40, 11))
    captures = []
    for llm in (roomy, tight):
        with llm.capture("norm") as captured:
            outputs = llm.generate(prompts, params, use_tqdm=False)
        captures.append([(output.outputs[0].token_ids, captured.of(output)) for output in outputs])
        num_rows = sum(len(record.values) for record in captured.records)
        assert (num_rows > 3 * 69) == (llm is tight), "only the small cache was to preempt"
    for (ids, values), (tight_ids, tight_values) in zip(*captures, strict=True):
        assert ids == tight_ids and values.shape == (69, 48)
        assert_same("norm", tight_values, values)


def test_a_request_has_the_hooks_that_were_set_when_it_began(llama: LLM) -> None:
    calls: list[str] = []
    stream = llama.stream(PROMPTS[1], GREEDY)
    next(stream)
    hook = llama.hook("layers.0", lambda values, context: calls.append(context.request_id))
    next(stream)
    assert calls == []
    other = llama.stream(PROMPTS[2], GREEDY)
    request_id = next(other).request_id
    hook.remove()
    hook.remove()
    assert [list(stream)[-1].finished, list(other)[-1].finished] == [True, True]
    assert calls == [request_id]


# ------------------------------------------------------------------ errors and costs
@pytest.mark.parametrize(
    ("fn", "message"),
    [
        (lambda values, context: 1 / 0, r"ZeroDivisionError: division by zero \(.*test_llm_hooks\.py:\d+\)"),
        (lambda values, context: values[:, :3], "must return the shape"),
        (lambda values, context: "text", "a tensor or None, got str"),
        (lambda values, context: values * float("nan"), "NaN"),
    ],
)
def test_an_error_in_fn_ends_its_request_and_no_other(llama: LLM, fn: Any, message: str) -> None:
    expected = answers(llama)
    engine = llama.llm_engine
    with llama.hook("layers.1.mlp", fn, prompts=[2]):
        requests = [engine.process_input(prompt, GREEDY) for prompt in PROMPTS]
        for index, request in enumerate(requests):
            request.prompt_index = index
            engine.add_processed(request)
        finished: dict[str, Any] = {}
        while engine.has_unfinished_requests():
            finished |= {output.request_id: output for output in engine.step() if output.finished}
        outputs = [finished[request.request_id] for request in requests]
        with pytest.raises(ServerError, match=message):
            llama.generate(PROMPTS, GREEDY, use_tqdm=False)
    assert [output.error is None for output in outputs] == [True, True, False, True]
    for index in (0, 1, 3):
        assert outputs[index].outputs[0].token_ids == expected[index]
    engine.scheduler.check_integrity()
    assert answers(llama) == expected


def test_fn_is_not_called_again_for_a_request_that_it_failed(llama: LLM) -> None:
    calls: list[str] = []

    def fail(values: torch.Tensor, context: HookContext) -> None:
        calls.append(context.name)
        raise RuntimeError("once")

    with llama.hook("layers.*", fail), pytest.raises(ServerError, match="once"):
        llama.generate(PROMPTS[1], GREEDY, use_tqdm=False)
    assert calls == ["model.layers.0"]


def test_a_module_that_has_no_row_per_token_is_named(tiny_model: Callable[[str], Path]) -> None:
    llm = loaded(tiny_model("mixtral"))
    with (
        llm.capture("layers.0.mlp.experts.act_fn"),
        pytest.raises(ServerError, match="no row for each of the 7 tokens"),
    ):
        llm.generate(PROMPTS[1], GREEDY, use_tqdm=False)


def test_without_hooks_no_module_has_one_and_nothing_is_remembered(llama: LLM) -> None:
    def torch_hooks() -> int:
        modules = llama.llm_engine._executor.model.modules()
        return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in modules)

    assert torch_hooks() == 0 and not llama.llm_engine.hooks
    with llama.capture("layers.*.mlp"):
        answers(llama)
        assert torch_hooks() == 3 and llama.llm_engine.hooks
        assert not llama.llm_engine.hooks._attached, "ended requests are forgotten"
    assert torch_hooks() == 0 and not llama.llm_engine.hooks and not llama.llm_engine.hooks._attached
