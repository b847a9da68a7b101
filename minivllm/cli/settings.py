"""Where the value of an option comes from: command line, environment, --config file, default, in this order.

    command line          --max-model-len 4096       (or --max_model_len, as vLLM takes it)
    environment           MINIVLLM_MAX_MODEL_LEN=4096; of an option that may be repeated: words
    --config FILE         max-model-len: 4096        YAML; a key that no option has is an error with the nearest name

Every option of every command follows this by its name; nothing is listed here but the exceptions. What the shell made
of a copied command line (a blank word, an empty variable) is told in words before it can be taken for a value.
Knows no option's meaning. Called by cli/__init__.py (the class of all commands), serve_options.py (read_config) and
serving.py (print_config). Twin in vLLM: vllm/utils/argparse_utils.py.
"""

from __future__ import annotations

import difflib
import itertools
import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

import typer
import yaml
from typer.core import TyperCommand

from minivllm.cli.help import print_help
from minivllm.cli.terminal import stderr

PREFIX = "MINIVLLM_"
FURTHER_VARIABLES: Mapping[str, tuple[str, ...]] = MappingProxyType({"--api-key": ("VLLM_API_KEY",)})
SECRET = frozenset({"--api-key"})
ONLY_ON_THE_LINE = frozenset({"--config", "--print-config", "--help"})
COMMAND_LINE, DEFAULT = "command line", "default"
_GIVEN = "minivllm.given"  # in the context's meta: parameter name -> Given


class Given(NamedTuple):
    """A value that did not come from the command line, and where it stands."""

    value: Any
    where: str


# ------------------------------------------------------------------ the class of all commands
class SettingsCommand(TyperCommand):
    """A command whose options can be given in all the ways above."""

    def parse_args(self, ctx: typer.Context, args: list[str]) -> list[str]:  # type: ignore[override]
        """As click does, over values from the environment."""
        options = options_of(self)
        args = [_with_hyphens(word, options) for word in args]
        _check_words(args, options)
        _offer(ctx, dict(_from_environment(options)))
        try:
            return super().parse_args(ctx, args)  # type: ignore[arg-type]
        except typer.BadParameter as error:
            name = error.param.name if error.param is not None else None
            if name in _given(ctx) and source_of(ctx, str(name)) != COMMAND_LINE:
                error.message = f"{error.message} (it comes from: {_given(ctx)[str(name)].where})"
            raise

    def format_help(self, ctx: typer.Context, formatter: Any) -> None:  # type: ignore[override]
        """In panels, readable at 80 columns."""
        print_help(ctx)


def options_of(command: Any) -> dict[str, Any]:
    """flag -> option, under every spelling that it has."""
    return {
        flag: parameter
        for parameter in command.params
        if parameter.param_type_name == "option"
        for flag in (*parameter.opts, *parameter.secondary_opts)
    }


def flag_of(option: Any) -> str:
    """Its long name; --x of --x/--no-x."""
    return next((str(flag) for flag in option.opts if flag.startswith("--")), str(option.opts[0]))


def _with_hyphens(word: str, options: Mapping[str, Any]) -> str:
    flag, equals, value = word.partition("=")
    hyphened = flag.replace("_", "-")
    return f"{hyphened}{equals}{value}" if hyphened in options and flag not in options else word


def _check_words(words: list[str], options: Mapping[str, Any]) -> None:
    """Raise BadParameter for what a shell makes of `\\  # comment` and of `--api-key $NOT_SET`."""
    for word, following in itertools.pairwise([*words, ""]):
        if word == "--":
            return
        if word and not word.strip():
            raise typer.BadParameter(
                "a blank word stands between the options: a backslash must be the last character of its line, "
                "without a blank or a comment behind it"
            )
        option = options.get(word)
        if option is not None and not option.is_flag and following.split("=")[0] in options:
            raise typer.BadParameter(
                f"{word} needs a value, and {following} follows: is a variable of the shell empty? "
                f"(a value that looks so: {word}={following})"
            )


# ------------------------------------------------------------------ environment
def variables_of(option: Any) -> tuple[str, ...]:
    """Names of the environment that an option listens to; the first that is set and not empty counts."""
    flag = flag_of(option)
    return PREFIX + flag.lstrip("-").replace("-", "_").upper(), *FURTHER_VARIABLES.get(flag, ())


def _from_environment(options: Mapping[str, Any]) -> Iterator[tuple[str, Given]]:
    for option in options.values():
        if flag_of(option) in ("--help", "--print-config"):
            continue
        for variable in variables_of(option):
            text = os.environ.get(variable, "")
            if text.startswith("tcp://") and variable == f"{PREFIX}PORT":  # Kubernetes' own, of a service so named
                stderr().print(f"{variable}={text} is Kubernetes' address of a service, not a port: not used")
            elif text:
                yield option.name, Given(text.split() if option.multiple else text, variable)
                break


def _given(ctx: typer.Context) -> dict[str, Given]:
    found: dict[str, Given] = ctx.meta.setdefault(_GIVEN, {})
    return found


def _offer(ctx: typer.Context, values: Mapping[str, Given]) -> None:
    """Values for options that the command line leaves open; what was offered before stays."""
    given = _given(ctx)
    given.update({name: value for name, value in values.items() if name not in given})
    ctx.default_map = {name: found.value for name, found in given.items()}


