"""Who imports whom: rows, cycles, who never meets, one home for each foreign import, the kernels' own rules."""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterable, Mapping
from fnmatch import fnmatch
from types import MappingProxyType

from tests.house.source import Import, Module, dotted, imports

# The records between the layers are files, not a folder; they count as one unit, and so may import each other.
RECORDS = frozenset({"config", "errors", "hub", "outputs", "sampling_params", "version"})
PLAIN_RECORDS = RECORDS - {"hub"}  # hub reads files and starts pip
ROWS: tuple[frozenset[str], ...] = (
    frozenset({"records", "kernels"}),
    frozenset({"models", "sample", "core", "openai_client", "figures"}),
    frozenset({"worker", "structured_output", "speculative"}),
    frozenset({"engine"}),
    frozenset({"trace"}),  # looks on: LLM.trace() and the commands are above it
    frozenset({"entrypoints", "cli", "labs", "llm", "verify", "bench"}),
    frozenset({"minivllm"}),  # the face: public names only
)
# The command line starts whatever its own row offers (serve, run-batch, verify, explain); nobody there imports it.
WITHIN_ITS_ROW = frozenset({"cli"})

COMPILERS = ("numba", "llvmlite")  # of the CPU kernels
HOMES: Mapping[str, tuple[str, ...]] = MappingProxyType(
    {
        **dict.fromkeys(("flask", "werkzeug", "waitress", "pydantic"), ("minivllm/entrypoints/*",)),
        "triton": ("kernels/ops/*/kernel.py", "kernels/ops/report.py", "kernels/ops/trace/interpreter.py"),
        **dict.fromkeys(COMPILERS, ("kernels/ops/jit.py", "kernels/ops/amx.py")),
        "llguidance": ("minivllm/structured_output/*",),
        "transformers": (
            "minivllm/models/loader.py",
            "minivllm/models/hf_backend.py",
            "minivllm/engine/tokenizer.py",
            "minivllm/entrypoints/tool_calls.py",
            "minivllm/verify/*",
        ),
        "ray": ("minivllm/worker/ray_actors.py",),
        "torch.distributed": ("minivllm/worker/collectives.py", "minivllm/worker/ranks.py"),
        **dict.fromkeys(
            ("threading", "_thread", "concurrent", "multiprocessing", "asyncio"),
            ("minivllm/engine/async_engine.py", "minivllm/entrypoints/*"),
        ),
    }
)

# What core may take from the standard library: nothing that has a clock, chance, files, threads or an environment.
CORE_LIBRARY = frozenset(
    {"__future__", "abc", "array", "bisect", "collections", "dataclasses", "enum", "functools", "hashlib", "heapq"}
    | {"itertools", "math", "operator", "struct", "types", "typing"}
)
INPUT_OUTPUT = frozenset({"open", "print", "input", "exec", "eval", "compile", "__import__"})


# ------------------------------------------------------------------ rows
def unit_of(name: str) -> str:
    """The folder, or the file standing for one, that a module belongs to."""
    parts = name.split(".")
    unit = parts[1] if len(parts) > 1 else parts[0]
    return "records" if unit in RECORDS else unit


def row_of(unit: str) -> int | None:
    """Its row, 0 at the bottom; None for a stranger."""
    return next((row for row, units in enumerate(ROWS) if unit in units), None)


def against_the_rows(modules: Iterable[Module]) -> list[str]:
    """A module imports only from lower rows or its own folder. A new folder must be given a row first."""
    modules = list(modules)
    strangers = [module for module in modules if row_of(unit_of(module.name)) is None]
    if strangers:
        return [f"{module.path}:1: {unit_of(module.name)} has no row" for module in strangers]
    complaints = []
    for found in imports(modules):
        if not found.is_of("minivllm"):
            continue
        above, below = unit_of(found.importer.name), unit_of(found.target)
        row, target_row = row_of(above), row_of(below)
        assert row is not None
        if above == below or (above in WITHIN_ITS_ROW and row == target_row):
            continue
        if target_row is None or target_row >= row:
            complaints.append(found.at(f"{above} (row {row}) imports {found.target} (row {target_row})"))
    return complaints


