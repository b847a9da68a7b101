"""Who imports whom. First the house as it is; then each checker on source that is wrong, to see that it can say so."""

import pytest

from tests.house.layers import (
    CORE_LIBRARY,
    HOMES,
    against_the_rows,
    away_from_home,
    cycles,
    eager_kernels,
    graph_of,
    heavy_records,
    impure_core,
    kernels_and_references_that_meet,
    meetings,
    sample_beyond_its_law,
    unfree_kernels,
    unseen_imports,
)
from tests.house.source import Checker, Module, imports, module, product

PRODUCT = product()


def test_all_of_the_product_is_looked_at():
    names = {module.name for module in PRODUCT}
    assert {"minivllm", "minivllm.core.scheduler", "minivllm.kernels", "minivllm.kernels.rms_norm.cpu"} <= names
    scheduler = graph_of(PRODUCT)["minivllm.core.scheduler"]
    assert {"minivllm.core.kv_cache_manager", "minivllm.outputs", "minivllm.config"} <= scheduler


@pytest.mark.parametrize(
    "checker",
    [
        against_the_rows,
        cycles,
        meetings,
        away_from_home,
        unseen_imports,
        impure_core,
        heavy_records,
        sample_beyond_its_law,
        unfree_kernels,
        kernels_and_references_that_meet,
        eager_kernels,
    ],
    ids=lambda checker: checker.__name__,
)
def test_the_product_keeps_the_law(checker: Checker):
    assert checker(PRODUCT) == []


# ------------------------------------------------------------------ reading imports
@pytest.mark.parametrize(
    ("source", "target", "in_function"),
    [
        ("import minivllm.config", "minivllm.config", False),
        ("import minivllm.config as c", "minivllm.config", False),
        ("from minivllm import config", "minivllm.config", False),
        ("from minivllm.config import CacheConfig", "minivllm.config", False),
        ("from ..config import CacheConfig", "minivllm.config", False),
        ("from .. import config", "minivllm.config", False),
        ("from . import b", "minivllm.core.b", False),
        ("def f():\n    from minivllm import config", "minivllm.config", True),
        ("if TYPE_CHECKING:\n    import minivllm.config", "minivllm.config", False),
        ("class C:\n    async def f(self):\n        import torch.nn", "torch.nn", True),
        ("from torch import nn", "torch.nn", False),
    ],
)
def test_every_way_to_import_is_seen(source: str, target: str, in_function: bool):
    others = [module("minivllm.config", ""), module("minivllm.core.b", ""), module("minivllm.core", "", package=True)]
    found = [(one.target, one.in_function) for one in imports([module("minivllm.core.a", source), *others])]
    assert found == [(target, in_function)]


def test_a_relative_import_in_a_package_starts_at_the_package():
    package = module("minivllm.sample", "from .sampler import sample", package=True)
    assert [one.target for one in imports([package, module("minivllm.sample.sampler", "")])] == [
        "minivllm.sample.sampler"
    ]


# ------------------------------------------------------------------ rows and cycles
@pytest.mark.parametrize(
    ("importer", "target"),
    [
        ("minivllm.core.request", "minivllm.engine.llm_engine"),
        ("minivllm.models.llama", "minivllm.worker.kv_cache"),
        ("minivllm.models.llama", "minivllm.sample.sampler"),  # the same row, another folder
        ("minivllm.engine.llm_engine", "minivllm.llm"),
        ("minivllm.outputs", "minivllm.core.request"),
        ("minivllm.config", "minivllm.kernels.dispatch"),
        ("minivllm.kernels.dispatch", "minivllm.config"),
        ("minivllm.llm", "minivllm.cli"),
        ("minivllm.llm", "minivllm.entrypoints.run_batch"),
        ("minivllm.worker.executor", "minivllm"),
    ],
)
@pytest.mark.parametrize("form", ["import {}", "def f():\n    import {}"], ids=["top", "in a function"])
def test_an_import_from_the_same_row_or_above_is_found(importer: str, target: str, form: str):
    modules = [module(importer, form.format(target)), module(target, "")]
    (complaint,) = against_the_rows(modules)
    assert complaint.startswith(f"{modules[0].path}:{1 + form.count(chr(10))}: ")
    assert target in complaint


def test_a_folder_that_nobody_gave_a_row_is_found():
    assert against_the_rows([module("minivllm.utils.misc", "")]) == ["minivllm/utils/misc.py:1: utils has no row"]


def test_lower_rows_and_the_own_folder_may_be_imported():
    source = "from minivllm.core import a\nfrom minivllm.worker import b\nfrom minivllm.engine import c\nimport torch"
    targets = [module(f"minivllm.{name}", "") for name in ("core.a", "worker.b", "engine.c")]
    assert against_the_rows([module("minivllm.engine.d", source), *targets]) == []


