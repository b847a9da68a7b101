"""The labs: skeletons fail, solutions pass, and a wrong answer hears what is wrong with it."""

from __future__ import annotations

import ast
import itertools
import time
from pathlib import Path

import pytest

from minivllm.labs import lab as labs
from minivllm.labs import workshop
from minivllm.labs.catalog import LABS, find
from minivllm.labs.lab import Lab, Verdict, check, same
from tests.labs.wrong_answers import WRONG_ANSWERS

EVERY_LAB = pytest.mark.parametrize("lab", LABS, ids=lambda lab: lab.name)
LIMIT_SECONDS = 60.0  # what a check may take


def check_source(lab: Lab, source: str) -> Verdict:
    path = f"{lab.name}.py"
    return check(lab, workshop.function_in(source, path, lab.function), path)


# ------------------------------------------------------------------ every lab
def test_there_are_eight_with_their_own_names():
    assert len({lab.name for lab in LABS}) == len(LABS) == 8


@EVERY_LAB
def test_the_solution_agrees_with_the_engine_in_time(lab: Lab):
    started = time.perf_counter()
    verdict = check_source(lab, workshop.solution(lab.name))
    assert verdict.passed, verdict
    assert verdict.num_examples > 40
    assert time.perf_counter() - started < LIMIT_SECONDS


@EVERY_LAB
def test_the_skeleton_fails_and_hears_what_to_do(lab: Lab):
    verdict = check_source(lab, workshop.skeleton(lab.name))
    assert verdict.num_passed == 0
    assert "not written yet" in verdict.message
    assert verdict.call.startswith(f"{lab.function}(")


@EVERY_LAB
def test_the_skeleton_is_the_solution_without_its_body(lab: Lab):
    skeleton, solution = workshop.skeleton(lab.name), workshop.solution(lab.name)
    assert "# ---" not in skeleton + solution
    assert skeleton.count(workshop.NOT_WRITTEN) == 1
    before, after = skeleton.split(workshop.NOT_WRITTEN)
    assert solution.startswith(before) and solution.endswith(after.lstrip("\n"))
    written = next(node for node in ast.parse(skeleton).body if getattr(node, "name", "") == lab.function)
    assert ast.get_docstring(written) and len(written.body) == 2  # the docstring and the raise


@EVERY_LAB
def test_the_example_in_the_docstring_is_one_that_the_solution_gives(lab: Lab):
    """Each exercise shows `->` at least once, and says where the engine does it."""
    source = workshop.skeleton(lab.name)
    assert "->  " in source
    root = Path(__file__).parents[2]
    named = [part.split(",")[0].split(" (")[0].strip() for part in lab.engine.split(";")]
    assert all((root / path).exists() for path in named), named
    assert any(path.split("/")[-1] in source for path in named)


@EVERY_LAB
def test_examples_are_the_same_each_time(lab: Lab):
    assert [example.arguments for example in lab.examples()] == [example.arguments for example in lab.examples()]


# ------------------------------------------------------------------ wrong answers
@pytest.mark.parametrize(
    ("lab", "index"),
    [pytest.param(lab, index, id=f"{lab.name}-{index}") for lab in LABS for index in range(len(lab.mistakes))],
)
def test_every_known_mistake_is_told_from_the_others(lab: Lab, index: int):
    verdict = check(lab, lab.wrong(lab.mistakes[index]))
    assert not verdict.passed
    assert verdict.message == lab.mistakes[index].message


@pytest.mark.parametrize(("name", "source", "told"), WRONG_ANSWERS, ids=[f"{row[0]}-{row[2]}" for row in WRONG_ANSWERS])
def test_a_students_wrong_answer_hears_what_is_wrong(name: str, source: str, told: str):
    """Written without a look at the solution, so the lines are others; the behaviour is what counts."""
    verdict = check_source(find(name), source)
    assert not verdict.passed
    assert told in verdict.message
    assert verdict.expected != verdict.got and verdict.engine


def test_every_lab_has_at_least_two_wrong_answers():
    names = [name for name, _, _ in WRONG_ANSWERS]
    assert all(names.count(lab.name) >= 2 for lab in LABS)


def test_two_mistakes_at_once_are_explained_one_by_one():
    source = (
        "def allocate(free_queue, ref_cnt, block_hash, count):\n    return [free_queue.pop() for _ in range(count)]"
    )
    verdict = check_source(find("allocate"), source)
    assert verdict.message.startswith("Perhaps this: It takes blocks from the right end")
    assert "leaves ref_cnt" in verdict.got


