"""Ten thousand requests leave nothing behind: blocks, bookkeeping and memory are where they were."""

import gc
import os
import random

from minivllm import LLM, SamplingParams

NUM_REQUESTS = 10_000
WARM_UP = 2_000  # caches that are filled once: token texts, allocator arenas
MAX_GROWTH_BYTES = 16 * 2**20


def resident_bytes() -> int:
    gc.collect()
    with open("/proc/self/statm") as statm:
        return int(statm.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def test_ten_thousand_requests_leave_memory_and_blocks_at_baseline(tiny_model):
    llm = LLM(tiny_model("llama"), dtype="float32", num_gpu_blocks_override=200)
    engine, rng = llm.llm_engine, random.Random(0)
    pool = engine.scheduler.kv_cache.pool
    num_done, baseline = 0, 0
    while num_done < NUM_REQUESTS:
        while engine.output_processor.num_requests < 64:
            prompt = [rng.randrange(2, 320) for _ in range(rng.randint(1, 20))]
            params = SamplingParams(max_tokens=rng.randint(1, 3), temperature=rng.choice([0.0, 1.0]), ignore_eos=True)
            request_id = engine.add_request({"prompt_token_ids": prompt}, params)
            if rng.random() < 0.1:
                engine.abort_request(request_id)
                num_done += 1
        num_done += sum(output.finished for output in engine.step())
        if not baseline and num_done >= WARM_UP:
            baseline = resident_bytes()
    while engine.has_unfinished_requests():
        engine.step()
    engine.step()
    growth = resident_bytes() - baseline
    assert growth < MAX_GROWTH_BYTES, f"{growth / 2**20:.1f} MiB more after {NUM_REQUESTS} requests"
    assert pool.num_free_blocks == pool.num_blocks - 1
    engine.scheduler.check_integrity()
    assert not engine._executor._runner.states and not engine.scheduler.requests