def test_a_circle_is_found_through_functions_and_packages():
    a = module("minivllm.core.a", "from minivllm.core import b")
    b = module("minivllm.core.b", "def f():\n    from minivllm.core.c import g")
    c = module("minivllm.core.c", "if True:\n    import minivllm.core.a")
    assert cycles([a, b, c]) == ["minivllm.core.a -> minivllm.core.b -> minivllm.core.c -> minivllm.core.a"]
    assert cycles([a, b]) == []


def test_core_and_sample_that_meet_behind_a_third_are_found():
    core = module("minivllm.core.a", "import minivllm.config")
    config = module("minivllm.config", "def f():\n    import minivllm.sample.b")
    sample = module("minivllm.sample.b", "")
    assert "core reaches minivllm.sample.b" in meetings([core, config, sample])
    backwards = [module("minivllm.sample.b", "import minivllm.core.a"), module("minivllm.core.a", "")]
    assert "sample reaches minivllm.core.a" in meetings(backwards)


def test_core_and_worker_may_meet_in_the_plain_records_only():
    def meet(target: str) -> list[str]:
        both = [module(f"minivllm.{folder}.a", f"import {target}") for folder in ("core", "worker")]
        return meetings([*both, module(target, "")])

    assert meet("minivllm.outputs") == []
    assert meet("minivllm.hub") == ["core and worker meet in minivllm.hub"]
    assert meet("minivllm.shared") == ["core and worker meet in minivllm.shared"]
    assert "worker reaches minivllm.core.b" in meet("minivllm.core.b")


# ------------------------------------------------------------------ foreign imports
@pytest.mark.parametrize(
    ("foreign", "home", "elsewhere"),
    [
        ("flask", "minivllm.entrypoints.app", "minivllm.engine.async_engine"),
        ("triton", "minivllm.kernels.rms_norm.kernel", "minivllm.kernels.rms_norm.cpu"),
        ("triton.language", "minivllm.kernels.rms_norm.kernel", "minivllm.kernels.dispatch"),
        ("llguidance", "minivllm.structured_output.grammar", "minivllm.engine.input_processor"),
        ("transformers", "minivllm.models.loader", "minivllm.models.llama"),
        ("transformers.utils", "minivllm.models.hf_backend", "minivllm.hub"),
        ("transformers", "minivllm.engine.tokenizer", "minivllm.engine.detokenizer"),
        ("transformers", "minivllm.entrypoints.tool_calls", "minivllm.entrypoints.chat"),
        ("transformers", "minivllm.verify.parity", "minivllm.llm"),
        ("torch.distributed", "minivllm.worker.collectives", "minivllm.models.layers"),
        ("torch.distributed", "minivllm.worker.ranks", "minivllm.worker.model_runner"),
        ("threading", "minivllm.engine.async_engine", "minivllm.engine.llm_engine"),
        ("threading", "minivllm.entrypoints.server", "minivllm.sample.sampler"),
        ("concurrent.futures", "minivllm.entrypoints.server", "minivllm.models.loader"),
    ],
)
def test_a_foreign_import_away_from_its_home_is_found(foreign: str, home: str, elsewhere: str):
    root, _, rest = foreign.rpartition(".")
    forms = [f"import {foreign}", f"def f():\n    from {foreign} import x"] + (
        [f"from {root} import {rest}"] if root else []
    )
    for source in forms:
        assert away_from_home([module(home, source)]) == []
        (complaint,) = away_from_home([module(elsewhere, source)])
        assert " is at home in " in complaint


def test_a_use_of_torch_distributed_without_an_import_of_its_own_is_found():
    source = "import torch\ndef f(x):\n    torch.distributed.all_reduce(x)"
    (complaint,) = away_from_home([module("minivllm.models.layers", source)])
    assert complaint.startswith("minivllm/models/layers.py:3: torch.distributed is at home in ")
    assert away_from_home([module("minivllm.worker.collectives", source)]) == []
    assert away_from_home([module("minivllm.models.layers", "import torch\ntorch.distribution_of(1)")]) == []


def test_every_home_is_one_of_the_house():
    """A renamed file must not leave an open door behind: homes are folders or files of the tree in house.md."""
    still_to_come = {"minivllm/structured_output/*", "minivllm/verify/*", "kernels/ops/*/kernel.py"}
    still_to_come |= {"minivllm/entrypoints/tool_calls.py"}
    paths = [module.path for module in PRODUCT]
    for home in {home for homes in HOMES.values() for home in homes} - still_to_come:
        assert any(path == home or path.startswith(home.rstrip("*")) for path in paths), home


def test_an_import_by_name_is_found_everywhere_but_in_the_face():
    for source in ("import importlib\nimportlib.import_module('x')", "__import__('x')"):
        assert len(unseen_imports([module("minivllm.models.loader", source)])) == 1
        assert unseen_imports([module("minivllm", source, package=True)]) == []


