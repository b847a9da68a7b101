"""A planted bug is found in the layers where it is, in the component where it is, and called by its name."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from gguf import GGMLQuantizationType

from golden.tiny import DECODERS
from minivllm import LLM
from minivllm.engine.llm_engine import read_model_facts
from minivllm.kernels.amx import HAS_AMX
from minivllm.models import gguf_to_hf
from minivllm.verify.engines import Engines
from minivllm.verify.localise import check_layers
from minivllm.verify.observe import Observer
from minivllm.verify.records import FAIL, OK
from minivllm.verify.reference import Reference
from tests.models.checkpoints import gguf_name, hf_weights, to_llama_cpp, write_gguf
from tests.verify.planted import BUGS


def look(folder: Path, arithmetic: str = "float32", **options: Any) -> Any:
    facts = read_model_facts(folder)
    reference = Reference.load(facts.source, facts.hf_config)
    return check_layers(Engines(folder).start, reference, facts.model_config.vocab_size, arithmetic, **options)


@pytest.mark.parametrize("name", BUGS)
def test_a_planted_bug_is_localised_and_named(
    name: str, tiny_model: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    bug = BUGS[name]
    bug.plant(monkeypatch)
    checks, _, findings = look(tiny_model(bug.model), bug.arithmetic, **bug.options)
    assert FAIL in [check.status for check in checks]
    found = findings[0]
    assert (found.kind, found.component, tuple(found.layers)) == (bug.kind, bug.component, bug.layers), "\n".join(
        map(str, findings)
    )


@pytest.mark.parametrize("name", DECODERS)
def test_a_clean_network_raises_no_alarm(name: str, tiny_model: Callable[[str], Path]) -> None:
    checks, points, findings = look(tiny_model(name))
    assert findings == []
    assert [check.status for check in checks] == [OK, OK, OK]
    assert len({point.layer for point in points}) > 2


def test_a_group_scale_that_a_file_reader_gets_wrong_is_localised(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """The truth is transformers' own GGUF reader, so a fault of ours in reading the codes is a fault of the network."""
    weights = hf_weights("llama")
    tensors = {gguf_name("llama", name): to_llama_cpp("llama", name, weight) for name, weight in weights.items()}
    path = write_gguf(tmp_path / "tiny.gguf", "llama", tensors, kind=GGMLQuantizationType.Q8_0)
    checks, _, findings = look(path)
    assert (findings, {check.status for check in checks}) == ([], {OK})
    read = gguf_to_hf.read_tensor

    def spoiled(file: Any, name: str, *more: Any) -> Any:
        tensor = read(file, name, *more)
        if name == "blk.1.ffn_up.weight":
            tensor = tensor.clone()
            tensor[:, :32] *= 2
        return tensor

    monkeypatch.setattr(gguf_to_hf, "read_tensor", spoiled)
    found = look(path)[2][0]
    assert (found.kind, found.component, found.layers) == ("wrong scale of the weight", "mlp.up_proj", [1])
    assert "2 times transformers' in rows 0-" in found.evidence and "columns 0-31" in found.evidence


def test_an_engine_whose_steps_are_one_call_is_looked_at_module_by_module() -> None:
    """The default model in bfloat16, which with AMX calls no module at all."""
    engine = LLM(dtype="bfloat16", max_model_len=64, kv_cache_memory_bytes=16 << 20).llm_engine
    path = engine._executor._runner.path
    weights = path.decoder_weights
    assert (weights is not None) == HAS_AMX
    with Observer(engine) as observer:
        trace = observer.run(list(range(100, 140)), max_tokens=3)
    points = [trace.get(point) for point in ("final", "layers.0.self_attn.o_proj", "layers.29.mlp.down_proj")]
    assert len(trace.output_ids) == 3 and [len(values) for values in points] == [42, 42, 42]
    assert path.decoder_weights is weights
