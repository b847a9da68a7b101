"""benchmarks/compare.py without a peer: an engine in its process, rounds, ratios, limits, and the picture's numbers."""

from __future__ import annotations

import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import typer

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"

# Writes n tokens for n asked, and is as odd as its options say.
FAKE = """
import sys, time
sys.path.insert(0, {engines!r})
from protocol import serve

class Fake:
    def __init__(self, setup):
        self.options = setup.options
        if "broken" in setup.options:
            raise ValueError("no such option: broken")
        self.info = {{"version": "0", "dtype": setup.dtype, "prepare_seconds": 0.25}}

    def generate(self, requests, json_schema):
        print("noise of a library")
        if json_schema is not None:
            raise NotImplementedError("no schemas here")
        time.sleep(self.options.get("sleep", 0))
        return [[7] * (n - self.options.get("short", 0)) for _, n in requests]

serve(Fake)
"""


@pytest.fixture
def compare(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import compare

    return compare


@pytest.fixture
def make_engine(compare: ModuleType, tmp_path: Path):
    adapter = tmp_path / "fake.py"
    adapter.write_text(FAKE.format(engines=str(BENCHMARKS / "engines")))
    made = []

    def make(name: str, **options: Any):
        log_file = tmp_path / f"{name}.log"
        made.append(compare.Engine(name, "float32", Path(sys.executable), str(adapter), log_file, 60, options))
        return made[-1]

    yield make
    for engine in made:
        engine.stop()


def test_engines_take_turns_and_a_bad_one_is_out(compare, make_engine, tmp_path):
    fine, short, broken = make_engine("fine"), make_engine("short", short=1), make_engine("broken", broken=True)
    failed = compare.start_all([fine, short, broken], tmp_path, None, 1)
    assert failed == {
        "broken": f"ended, see {broken.log_file}: ValueError: no such option: broken",
        "short": "wrong number of output tokens: [7, 7, 7, 7]",
    }
    rounds = [{name: compare.batches_of_round(name, index) for name in ("single", "json")} for index in (0, 1)]
    failed = compare.run_rounds([fine], rounds)
    assert failed == {"fine, json": "no schemas here"}
    assert [len(batches) for batches in fine.seconds["single"]] == [1, 1]
    assert list(fine.seconds) == ["single"]


def test_a_name_is_engine_dtype_and_variants(compare, tmp_path):
    found, missing = compare.find_engines(["ours:float32+int4+compile", "ours", "vllm"], tmp_path, "bfloat16", 1)
    assert [(engine.base, engine.dtype, engine.options) for engine in found] == [
        ("ours", "float32", {"quantization": "int4", "compile": True}),
        ("ours", "bfloat16", {}),
    ]
    assert list(missing) == ["vllm"]
    for name in ("sglang", "ours+warp"):
        with pytest.raises(typer.BadParameter, match=r"unknown (engine 'sglang'|variant 'warp')"):
            compare.find_engines([name], tmp_path, "bfloat16", 1)


@pytest.fixture
def measured(compare, make_engine):
    """Ours and a peer with three rounds of `single` and `shared_prefix`, without a process."""
    ours, peer = make_engine("ours"), make_engine("peer:float32")
    for engine, factor in ((ours, 1), (peer, 2)):
        engine.info, engine.load_seconds = {"dtype": "float32"}, 3.0
        engine.seconds = {
            "single": [[1.0 * factor], [2.0 * factor], [4.0 * factor]],
            "shared_prefix": [[10.0, 1.0 * factor], [10.0, 1.0 * factor], [20.0, 1.0 * factor]],
        }
    limit = {"read_gb_per_s": 1.0, "gemm_float32_gflop_per_s": 100.0}
    batches = {name: compare.batches_of_round(name, 0) for name in ours.seconds}
    size = compare.ModelSize(num_parameters=1_000_000, num_head_parameters=0)
    pairs = [(engine, name) for name in batches for engine in (ours, peer)]
    return batches, [compare.summarise(engine, name, batches[name], [ours], size, limit) for engine, name in pairs]


def test_rows_have_rates_ratios_and_the_share_of_the_limit(measured):
    _, (ours, peer, _, peer_prefix) = measured
    assert (peer["median_seconds"], peer["min_seconds"], peer["max_seconds"]) == (4.0, 2.0, 8.0)
    assert (ours["tokens_per_second"], peer["tokens_per_second"]) == (64.0, 32.0)
    assert (ours["times_faster"], peer["times_faster"]) == ({}, {"ours": {"median": 2.0, "min": 2.0, "max": 2.0}})
    # 128 steps read 4 MB of weights each at 1 GB/s; the multiplications would take a hundredth of that.
    assert round(peer["share_of_limit"], 6) == round(128 * 0.004 / 4.0, 6)
    assert peer_prefix["ratio_to_first"] == {"median": 0.2, "min": 0.1, "max": 0.2}
    assert peer_prefix["share_of_limit"] is None


def test_a_bar_has_the_range_of_its_rounds_and_the_limit_of_its_weights(compare, measured):
    from chart import TITLES, rate_bar, ratio_bar

    _, (ours, peer, _, peer_prefix) = measured
    bar = rate_bar(peer)
    assert (bar["value"], bar["low"], bar["high"]) == (32.0, 16.0, 64.0)
    assert (bar["texts"], rate_bar(ours)["texts"]) == (("32", "2.00 x"), ("64", ""))
    assert round(bar["limit"]) == 250  # 4 MB at 1 GB/s
    assert ratio_bar(peer_prefix)["texts"] == ("20.0%", "2")
    assert (ratio_bar(peer_prefix)["low"], ratio_bar(peer_prefix)["high"]) == (0.1, 0.2)
    assert set(TITLES) == set(compare.NAMES)


@pytest.mark.parametrize("options", [{"speculative_config": {"method": "ngram"}}, {"quantization": "int4+bf16"}])
def test_no_limit_is_named_where_a_step_is_not_all_weights_for_a_token(compare, make_engine, options):
    engine = make_engine("ours+variant", **options)
    engine.info, engine.seconds = {"dtype": "float32"}, {"single": [[1.0]]}
    limit = {"read_gb_per_s": 1.0, "gemm_float32_gflop_per_s": 100.0}
    batches = compare.batches_of_round("single", 0)
    assert compare.summarise(engine, "single", batches, [], compare.ModelSize(1, 0), limit)["share_of_limit"] is None


def test_the_tables_name_every_engine(compare, measured, capsys):
    batches, rows = measured
    compare.print_tables(compare.Console(width=120), rows, batches)
    text = capsys.readouterr().out
    assert "single: 1 requests, 64 prompt and 128 output tokens" in text
    assert "2.00 x (2.00 - 2.00)" in text
    assert text.index(" ours ") < text.index(" peer:float32 ")


def test_our_own_adapter_answers(compare, tmp_path, tiny_model):
    folder = tiny_model("llama")
    found, _ = compare.find_engines(["ours:float32"], tmp_path, "bfloat16", 120)
    (engine,) = found
    engine.log_file = tmp_path / "log"
    engine.options = {"max_model_len": 128}
    try:
        engine.start(folder, None, 1)
        assert engine.run(compare.Batch([([5, 6, 7], 4), ([8], 9)])) > 0
        assert engine.run(compare.Batch([([5, 6, 7], 4)], {"type": "array", "minItems": 100})) > 0
    finally:
        engine.stop()
    assert engine.info["dtype"] == "float32"
    assert engine.info["weight_bytes"] >= 4 * compare.ModelSize.of(folder).num_head_parameters