def test_an_answer_that_is_wrong_in_its_own_way_hears_what_the_example_shows():
    verdict = check_source(
        find("append_slot"), "def append_slot(block_table, num_tokens, block_size, free_queue):\n  return 7"
    )
    assert verdict.message == verdict.example
    assert (verdict.expected, verdict.got) == ("returns 38", "returns 7")


def test_an_error_names_its_line():
    source = "def allocate(free_queue, ref_cnt, block_hash, count):\n    block = free_queue[0]\n    return block[1]"
    assert (
        check_source(find("allocate"), source).got == "raises TypeError: 'int' object is not subscriptable, in line 3"
    )


def test_an_endless_loop_is_stopped(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(labs, "SECONDS_PER_EXAMPLE", 0.2)
    source = (
        "def make_room(request_id, num_needed, num_free, running, waiting, tables):\n"
        "    while num_free < num_needed:\n"
        "        try:\n            pass\n        except Exception:\n            pass\n    return True"
    )
    verdict = check_source(find("preempt"), source)
    assert verdict.got.startswith("does not end") and "never ends" in verdict.message


def test_a_slow_answer_is_stopped_in_time(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(labs, "SECONDS_PER_CHECK", 0.5)
    source = workshop.solution("top_p").replace("    largest = ", "    time.sleep(0.2)\n    largest = ")
    started = time.perf_counter()
    verdict = check_source(find("top_p"), source.replace("import math", "import math, time"))
    assert not verdict.passed and verdict.num_passed >= 1
    assert time.perf_counter() - started < LIMIT_SECONDS / 10


def test_an_answer_that_exits_is_an_error_like_others():
    verdict = check_source(find("allocate"), "def allocate(**arguments):\n    raise SystemExit(3)")
    assert verdict.got == "raises SystemExit: 3, in line 2"


def test_rejection_sampling_gives_exactly_the_targets_distribution():
    """All drafts by their probability, all uniforms of a grid: counted, not drawn. The engine has no general rule."""
    draft, target = [0.75, 0.125, 0.125], [0.25, 0.375, 0.375]
    function, counts = find("rejection_sampling").solution(), [0.0] * 3
    for token_id, accept, draw in itertools.product(range(3), range(48), range(16)):
        arguments = ([token_id], [draft], [target, target], [(accept + 0.5) / 48], (draw + 0.5) / 16)
        counts[function(*arguments)[0]] += draft[token_id]
    assert [count / (48 * 16) for count in counts] == target


def test_online_softmax_may_read_its_tiles_once_only():
    source = workshop.solution("online_softmax").replace(
        "    largest = -math.inf\n", "    largest = max(max(s) for s, _ in tiles)\n"
    )
    verdict = check_source(find("online_softmax"), source)
    assert not verdict.passed


# ------------------------------------------------------------------ the file
def test_start_writes_the_skeleton_and_never_overwrites(tmp_path: Path):
    path = workshop.start("top_p", tmp_path)
    assert path == tmp_path / "top_p.py" and path.read_text() == workshop.skeleton("top_p")
    path.write_text("mine")
    with pytest.raises(workshop.ClientError, match="already"):
        workshop.start("top_p", tmp_path)
    assert path.read_text() == "mine"


@pytest.mark.parametrize(
    ("source", "told"),
    [
        ("def allocate(:\n", "SyntaxError: .* in line 1"),
        ("import nothing_of_this_name\n", "ModuleNotFoundError: .* in line 1"),
        ("x = 1\nexit()\n", "SystemExit"),
        ("def alocate(): ...\n", "must define the function allocate"),
    ],
)
def test_a_file_that_does_not_load_says_why(source: str, told: str):
    with pytest.raises(workshop.ClientError, match=told):
        workshop.function_in(source, "allocate.py", "allocate")


def test_a_file_that_never_ends_is_stopped(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(workshop, "SECONDS_TO_LOAD", 0.2)
    with pytest.raises(workshop.ClientError, match="not through with allocate.py"):
        workshop.function_in("while True: pass", "allocate.py", "allocate")


def test_a_lab_is_found_by_what_people_type():
    assert find("chunk-budget") is find("chunk_budget") is find("chunk_budget.py")
    with pytest.raises(workshop.ClientError, match="there are: allocate, "):
        find("page_table")


def test_values_are_compared_as_students_mean_them():
    assert same(labs.plain((1, [2])), [1, [2]])
    assert same(0.1 + 0.2, 0.3) and same(float("nan"), float("nan")) and same(1.0, 1)
    assert not same(True, 1) and not same([1], [1, 2]) and not same({1: 2.0}, {2: 2.0}) and not same(None, 0)
