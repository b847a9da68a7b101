"""A model cut into parts: every weight is somewhere, every family computes the same, and what it costs is counted."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from minivllm.errors import ConfigError
from minivllm.hub import ModelSource
from minivllm.models import loader
from minivllm.models.layers import ModelOptions
from minivllm.models.parallel import Collectives, TensorParallel, bytes_per_token
from minivllm.models.registry import model_class
from minivllm.worker.rank_process import part_of
from tests.models.checkpoints import hf_weights, write_gguf_model
from tests.models.paged import PagedRun
from tests.models.test_decoders import CASES, PROMPTS
from tests.models.tiny import FP32, ours_from, tiny_config, tiny_hf, weights_of
from tests.tolerances import PARALLEL_RTOL
from tests.worker.rank_threads import on_ranks

NOBODY: Any = None  # collectives of a rank that does not compute


def numbers(num_heads: int, num_kv_heads: int, width: int = 1536, vocab_size: int = 1000, head_dim: int = 64) -> Any:
    """The part of a configuration that is cut."""
    return SimpleNamespace(
        num_attention_heads=num_heads,
        num_key_value_heads=num_kv_heads,
        intermediate_size=width,
        vocab_size=vocab_size,
        head_dim=head_dim,
        hidden_size=576,
        num_hidden_layers=30,
    )


def parts_of(config: Any, size: int) -> list[TensorParallel]:
    return [TensorParallel.of(config, rank, size, NOBODY) for rank in range(size)]


def part_of_model(network: Any, parallel: TensorParallel) -> Any:
    """One rank's network of the same architecture, with its part of the weights."""
    model = model_class(network.config)(parallel.narrow(network.config), ModelOptions(torch.float32, parallel=parallel))
    weights = {name: tensor[parallel.part_of(name) or ...] for name, tensor in weights_of(network).items()}
    model.load_weights(weights.items())
    return model.eval()


