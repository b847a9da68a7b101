"""Many callers, one engine thread: nobody's tokens mix, a gone caller leaves nothing behind, a dead engine says so."""

import threading
import time

import pytest

from minivllm import LLM, AsyncEngine, ClientError, EngineDeadError, OverloadedError, SamplingParams

GREEDY = SamplingParams(temperature=0, max_tokens=12, ignore_eos=True)


@pytest.fixture(scope="module")
def llm(tiny_model) -> LLM:
    return LLM(tiny_model("llama"), dtype="float32", num_gpu_blocks_override=64, max_num_seqs=4)


def wait_until(condition, seconds: float = 10.0) -> bool:
    deadline = time.monotonic() + seconds
    while not condition() and time.monotonic() < deadline:
        time.sleep(0.005)
    return condition()


def num_free(llm: LLM) -> int:
    return llm.llm_engine.scheduler.kv_cache.pool.num_free_blocks


def test_sixteen_threads_each_get_their_own_answer(llm: LLM):
    prompts = [{"prompt_token_ids": [5 + i, 7, 9 + i]} for i in range(16)]
    expected = [output.outputs[0].token_ids for output in llm.generate(prompts, GREEDY, use_tqdm=False)]
    answers: dict[int, list[int]] = {}
    with AsyncEngine(llm.llm_engine) as engine:

        def ask(index: int) -> None:
            for output in engine.submit(prompts[index], GREEDY):
                answers[index] = output.outputs[0].token_ids

        threads = [threading.Thread(target=ask, args=(index,)) for index in range(16)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert [answers[index] for index in range(16)] == expected
        assert engine.num_unfinished_requests == 0


def test_a_closed_stream_frees_its_blocks(llm: LLM):
    free = num_free(llm)
    with AsyncEngine(llm.llm_engine) as engine:
        with engine.submit("the", SamplingParams(temperature=0, max_tokens=100, ignore_eos=True)) as stream:
            assert stream.next(timeout_seconds=10) is not None
        assert wait_until(lambda: num_free(llm) == free)


def test_a_bad_request_is_refused_in_the_callers_thread(llm: LLM):
    with AsyncEngine(llm.llm_engine) as engine:
        with pytest.raises(ClientError):
            engine.submit("", GREEDY)
        assert [output.finished for output in engine.submit("the", GREEDY)][-1]


def test_a_full_queue_is_refused(llm: LLM):
    with AsyncEngine(llm.llm_engine, max_queue=0) as engine:
        slow = SamplingParams(temperature=0, max_tokens=110, ignore_eos=True)
        streams = [engine.submit("the", slow) for _ in range(4)]
        with pytest.raises(OverloadedError) as caught:
            engine.submit("the", slow)
        assert caught.value.status == 429 and caught.value.retry_after_seconds >= 1
        for stream in streams:
            stream.close()
        assert wait_until(lambda: engine.num_unfinished_requests == 0)


def test_a_dead_engine_fails_every_stream_and_every_later_request(tiny_model, monkeypatch: pytest.MonkeyPatch):
    llm = LLM(tiny_model("llama"), dtype="float32", num_gpu_blocks_override=64)
    monkeypatch.setattr(threading, "excepthook", lambda args: None)  # the thread's own report
    engine = AsyncEngine(llm.llm_engine)
    monkeypatch.setattr(llm.llm_engine, "step", lambda: 1 / 0)
    stream = engine.submit("the", GREEDY)
    with pytest.raises(EngineDeadError, match="ZeroDivisionError"):
        list(stream)
    assert wait_until(lambda: not engine.is_alive)
    with pytest.raises(EngineDeadError):
        engine.submit("the", GREEDY)


def test_shutdown_ends_open_streams(llm: LLM):
    engine = AsyncEngine(llm.llm_engine)
    stream = engine.submit("the", SamplingParams(temperature=0, max_tokens=110, ignore_eos=True))
    engine.shutdown()
    with pytest.raises(EngineDeadError):
        list(stream)
    assert not llm.llm_engine.has_unfinished_requests()
    llm.llm_engine.scheduler.check_integrity()