# ------------------------------------------------------------------ the graph
def graph_of(modules: Iterable[Module]) -> dict[str, set[str]]:
    """module -> modules of ours that it names in an import."""
    modules = list(modules)
    graph: dict[str, set[str]] = {module.name: set() for module in modules}
    for found in imports(modules):
        if found.target in graph:
            graph[found.importer.name].add(found.target)
    return graph


def cycles(modules: Iterable[Module]) -> list[str]:
    """Every import that closes a circle, as `a -> b -> a`."""
    graph = graph_of(modules)
    complaints: list[str] = []
    done: set[str] = set()

    def visit(name: str, path: list[str]) -> None:
        if name in path:
            complaints.append(" -> ".join([*path[path.index(name) :], name]))
        elif name not in done:
            for target in sorted(graph[name]):
                visit(target, [*path, name])
            done.add(name)

    for name in sorted(graph):
        visit(name, [])
    return complaints


def reach(graph: Mapping[str, set[str]], unit: str) -> set[str]:
    """All modules that a unit's modules import, directly or through others, with the unit itself."""
    found: set[str] = set()
    waiting = [name for name in graph if unit_of(name) == unit]
    while waiting:
        name = waiting.pop()
        if name not in found:
            found.add(name)
            waiting.extend(graph[name])
    return found


def meetings(modules: Iterable[Module]) -> list[str]:
    """core and sample never meet; core and worker have only the plain records in common."""
    graph = graph_of(modules)
    core = reach(graph, "core")
    complaints = []
    for other in ("sample", "worker"):
        theirs = reach(graph, other)
        complaints += [f"core reaches {name}" for name in sorted(core) if unit_of(name) == other]
        complaints += [f"{other} reaches {name}" for name in sorted(theirs) if unit_of(name) == "core"]
        common = {name for name in core & theirs if unit_of(name) not in ("core", other)}
        plain = {f"minivllm.{record}" for record in PLAIN_RECORDS}
        complaints += [f"core and {other} meet in {name}" for name in sorted(common - plain)]
    return complaints


# ------------------------------------------------------------------ foreign imports
def away_from_home(modules: Iterable[Module]) -> list[str]:
    """An import, or a use as `torch.distributed.x`, outside the files that HOMES names."""
    modules = list(modules)
    found = [(one.importer, one.node, one.target) for one in imports(modules)]
    for module in modules:
        found += [(module, node, dotted(node)) for node in ast.walk(module.tree) if isinstance(node, ast.Attribute)]
    complaints = []
    for module, node, target in found:
        for foreign, homes in HOMES.items():
            used = f"{target}.".startswith(f"{foreign}.") and (isinstance(node, ast.stmt) or "." in foreign)
            if used and not any(fnmatch(module.path, home) for home in homes):
                complaints.append(module.at(node, f"{foreign} is at home in {', '.join(homes)}"))
    return sorted(set(complaints))


def unseen_imports(modules: Iterable[Module]) -> list[str]:
    """importlib.import_module and __import__ would hide an import from all of this; only the face loads lazily."""
    return [
        module.at(node, f"{dotted(node.func)} hides an import")
        for module in modules
        for node in ast.walk(module.tree)
        if isinstance(node, ast.Call)
        and dotted(node.func).split(".")[-1] in ("import_module", "__import__")
        and module.name != "minivllm"
    ]


# ------------------------------------------------------------------ core, sample, records
def impure_core(modules: Iterable[Module]) -> list[str]:
    """core is the standard library's data structures and the plain records; no input or output of its own."""
    complaints = []
    modules = list(modules)
    records = {f"minivllm.{record}" for record in PLAIN_RECORDS}
    for found in imports(modules):
        if unit_of(found.importer.name) == "core" and found.importer.name.startswith("minivllm.core"):
            allowed = found.target in records if found.is_of("minivllm") else found.target.split(".")[0] in CORE_LIBRARY
            if not (allowed or found.is_of("minivllm.core")):
                complaints.append(found.at(f"core imports {found.target}"))
    for module in modules:
        if unit_of(module.name) == "core":
            complaints += [
                module.at(node, f"core calls {node.func.id}")
                for node in ast.walk(module.tree)
                if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in INPUT_OUTPUT
            ]
    return complaints


