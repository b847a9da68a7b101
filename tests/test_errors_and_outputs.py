"""The exception tree as its docstring draws it, values in messages, and the records between the layers."""

import inspect
import re
import string
import subprocess
import sys

import pytest

import minivllm
from minivllm import errors, outputs
from minivllm.errors import show

ROOT = errors.MiniVLLMError
TREE = {name: kind for name, kind in vars(errors).items() if inspect.isclass(kind) and issubclass(kind, ROOT)}
DRAWN = {  # class: parent, HTTP status
    "ClientError": ("MiniVLLMError", 400),
    "InvalidRequestError": ("ClientError", 400),
    "ContextLengthError": ("ClientError", 400),
    "ModelNotFoundError": ("ClientError", 404),
    "AuthenticationError": ("ClientError", 401),
    "OverloadedError": ("ClientError", 429),
    "ServerError": ("MiniVLLMError", 500),
    "EngineDeadError": ("ServerError", 503),
    "ConfigError": ("ServerError", 500),
}


def test_the_tree_has_these_classes_and_no_others():
    assert {*DRAWN, "MiniVLLMError"} == set(TREE)


@pytest.mark.parametrize("name", DRAWN)
def test_every_class_stands_where_the_docstring_draws_it(name: str):
    parent, status = DRAWN[name]
    assert TREE[name].__bases__[0].__name__ == parent and TREE[name].status == status
    line = re.search(rf"[├└]── {name}\b.*", errors.__doc__).group()
    assert name in ("ClientError", "ServerError", "ConfigError") or f" {status} " in line


def test_callers_may_catch_python_s_own_kinds():
    assert issubclass(errors.ClientError, ValueError) and issubclass(errors.ServerError, RuntimeError)
    assert not issubclass(errors.ServerError, ValueError)


def test_a_client_error_carries_message_parameter_and_code():
    error = errors.InvalidRequestError("n must be 1", parameter="n", code="x")
    assert (str(error), error.message, error.parameter, error.code) == ("n must be 1", "n must be 1", "n", "x")
    assert (errors.ClientError("m").parameter, errors.ClientError("m").code) == (None, None)


def test_codes_that_the_wire_promises():
    assert errors.ContextLengthError("m").code == "context_length_exceeded"
    assert errors.ContextLengthError("m").parameter == "prompt"
    assert (
        errors.ModelNotFoundError("m").code == "model_not_found" and errors.ModelNotFoundError("m").parameter == "model"
    )
    assert errors.OverloadedError("m", retry_after_seconds=7).retry_after_seconds == 7
    assert errors.OverloadedError("m").code == "queue_full"
    assert errors.ConfigError("m", parameter="dtype").parameter == "dtype"


class Unprintable:
    def __repr__(self) -> str:
        raise ZeroDivisionError


def test_a_value_in_a_message_is_short_and_never_an_exception():
    assert show(5) == "5" and show("a") == "'a'" and show(None) == "None"
    assert show("x" * 500, 10) == "'xxxxxxxxx..."
    assert show(10**5000) == "an unprintable int"
    assert show([10**5000]) == "an unprintable list"
    assert show(Unprintable()) == "an unprintable Unprintable"
    assert show("\ud800").isascii()  # a message must go out as UTF-8


# ------------------------------------------------------------------ outputs
def test_every_decision_has_a_sentence_with_as_many_facts_as_places():
    for action, sentence in outputs.DECISION_REASONS.items():
        places = {int(name) for _, name, _, _ in string.Formatter().parse(sentence) if name is not None}
        facts = tuple(f"fact{index}" for index in range(len(places)))
        reason = outputs.Decision("r", action, 1, facts).reason
        assert all(fact in reason for fact in facts) and "{" not in reason


def test_a_completion_is_finished_when_it_has_a_reason():
    completion = outputs.CompletionOutput(0, "text", [1])
    assert not completion.finished()
    completion.finish_reason = "length"
    assert completion.finished()


def test_two_outputs_share_no_metrics():
    first, second = (outputs.RequestOutput("r", None, [1], [], False) for _ in range(2))
    first.metrics["x"] = 1
    assert second.metrics == {}


# ------------------------------------------------------------------ the package
def test_every_public_name_is_there():
    assert all(getattr(minivllm, name) is not None for name in minivllm.__all__)
    with pytest.raises(AttributeError, match="no attribute 'nonsense'"):
        minivllm.nonsense  # noqa: B018


def test_importing_the_package_and_its_plain_records_loads_no_torch():
    program = "import sys, minivllm, minivllm.cli, minivllm.outputs, minivllm.hub; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", program], timeout=60).returncode == 0
