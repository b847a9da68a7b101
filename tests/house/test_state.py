"""No module-level mutable state. First the house as it is; then each checker on source that is wrong."""

import pytest

from tests.house.source import Checker, module, product
from tests.house.state import EXCEPTIONS, bindings, changed_constants, hidden_globals, mutable_state

PRODUCT = product()


@pytest.mark.parametrize("checker", [mutable_state, changed_constants, hidden_globals], ids=lambda c: c.__name__)
def test_the_product_keeps_the_law(checker: Checker):
    assert checker(PRODUCT) == []


def test_every_exception_is_still_needed():
    """An exception for something that is gone is a hole."""
    existing = {(module.name, binding.name) for module in PRODUCT for binding in bindings(module.tree.body)}
    assert existing >= EXCEPTIONS


# ------------------------------------------------------------------ what may stand at module level
@pytest.mark.parametrize(
    "source",
    [
        "cache = {}",
        "seen = set()",
        "requests: list[int] = []",
        "requests: dict = dict()",
        "first, second = 1, []",
        "pair = (1, [])",
        "squares = [i * i for i in range(3)]",
        "CACHE = dict()",  # upper case promises a table written out, not an empty one to fill
        "COUNTS = defaultdict(int)",
        "LOCK = threading.Lock()",
        "WEIGHT = torch.zeros(3)",
        "engine = Engine()",
        "if True:\n    cache = {}",
        "try:\n    import x\nexcept ImportError:\n    cache = []",
        "class C:\n    seen = []",
    ],
)
def test_mutable_state_is_found(source: str):
    (complaint,) = mutable_state([module("minivllm.worker.a", source)])
    assert complaint.startswith("minivllm/worker/a.py:")


@pytest.mark.parametrize(
    "source",
    [
        "LIMIT = 3",
        "NAMES = ('a', 'b')",
        "TABLE = {'a': 1}",
        "_TABLE = ['a']",
        "__all__ = ['a']",
        "table: Mapping[str, int] = {'a': 1}",
        "table: Final = ['a']",
        "NAMES = frozenset({'a'})",
        "table = MappingProxyType({'a': 1})",
        "PATTERN = re.compile('a')",
        "ROOT = hashlib.sha256(b'x').digest()",
        "PLACE = Place(1)\nclass Place(NamedTuple):\n    x: int",
        "PLACE = Place(1)\n@dataclass(frozen=True, slots=True)\nclass Place:\n    x: int",
        "Alias = list[int] | dict[str, int]",
        "def f():\n    cache = {}",
        "class C:\n    FIELDS = ['a']\n    x: int = 0\n    y: list = field(default_factory=list)",
    ],
)
def test_values_that_cannot_change_and_tables_may_stand(source: str):
    assert mutable_state([module("minivllm.worker.a", source)]) == []


def test_an_unfrozen_dataclass_at_module_level_is_found():
    source = "@dataclass\nclass Place:\n    x: int\nPLACE = Place(1)"
    assert mutable_state([module("minivllm.worker.a", source)]) == [
        "minivllm/worker/a.py:4: PLACE is mutable state of the module"
    ]


# ------------------------------------------------------------------ what nobody may do
@pytest.mark.parametrize(
    "change",
    [
        "TABLE['b'] = 2",
        "del TABLE['a']",
        "TABLE.update(b=2)",
        "TABLE.setdefault('b', 2)",
        "TABLE |= {'b': 2}",
        "TABLE['a'] += 1",
        "a.TABLE['b'] = 2",
        "TABLE.pop('a')",
    ],
)
@pytest.mark.parametrize("where", ["{}", "def f():\n    {}"], ids=["top", "in a function"])
def test_a_table_that_somebody_changes_is_found(change: str, where: str):
    table = module("minivllm.worker.a", "TABLE = {'a': 1}")
    user = module("minivllm.worker.b", f"from minivllm.worker.a import TABLE\n{where.format(change)}")
    (complaint,) = changed_constants([table, user])
    assert complaint == f"minivllm/worker/b.py:{2 + where.count(chr(10))}: TABLE is changed"


@pytest.mark.parametrize(
    "source", ["TABLE: Mapping[str, int] = {}\nTABLE['a'] = 1", "class C:\n    FIELDS = []\n    FIELDS.append(1)"]
)
def test_annotated_and_class_level_tables_are_watched_too(source: str):
    assert len(changed_constants([module("minivllm.worker.a", source)])) == 1


def test_reading_a_table_is_no_change():
    source = "TABLE = {'a': 1}\ndef f(own):\n    own['x'] = TABLE['a']\n    return TABLE.get('b'), sorted(TABLE)"
    assert changed_constants([module("minivllm.worker.a", source)]) == []


@pytest.mark.parametrize(
    "source",
    [
        "def f():\n    global x\n    x = 1",
        "@lru_cache\ndef f(): ...",
        "@functools.cache\ndef f(): ...",
        "class C:\n    @functools.lru_cache(maxsize=9)\n    def f(self): ...",
        "def f(): ...\nf.calls = 0",
        "class C: ...\ndef f():\n    C.count += 1",
        "import minivllm.kernels.dispatch as dispatch\ndef f():\n    dispatch.IMPLS = ()",
        "from minivllm.kernels import dispatch\nsetattr(dispatch, 'IMPLS', ())",
        "import torch\ntorch.backends.flag = True",
        "from torch import nn\nnn.x = 1",
    ],
)
def test_hidden_globals_are_found(source: str):
    found = hidden_globals([module("minivllm.worker.a", source)])
    assert len(found) == 1, found


def test_fields_and_cached_properties_of_objects_are_no_globals():
    source = (
        "class C:\n    @cached_property\n    def f(self):\n        self.x = 1\n        other = C()\n        other.y = 2"
    )
    assert hidden_globals([module("minivllm.worker.a", source)]) == []
