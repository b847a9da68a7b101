"""Adapter: OpenVINO GenAI's continuous batching, offline. Runs in the peer "openvino"."""

import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import openvino
import openvino_genai
from protocol import Request, Setup, refuse_options, serve

KV_CACHE_GB = 1
WEIGHT_FORMATS = {"float32": "fp32", "float16": "fp16", "bfloat16": "fp16"}  # it has no bf16 file; it computes in bf16


class OpenVino:
    """ContinuousBatchingPipeline with its own settings, and a prefix cache as the others have."""

    def __init__(self, setup: Setup) -> None:
        refuse_options(setup.options, ("quantization",))
        folder, prepare_seconds = _export(setup)
        scheduler = openvino_genai.SchedulerConfig()
        scheduler.cache_size = KV_CACHE_GB
        scheduler.enable_prefix_caching = True
        properties = {"INFERENCE_NUM_THREADS": setup.threads}
        if setup.dtype == "float32":
            properties["INFERENCE_PRECISION_HINT"] = "f32"
        self.pipeline = openvino_genai.ContinuousBatchingPipeline(folder, scheduler, "CPU", properties)
        self.info = {
            "version": openvino_genai.__version__,
            "dtype": setup.options.get("quantization", setup.dtype),
            "weight_bytes": (folder / "openvino_model.bin").stat().st_size,
            "prepare_seconds": prepare_seconds,
        }

    def generate(self, requests: list[Request], json_schema: dict[str, Any] | None) -> list[list[int]]:
        prompts = [openvino.Tensor(np.array([ids], dtype=np.int64)) for ids, _ in requests]
        outputs = self.pipeline.generate(prompts, [self._config(n, json_schema) for _, n in requests])
        return [list(output.m_generation_ids[0]) for output in outputs]

    def _config(self, num_tokens: int, json_schema: dict[str, Any] | None) -> openvino_genai.GenerationConfig:
        config = openvino_genai.GenerationConfig()
        config.do_sample = False
        config.ignore_eos = True
        config.max_new_tokens = config.min_new_tokens = num_tokens
        if json_schema is not None:
            config.structured_output_config = openvino_genai.StructuredOutputConfig(json_schema=json.dumps(json_schema))
        return config


def _export(setup: Setup) -> tuple[Path, float]:
    """The folder of the model in OpenVINO's own format, written beside it the first time, and the seconds that took."""
    weight_format = setup.options.get("quantization", WEIGHT_FORMATS[setup.dtype])
    model = Path(setup.model)
    folder = model.with_name(f"{model.name}-openvino-{weight_format}")
    if folder.exists():
        return folder, 0.0
    start = time.perf_counter()
    command = [Path(sys.executable).with_name("optimum-cli"), "export", "openvino", "--model", model]
    command += ["--task", "text-generation-with-past", "--weight-format", weight_format]
    if weight_format == "int4":
        command += ["--group-size", "32", "--ratio", "1.0"]  # every linear, in groups as the GGUF's
    unfinished = folder.with_name(f"{folder.name}.part")
    subprocess.run([*command, unfinished], check=True)
    unfinished.rename(folder)
    return folder, time.perf_counter() - start


if __name__ == "__main__":
    serve(OpenVino)
