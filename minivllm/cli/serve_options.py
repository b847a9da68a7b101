"""Options of `minivllm serve` alone. Names are vLLM's wherever vLLM has the flag.

A new one is an alias here, a line in serving.serve's signature, and its name in the table there that hands it on;
variable, --config key and --print-config line follow by themselves.
Called by serving.py. Twin in vLLM: vllm/entrypoints/openai/cli_args.py and vllm/engine/arg_utils.py.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

from minivllm.cli.options import ENGINE, SERVER
from minivllm.cli.settings import read_config

SETTINGS, MODEL, PARALLEL, NO_EFFECT = "Settings", "Model", "Devices", "Accepted, without effect"
LOGS = "Logs and metrics"

ModelArgument = Annotated[
    str | None, typer.Argument(help="Folder, .gguf file or Hugging Face id; nothing = the default model.")
]

# ------------------------------------------------------------------ where settings come from
ConfigOption = Annotated[
    Path | None,
    typer.Option(
        "--config",
        callback=read_config,
        is_eager=True,
        metavar="FILE",
        help="YAML file; its keys are the names of these options.",
        rich_help_panel=SETTINGS,
    ),
]
PrintConfigOption = Annotated[
    bool,
    typer.Option(
        "--print-config",
        help="Print every setting and where it comes from, in the form that --config reads, and end.",
        rich_help_panel=SETTINGS,
    ),
]
JsonReadyOption = Annotated[
    bool, typer.Option("--json", help="Print the ready line, or --print-config, as JSON.", rich_help_panel=SETTINGS)
]

# ------------------------------------------------------------------ server
HostOption = Annotated[
    str, typer.Option(metavar="ADDRESS", help="Address to listen on; 0.0.0.0 = all.", rich_help_panel=SERVER)
]
PortOption = Annotated[int, typer.Option(metavar="NUMBER", help="0 = any free one.", rich_help_panel=SERVER)]
ApiKeysOption = Annotated[
    list[str] | None,
    typer.Option(
        metavar="KEY",
        help="Clients must send this; may be repeated. VLLM_API_KEY is read as well.",
        rich_help_panel=SERVER,
    ),
]
ServedNamesOption = Annotated[
    list[str] | None,
    typer.Option(
        metavar="NAME",
        help="What clients call the model; may be repeated, answers carry the first. Not given: the model's own name.",
        rich_help_panel=SERVER,
    ),
]
EmbeddingModelOption = Annotated[
    str | None,
    typer.Option(
        metavar="MODEL",
        help="Serve this model's embeddings beside the model, at the same address. Its memory is part of "
        "--gpu-memory-utilization.",
        rich_help_panel=SERVER,
    ),
]
ServedEmbeddingNamesOption = Annotated[
    list[str] | None,
    typer.Option(
        metavar="NAME",
        help="What clients call the embedding model; may be repeated. Not given: its own name.",
        rich_help_panel=SERVER,
    ),
]
ShutdownOption = Annotated[
    float,
    typer.Option(
        metavar="SECONDS", help="Seconds that running answers may take to end after a signal.", rich_help_panel=SERVER
    ),
]
ClientTimeoutOption = Annotated[
    float,
    typer.Option(
        metavar="SECONDS",
        help="For a request to arrive whole, and for a client that does not read.",
        rich_help_panel=SERVER,
    ),
]
MaxQueueOption = Annotated[
    int, typer.Option(metavar="REQUESTS", help="Requests that may wait; more get 429.", rich_help_panel=SERVER)
]
MaxBodyOption = Annotated[
    int, typer.Option(metavar="BYTES", help="Longest request body, in bytes.", rich_help_panel=SERVER)
]
MaxLogprobsOption = Annotated[
    int,
    typer.Option(
        metavar="TOKENS", help="Alternatives per token that a request may ask for; at most 20.", rich_help_panel=SERVER
    ),
]
OriginsOption = Annotated[
    str | None,
    typer.Option(
        metavar="ORIGINS",
        help="Web pages that may call: words, a JSON list, or * for all. Not given: none.",
        rich_help_panel=SERVER,
    ),
]

# ------------------------------------------------------------------ what others see of the server
ProtectMetricsOption = Annotated[
    bool, typer.Option("--protect-metrics", help="/metrics needs the key, too.", rich_help_panel=LOGS)
]
LogLevelOption = Annotated[
    Literal["debug", "info", "warning", "error"],
    typer.Option(
        metavar="NAME",
        help="Least that is logged, to standard error: debug, info, warning or error.",
        rich_help_panel=LOGS,
    ),
]
LogFormatOption = Annotated[
    Literal["text", "json"],
    typer.Option(metavar="NAME", help="text, or json: one object on a line.", rich_help_panel=LOGS),
]
AccessLogOption = Annotated[bool, typer.Option(help="One line for each call.", rich_help_panel=LOGS)]
LogRequestsOption = Annotated[
    bool, typer.Option("--log-requests", help="Log bodies, prompts and all.", rich_help_panel=LOGS)
]

# ------------------------------------------------------------------ model
TokenizerOption = Annotated[
    str | None, typer.Option(metavar="MODEL", help="Take the tokenizer from another model.", rich_help_panel=MODEL)
]
ChatTemplateOption = Annotated[
    str | None,
    typer.Option(metavar="FILE", help="Jinja file in place of the model's own chat template.", rich_help_panel=MODEL),
]
ToolParserOption = Annotated[
    str,
    typer.Option(
        metavar="NAME",
        help="How the model writes tool calls. auto: as its chat template shows; a wrong name lists the others.",
        rich_help_panel=MODEL,
    ),
]
ReasoningParserOption = Annotated[
    str,
    typer.Option(
        metavar="NAME",
        help="Whether the model thinks first. auto: as its chat template shows; a wrong name lists the others.",
        rich_help_panel=MODEL,
    ),
]
GenerationConfigOption = Annotated[
    str,
    typer.Option(
        metavar="NAME",
        help="auto: what a request leaves open is as the model's generation_config.json says; vllm: as the API says.",
        rich_help_panel=MODEL,
    ),
]
ServeSeedOption = Annotated[
    int, typer.Option(metavar="NUMBER", help="Of requests that bring none.", rich_help_panel=MODEL)
]

# ------------------------------------------------------------------ engine
PrefixCachingOption = Annotated[
    bool, typer.Option(help="Compute what prompts have in common once.", rich_help_panel=ENGINE)
]
ChunkedPrefillOption = Annotated[
    bool, typer.Option(help="A long prompt may take several steps.", rich_help_panel=ENGINE)
]
LongPrefillOption = Annotated[
    int,
    typer.Option(metavar="TOKENS", help="Most tokens of one prompt in a step; 0 = no limit.", rich_help_panel=ENGINE),
]
PolicyOption = Annotated[
    str,
    typer.Option(
        metavar="NAME",
        help="Who runs next: fcfs (who came first) or priority (lowest number first).",
        rich_help_panel=ENGINE,
    ),
]

# ------------------------------------------------------------------ devices
EagerOption = Annotated[bool, typer.Option("--enforce-eager", help="On a GPU: no CUDA graphs.", rich_help_panel=ENGINE)]
TensorParallelOption = Annotated[
    int,
    typer.Option(
        "--tensor-parallel-size",
        "-tp",
        metavar="DEVICES",
        help="Devices that share one model, each with a part of every layer.",
        rich_help_panel=PARALLEL,
    ),
]
ExecutorBackendOption = Annotated[
    str,
    typer.Option(
        "--distributed-executor-backend",
        metavar="NAME",
        help="Who starts the processes of several devices: mp (this one) or ray; or start them all with torchrun.",
        rich_help_panel=PARALLEL,
    ),
]
PipelineParallelOption = Annotated[
    int,
    typer.Option(
        "--pipeline-parallel-size", "-pp", metavar="DEVICES", help="Only 1 is built.", rich_help_panel=PARALLEL
    ),
]
DataParallelOption = Annotated[
    int,
    typer.Option("--data-parallel-size", "-dp", metavar="DEVICES", help="Only 1 is built.", rich_help_panel=PARALLEL),
]

# ------------------------------------------------------------------ from vLLM, with nothing to do here
BlockManagerOption = Annotated[
    bool, typer.Option("--use-v2-block-manager", help="There is only one.", rich_help_panel=NO_EFFECT)
]
LoadingWorkersOption = Annotated[
    int | None, typer.Option(metavar="THREADS", help="Weights are read by one thread.", rich_help_panel=NO_EFFECT)
]
SwapSpaceOption = Annotated[
    float | None,
    typer.Option(metavar="GIB", help="GiB. A preempted request is computed again.", rich_help_panel=NO_EFFECT),
]
ToolChoiceOption = Annotated[
    bool, typer.Option("--enable-auto-tool-choice", help="It always is.", rich_help_panel=NO_EFFECT)
]
TrustCodeOption = Annotated[
    bool, typer.Option("--trust-remote-code", help="Code of a model folder never runs.", rich_help_panel=NO_EFFECT)
]
QuietOption = Annotated[
    bool, typer.Option("--disable-log-requests", help="Requests are not logged.", rich_help_panel=NO_EFFECT)
]