# ------------------------------------------------------------------ --config FILE
def read_config(ctx: typer.Context, file: Path | None) -> Path | None:
    """The callback of --config: offers what the file says. Raises BadParameter naming file, line and key."""
    if file is not None and not ctx.resilient_parsing:
        try:
            text = Path(file).read_text(encoding="utf-8")
        except OSError as error:
            raise typer.BadParameter(f"cannot read {file}: {error.strerror}") from None
        except UnicodeDecodeError:
            raise typer.BadParameter(f"{file} is not UTF-8 text") from None
        _offer(ctx, _from_yaml(text, str(file), options_of(ctx.command)))
    return file


def _from_yaml(text: str, file: str, options: Mapping[str, Any]) -> dict[str, Given]:
    """Scalars stay text, as on the command line: YAML would read the key 0123 as 83, and `no` as false."""
    try:
        root = yaml.compose(text, yaml.SafeLoader)
    except yaml.YAMLError as error:
        raise typer.BadParameter(f"{file} is not YAML: {' '.join(str(error).split())[:300]}") from None
    if root is None:
        return {}
    if not isinstance(root, yaml.MappingNode):
        raise typer.BadParameter(f"{file} must hold lines of `option: value`")
    found: dict[str, Given] = {}
    for key, value in root.value:
        where = f"{file}:{key.start_mark.line + 1}"
        option = _option_of_key(key.value, where, options)
        if option.name in found:
            raise typer.BadParameter(f"{where}: {key.value} stands twice")
        try:
            found[option.name] = Given(_content(value, option.multiple), where)
        except (yaml.YAMLError, TypeError, ValueError, RecursionError):
            raise typer.BadParameter(
                f"{where}: the value of {key.value} is more than text, numbers and lists"
            ) from None
    return {name: given for name, given in found.items() if given.value is not None}


def _option_of_key(key: Any, where: str, options: Mapping[str, Any]) -> Any:
    flag = f"--{str(key).replace('_', '-')}"
    option = options.get(flag)
    if option is not None and flag_of(option) in ONLY_ON_THE_LINE:
        raise typer.BadParameter(f"{where}: {key} is for the command line only")
    if option is not None and flag not in option.secondary_opts:
        return option
    known = [flag_of(option)[2:] for option in options.values()]
    nearest = difflib.get_close_matches(flag[2:], known, n=1, cutoff=0.5)
    hint = f"; did you mean {nearest[0]}?" if nearest else ""
    raise typer.BadParameter(f"{where}: there is no option {str(key)[:100]!r}{hint}")


def _content(node: yaml.Node, multiple: bool) -> Any:
    """What would stand on the command line; None for an empty value."""
    if isinstance(node, yaml.ScalarNode):
        text = None if node.tag == "tag:yaml.org,2002:null" else node.value
        return [text] if multiple and text is not None else text
    if multiple and isinstance(node, yaml.SequenceNode):
        return [_content(item, False) for item in node.value]
    return json.dumps(yaml.SafeLoader("").construct_document(node))


# ------------------------------------------------------------------ --print-config
def source_of(ctx: typer.Context, name: str) -> str:
    """Where a parameter's value comes from, in words."""
    source = ctx.get_parameter_source(name)
    kind = source.name if source is not None else "DEFAULT"
    if kind == "COMMANDLINE":
        return COMMAND_LINE
    return _given(ctx)[name].where if kind == "DEFAULT_MAP" and name in _given(ctx) else DEFAULT


def settings_of(ctx: typer.Context) -> dict[str, Given]:
    """option without its hyphens -> what is used, and where it comes from; a key is only counted.

    An argument stands in for the option of its name: MODEL for --model.
    """
    found: dict[str, Given] = {}
    arguments = {p.name: ctx.params.get(p.name) for p in ctx.command.params if p.param_type_name == "argument"}
    for option in options_of(ctx.command).values():
        flag = flag_of(option)
        if flag in ONLY_ON_THE_LINE or flag == "--json":
            continue
        value, where = ctx.params.get(option.name), source_of(ctx, option.name)
        if arguments.get(flag[2:]) is not None:
            value, where = arguments[flag[2:]], COMMAND_LINE
        if flag in SECRET and value:
            value = f"{len(value)} given, hidden"
        found[flag[2:]] = Given(list(value) if isinstance(value, tuple) else value, where)
    return found


def print_config(ctx: typer.Context, as_json: bool) -> None:
    """All settings on standard output, as a file for --config with the sources in its comments, or as JSON."""
    settings = settings_of(ctx)
    if as_json:
        typer.echo(
            json.dumps({name: {"value": given.value, "source": given.where} for name, given in settings.items()})
        )
        return
    lines = {name: f"{name}: {json.dumps(given.value, ensure_ascii=False)}" for name, given in settings.items()}
    for flag in SECRET:  # read again, it would be the key
        if settings[flag[2:]].value:
            lines[flag[2:]] = f"# {lines[flag[2:]]}"
    width = min(44, max(map(len, lines.values())))
    for name, line in lines.items():
        typer.echo(f"{line:{width}}  # {settings[name].where}")
