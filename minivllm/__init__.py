"""minivllm: a language model inference engine to read, trust and run.

    from minivllm import LLM, SamplingParams
    LLM().generate("The capital of France is", SamplingParams(max_tokens=16))

Only public names are here. Those that need torch are loaded on first use, so that `import minivllm` and
`minivllm --help` stay quick. Twin in vLLM: vllm/__init__.py.
"""

from typing import TYPE_CHECKING, Any

from minivllm.config import EngineConfig
from minivllm.errors import (
    ClientError,
    ConfigError,
    ContextLengthError,
    EngineDeadError,
    InvalidRequestError,
    MiniVLLMError,
    ModelNotFoundError,
    OverloadedError,
    ServerError,
)
from minivllm.outputs import CompletionOutput, EmbeddingRequestOutput, Logprob, RequestOutput
from minivllm.sampling_params import BeamSearchParams, SamplingParams, StructuredOutputsParams
from minivllm.version import __version__

if TYPE_CHECKING:
    from minivllm.engine.async_engine import AsyncEngine
    from minivllm.engine.llm_engine import LLMEngine
    from minivllm.llm import LLM

__all__ = [
    "LLM",
    "AsyncEngine",
    "BeamSearchParams",
    "ClientError",
    "CompletionOutput",
    "ConfigError",
    "ContextLengthError",
    "EmbeddingRequestOutput",
    "EngineConfig",
    "EngineDeadError",
    "InvalidRequestError",
    "LLMEngine",
    "Logprob",
    "MiniVLLMError",
    "ModelNotFoundError",
    "OverloadedError",
    "RequestOutput",
    "SamplingParams",
    "ServerError",
    "StructuredOutputsParams",
    "__version__",
]

_LAZY = {
    "LLM": "minivllm.llm",
    "LLMEngine": "minivllm.engine.llm_engine",
    "AsyncEngine": "minivllm.engine.async_engine",
}


def __getattr__(name: str) -> Any:
    if name in _LAZY:
        import importlib

        return getattr(importlib.import_module(_LAZY[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