# ------------------------------------------------------------------ the cut
@pytest.mark.parametrize("size", [1, 2, 3, 5])
@pytest.mark.parametrize("heads", [(9, 3), (14, 2), (5, 1), (6, 6), (32, 8)], ids=str)
def test_every_number_belongs_to_one_rank(heads: tuple[int, int], size: int):
    config = numbers(*heads)
    parts = parts_of(config, size)
    for what, total in (("queries", heads[0] * 64), ("mlp", 1536), ("vocab", 1000)):
        found = [number for part in parts for number in getattr(part, what)]
        assert found == list(range(total)) and all(getattr(part, what) for part in parts)
    assert {number for part in parts for number in part.keys} == set(range(heads[1] * 64))
    group = heads[0] // heads[1]
    for part in parts:  # each query head beside its own key/value head, as many for each
        queries, kv_heads = part.heads[part.rank], part.kv_heads[part.rank]
        assert len(queries) % len(kv_heads) == 0
        assert {head // group for head in queries} == set(kv_heads)


def test_key_value_heads_stay_whole_and_the_mlp_is_even_all_the_same():
    first, second = parts_of(numbers(9, 3), 2)  # SmolLM2-135M
    assert (first.heads, first.kv_heads) == ((range(3), range(3, 9)), (range(1), range(1, 3)))
    assert (first.mlp, second.mlp) == (range(768), range(768, 1536))
    assert [part.mlp for part in parts_of(numbers(9, 3, 1600), 3)] == [range(512), range(512, 1024), range(1024, 1600)]
    assert [part.mlp for part in parts_of(numbers(8, 2), 2)] == [range(768), range(768, 1536)]


def test_a_head_over_the_cut_is_kept_by_both_ranks_where_they_may_share():
    first, second = (TensorParallel.of(numbers(9, 3), rank, 2, NOBODY, share_heads=True) for rank in range(2))
    assert first.kv_heads == second.kv_heads == (range(2), range(1, 3))
    assert (first.queries, second.queries) == (range(6 * 64), range(3 * 64, 9 * 64))
    assert (first.head_shares, second.head_shares) == (((0, 1), (0, 0.5)), ((0.5, 1), (0, 1)))
    assert (first.mlp, first.vocab) == (range(768), range(500))
    for config, size in ((numbers(8, 4), 2), (numbers(9, 3), 3), (numbers(8, 2), 4)):  # nothing lies over a cut
        for rank in range(size):
            shared = TensorParallel.of(config, rank, size, NOBODY, share_heads=True)
            assert shared == TensorParallel.of(config, rank, size, NOBODY) and shared.head_shares is None


@pytest.mark.parametrize("options", [FP32, replace(FP32, batch_invariant=True)], ids=["usual", "batch_invariant"])
def test_ranks_on_a_cpu_share_heads_but_for_batch_invariance(options: ModelOptions):
    ranks: Any = SimpleNamespace(rank=0, size=2, collectives=NOBODY)
    assert (part_of(ranks, numbers(9, 3), options).head_shares is None) == options.batch_invariant
    assert part_of(ranks, numbers(9, 3), replace(options, device=torch.device("cuda"))).head_shares is None


def test_more_ranks_than_key_value_heads_have_copies_of_them():
    parts = parts_of(numbers(8, 2), 4)
    assert parts[0].kv_heads == (range(1), range(1), range(1, 2), range(1, 2))
    assert parts[0].heads == (range(2), range(2, 4), range(4, 6), range(6, 8))


def test_a_model_with_too_few_heads_is_refused_with_the_number():
    assert len(parts_of(numbers(9, 3), 9)) == 9
    with pytest.raises(ConfigError, match="at most 9 for this model, got 10: it has 9 attention heads") as caught:
        parts_of(numbers(9, 3), 10)
    assert caught.value.parameter == "tensor_parallel_size"
    with pytest.raises(ConfigError, match="at most 3 for this model, got 4: it has 3 columns of the MLP"):
        parts_of(numbers(9, 3, width=3), 4)


def test_names_that_are_not_cut_are_whole():
    (_, part) = parts_of(numbers(8, 2), 2)
    for name in ("model.norm.weight", "model.layers.0.self_attn.q_norm.weight", "model.layers.0.self_attn.o_proj.bias"):
        assert part.part_of(name) is None
    assert part.part_of("model.layers.0.self_attn.q_proj.bias") == (slice(256, 512),)
    assert part.part_of("model.layers.0.mlp.down_proj.weight") == (slice(None), slice(768, 1536))
    assert part.part_of("embed_tokens.weight") == (slice(500, 1000),)


# ------------------------------------------------------------------ the same results
@pytest.mark.parametrize("size", [2, 3, "2, sharing a head"])
@pytest.mark.parametrize("name", CASES)
def test_every_family_gives_the_logits_of_one_rank(name: str, size: int | str):
    config_class, changes = CASES[name]
    share_heads = isinstance(size, str)
    if isinstance(size, str):
        size, changes = 2, {**changes, "num_key_value_heads": 3}
    network = tiny_hf(tiny_config(config_class, **changes))
    run = PagedRun(ours_from(network))
    decode = {prompt: [ids[-1]] for prompt, ids in PROMPTS.items()}
    expected = [run.logits(PROMPTS), run.logits(decode)]

    def compute(rank: int, collectives: Collectives) -> list[dict[str, torch.Tensor]]:
        parallel = TensorParallel.of(network.config, rank, size, collectives, share_heads=share_heads)
        assert (parallel.head_shares is not None) == share_heads
        run = PagedRun(part_of_model(network, parallel))
        return [run.logits(PROMPTS), run.logits(decode)]

    first, *_ = on_ranks(size, compute)
    for found, wanted in zip(first, expected, strict=True):
        for prompt, logits in wanted.items():
            assert found[prompt].shape == logits.shape
            assert (found[prompt] - logits).abs().max() <= PARALLEL_RTOL * logits.abs().max()


def test_a_model_without_a_head_gives_the_same_hidden_states_on_every_rank():
    network = tiny_hf(tiny_config("Qwen3Config", head_dim=16), "Qwen3Model")
    expected = PagedRun(ours_from(network)).step(PROMPTS)

    def compute(rank: int, collectives: Collectives) -> dict[str, torch.Tensor]:
        return PagedRun(part_of_model(network, TensorParallel.of(network.config, rank, 2, collectives))).step(PROMPTS)

    for found in on_ranks(2, compute):
        for prompt, states in expected.items():
            assert (found[prompt] - states).abs().max() <= PARALLEL_RTOL * states.abs().max()


def test_one_rank_has_the_plain_classes():
    model = ours_from(tiny_hf(tiny_config("LlamaConfig")))
    assert {type(module).__name__ for module in model.modules() if "Parallel" in type(module).__name__} == set()


# ------------------------------------------------------------------ loading
def test_a_rank_reads_only_its_part_of_a_safetensors_file(tiny_model: Any, monkeypatch: pytest.MonkeyPatch):
    folder: Path = tiny_model("qwen3")
    source = ModelSource("folder", folder, "tiny")
    config = loader.load_hf_config(source)
    whole = dict(loader.iterate_weights(source, config))
    read_whole: list[str] = []
    real = loader.safe_open

    class Watched:
        def __init__(self, *arguments: Any, **options: Any):
            self.file = real(*arguments, **options)

        def __enter__(self) -> Any:
            opened = self.file.__enter__()
            read = opened.get_tensor
            return SimpleNamespace(
                get_slice=opened.get_slice, get_tensor=lambda name: read_whole.append(name) or read(name)
            )

        def __exit__(self, *arguments: Any) -> None:
            self.file.__exit__(*arguments)

    monkeypatch.setattr(loader, "safe_open", Watched)
    for part in parts_of(config, 2):
        for name, tensor in loader.iterate_weights(source, config, parallel=part):
            assert torch.equal(tensor, whole[name][part.part_of(name) or ...])
    assert read_whole and all("norm" in name for name in read_whole)


@pytest.mark.parametrize("architecture", ["llama", "gemma3"])
def test_a_rank_has_its_part_of_a_gguf_file(architecture: str, tmp_path: Path):
    path = write_gguf_model(tmp_path / "m.gguf", architecture, hf_weights(architecture))
    source = ModelSource("gguf", path, "tiny")
    config = loader.load_hf_config(source)
    whole = dict(loader.iterate_weights(source, config))
    for part in parts_of(config, 2):
        for name, tensor in loader.iterate_weights(source, config, parallel=part):
            assert torch.equal(tensor, whole[name][part.part_of(name) or ...])


# ------------------------------------------------------------------ what it costs
class Counting:
    """Counts what passes."""

    def __init__(self, collectives: Collectives):
        self.collectives = collectives
        self.meeting = None
        self.sum_bytes = self.num_sums = self.logit_bytes = 0

    def all_reduce(self, part: torch.Tensor) -> torch.Tensor:
        self.sum_bytes += part.nbytes
        self.num_sums += 1
        return self.collectives.all_reduce(part)

    def gather(self, part: torch.Tensor, widths: Sequence[int]) -> torch.Tensor:
        self.logit_bytes += part.nbytes
        return self.collectives.gather(part, widths)


@pytest.mark.parametrize("size", [2, 3])
@pytest.mark.parametrize("tied", [False, True])
def test_the_bytes_of_a_token_are_those_of_the_formula(size: int, tied: bool):
    network = tiny_hf(tiny_config("LlamaConfig", tie_word_embeddings=tied))
    num_tokens = len(PROMPTS["odd"])

    def compute(rank: int, collectives: Collectives) -> Counting:
        counting = Counting(collectives)
        run = PagedRun(part_of_model(network, TensorParallel.of(network.config, rank, size, counting)))
        run.logits({"odd": PROMPTS["odd"]})
        return counting

    counted = on_ranks(size, compute)
    sums, logits = bytes_per_token(network.config, size, FP32.dtype.itemsize)
    assert sums == (2 * 3 + 1) * 48 * 4  # two in each of three layers, one behind the embedding
    assert [found.sum_bytes for found in counted] == [num_tokens * sums] * size
    assert [found.num_sums for found in counted] == [7] * size
    assert sum(found.logit_bytes for found in counted[1:]) == num_tokens * logits