# ------------------------------------------------------------------ core, records, sample
@pytest.mark.parametrize(
    "name", ["time", "random", "threading", "os", "io", "pathlib", "logging", "torch", "numpy", "transformers", "sys"]
)
def test_core_with_anything_but_data_structures_is_found(name: str):
    assert name not in CORE_LIBRARY
    for source in (f"import {name}", f"from {name} import x", f"def f():\n    import {name}.y"):
        (complaint,) = impure_core([module("minivllm.core.a", source)])
        assert complaint.startswith("minivllm/core/a.py:") and f"core imports {name}" in complaint
        assert impure_core([module("minivllm.worker.a", source)]) == []


@pytest.mark.parametrize("target", ["minivllm.hub", "minivllm.kernels.dispatch", "minivllm.sample.sampler"])
def test_core_with_more_than_the_plain_records_is_found(target: str):
    assert len(impure_core([module("minivllm.core.a", f"import {target}"), module(target, "")])) == 1
    assert impure_core([module("minivllm.core.a", "import minivllm.outputs"), module("minivllm.outputs", "")]) == []


def test_core_that_prints_or_opens_is_found():
    source = "def f(path):\n    print(path)\n    return open(path)"
    assert impure_core([module("minivllm.core.a", source)]) == [
        "minivllm/core/a.py:2: core calls print",
        "minivllm/core/a.py:3: core calls open",
    ]


def test_a_record_that_knows_torch_or_the_hub_is_found():
    for source in ("import torch", "from numpy import array", "from minivllm.hub import resolve_model"):
        assert len(heavy_records([module("minivllm.outputs", source), module("minivllm.hub", "")])) == 1
    assert heavy_records([module("minivllm.hub", "import tqdm")]) == []  # hub is no plain record


def test_sample_with_more_than_its_law_allows_is_found():
    for source in (
        "import transformers",
        "from minivllm.errors import ClientError",
        "import minivllm.kernels.dispatch",
    ):
        modules = [module("minivllm.sample.a", source), module("minivllm.kernels.dispatch", "")]
        assert len(sample_beyond_its_law([*modules, module("minivllm.errors", "")])) == 1
    assert sample_beyond_its_law([module("minivllm.sample.a", "import math, torch, numpy as np")]) == []


# ------------------------------------------------------------------ kernels
def operation(name: str, **sources: str) -> list[Module]:
    """An operation's folder: stem -> source; `contract` is its __init__.py."""
    contract = module(f"minivllm.kernels.{name}", sources.pop("contract", ""), package=True)
    return [contract, *(module(f"minivllm.kernels.{name}.{stem}", source) for stem, source in sources.items())]


@pytest.mark.parametrize(
    "source",
    ["import minivllm.config", "from minivllm import outputs", "import transformers", "def f():\n    import flask"],
)
def test_a_kernel_that_knows_the_house_or_a_stranger_is_found(source: str):
    strangers = [module("minivllm.config", ""), module("minivllm.outputs", "")]
    assert len(unfree_kernels([*operation("rms_norm", cpu=source), *strangers])) == 1


def test_an_operation_that_imports_another_is_found():
    other = operation("silu_and_mul", cpu="")
    for source in ("from minivllm.kernels.silu_and_mul import cpu", "from minivllm.kernels import silu_and_mul"):
        assert len(unfree_kernels([*operation("rms_norm", cpu=source), *other])) == 1
    own = operation("rms_norm", contract="from minivllm.kernels.rms_norm import cpu", cpu="import torch, math")
    shared = operation("rope", contract="from minivllm.kernels.dispatch import choose")
    assert unfree_kernels([*own, *shared, module("minivllm.kernels.dispatch", "")]) == []


def test_a_kernel_and_its_reference_that_meet_are_found():
    own = "from minivllm.kernels.op."
    both = operation("op", cpu=f"{own}reference import f", reference="")
    assert kernels_and_references_that_meet(both) == [
        "kernels/ops/op/cpu.py:1: an implementation reaches its reference"
    ]
    reverse = operation("op", kernel="", reference="def f():\n    from minivllm.kernels.op import kernel")
    assert kernels_and_references_that_meet(reverse) == ["kernels/ops/op/reference.py:1: the reference reaches kernel"]
    behind = operation("op", cpu_plan=f"{own}shared import f", shared=f"{own}reference import f", reference="")
    assert kernels_and_references_that_meet(behind) == [
        "kernels/ops/op/cpu_plan.py:1: an implementation reaches its reference"
    ]
    good = operation(
        "op",
        contract="from minivllm.kernels.op import cpu, reference",
        cpu=f"{own}metadata import M",
        reference=f"{own}metadata import M",
        metadata="",
    )
    assert kernels_and_references_that_meet(good) == []


def test_a_triton_kernel_that_is_imported_at_once_is_found():
    eager = operation("op", contract="from minivllm.kernels.op import kernel", kernel="import triton")
    assert len(eager_kernels(eager)) == 1
    lazy = operation("op", contract="def f():\n    from minivllm.kernels.op import kernel", kernel="import triton")
    assert eager_kernels(lazy) == []
