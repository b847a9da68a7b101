"""How many blocks there are, and that the plan says what is reserved."""

import pytest
import torch

from minivllm.config import CacheConfig
from minivllm.errors import ConfigError
from minivllm.models.layers import KVCacheSpec
from minivllm.worker.kv_cache import (
    allocate_kv_caches,
    device_memory_bytes,
    kv_bytes_per_token,
    plan_kv_cache,
    poison_blocks,
)

SMOLLM2 = [KVCacheSpec(3, 64)] * 30


def test_bytes_per_token_of_the_default_model_is_the_published_number():
    assert kv_bytes_per_token(SMOLLM2, torch.bfloat16) == 23_040  # 2 x 30 x 3 x 64 x 2 bytes


def test_a_byte_budget_is_cut_into_whole_blocks():
    plan = plan_kv_cache(CacheConfig(kv_cache_memory_bytes=1_000_000), SMOLLM2, torch.bfloat16, 0, 1000)
    assert plan.num_blocks == 1_000_000 // (16 * 23_040)
    assert plan.num_tokens == (plan.num_blocks - 1) * 16
    assert plan.pool_bytes <= 1_000_000


def test_the_share_of_memory_includes_the_weights():
    config = CacheConfig(gpu_memory_utilization=0.25)
    without = plan_kv_cache(config, SMOLLM2, torch.float32, 0, 1000)
    heavy = plan_kv_cache(config, SMOLLM2, torch.float32, 500_000_000, 1000)
    assert without.pool_budget_bytes - heavy.pool_budget_bytes == 500_000_000


def test_no_room_is_refused_with_the_arithmetic():
    with pytest.raises(ConfigError, match="1,000 bytes, two blocks need 737,280") as caught:
        plan_kv_cache(CacheConfig(kv_cache_memory_bytes=1000), SMOLLM2, torch.bfloat16, 0, 1000)
    assert caught.value.parameter == "kv_cache_memory_bytes"


def test_the_pool_reserves_what_the_plan_says():
    plan = plan_kv_cache(CacheConfig(num_gpu_blocks_override=5), SMOLLM2, torch.float32, 0, 1000)
    caches = allocate_kv_caches(SMOLLM2, plan.num_blocks, plan.block_size, torch.float32)
    assert sum(k.nbytes + v.nbytes for k, v in caches) == plan.pool_bytes


def test_poison_reaches_the_named_blocks_only():
    caches = allocate_kv_caches([KVCacheSpec(2, 8)], 4, 4, torch.float32)
    for pair in caches:
        for cache in pair:
            cache.zero_()
    poison_blocks(caches, [1, 3])
    assert caches[0][0].isnan().flatten(2).any(-1).tolist() == [[False, True, False, True]] * 2


def test_a_containers_limit_counts_where_it_has_one(tmp_path):
    limit, none, missing = tmp_path / "memory.max", tmp_path / "none", tmp_path / "missing"
    limit.write_text("1048576\n")
    none.write_text("max\n")
    machine = device_memory_bytes(())
    assert device_memory_bytes((none, missing)) == machine > 1048576
    assert device_memory_bytes((none, limit, missing)) == 1048576
    limit.write_text(f"{2**63 - 4096}\n")  # no limit, as version 1 says it
    assert device_memory_bytes((limit,)) == machine