def heavy_records(modules: Iterable[Module]) -> list[str]:
    """The plain records know the standard library and each other."""
    records = {f"minivllm.{record}" for record in PLAIN_RECORDS}
    return [
        found.at(f"a record imports {found.target}")
        for found in imports(modules)
        if found.importer.name in records and found.target not in records and not is_standard(found)
    ]


def is_standard(found: Import) -> bool:
    """Whether Python brings it."""
    return found.target.split(".")[0] in sys.stdlib_module_names


def sample_beyond_its_law(modules: Iterable[Module]) -> list[str]:
    """sample/README.md: torch, numpy, sampling_params, outputs and nothing else."""
    allowed = ("minivllm.sample", "minivllm.sampling_params", "minivllm.outputs", "torch", "numpy")
    return [
        found.at(f"sample imports {found.target}")
        for found in imports(modules)
        if unit_of(found.importer.name) == "sample"
        and not is_standard(found)
        and not any(found.is_of(name) for name in allowed)
    ]


# ------------------------------------------------------------------ kernels
def unfree_kernels(modules: Iterable[Module]) -> list[str]:
    """Kernels import torch, numpy, triton and the standard library; of ours, dispatch, build, jit and amx (the homes of
    numba), their own operation, and what operations agree on: the two that share a quantised cache have one
    description.

    The report reads all operations, and decoder_step is a sequence of them; nobody below imports either."""
    complaints, shared = [], (["dispatch"], ["build"], ["jit"], ["amx"], ["quantised_cache"])
    for found in imports(modules):
        if not found.importer.name.startswith("minivllm.kernels"):
            continue
        operation = found.importer.name.split(".")[2:3]
        if found.is_of("minivllm"):
            parts = found.target.split(".")
            if parts[1:2] != ["kernels"]:
                complaints.append(found.at(f"a kernel imports {found.target}"))
            elif operation not in (["report"], ["decoder_step"]) and parts[2:3] not in (operation, *shared):
                complaints.append(found.at(f"{'.'.join(operation)} imports another operation: {found.target}"))
        elif not is_standard(found) and found.target.split(".")[0] not in ("torch", "numpy", "triton", *COMPILERS):
            complaints.append(found.at(f"a kernel imports {found.target}"))
    return complaints


def kernels_and_references_that_meet(modules: Iterable[Module]) -> list[str]:
    """An implementation never reaches its reference, nor the reverse, directly or through others but the contract."""
    modules = list(modules)
    graph = graph_of(modules)
    complaints = []
    for module in modules:
        if not module.name.startswith("minivllm.kernels.") or module.is_package:
            continue
        operation = module.name.rsplit(".", 1)[0]
        seen: set[str] = set()
        waiting = [module.name]
        while waiting:
            name = waiting.pop()
            if name not in seen and name != operation:
                seen.add(name)
                waiting.extend(graph[name])
        stems = {name.rsplit(".", 1)[1] for name in seen - {module.name} if name.startswith(f"{operation}.")}
        fast = {stem for stem in stems if stem.startswith("cpu") or stem == "kernel"}
        if module.stem == "reference" and fast:
            complaints.append(f"{module.path}:1: the reference reaches {', '.join(sorted(fast))}")
        if (module.stem.startswith("cpu") or module.stem == "kernel") and "reference" in stems:
            complaints.append(f"{module.path}:1: an implementation reaches its reference")
    return complaints


def eager_kernels(modules: Iterable[Module]) -> list[str]:
    """A kernel.py is imported inside functions only: triton is not everywhere."""
    return [
        found.at(f"{found.target} must be loaded lazily")
        for found in imports(modules)
        if found.is_of("minivllm.kernels") and found.target.endswith(".kernel") and not found.in_function
    ]
