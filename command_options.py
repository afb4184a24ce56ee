"""Options of commands, generated from the definitions of builds (ray_jobs/config.py) and of queries (query/options.py)."""

import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import click
import cloup

from .query.options import OptionField, option_fields
from .store.errors import UsageError

_LARGEST_CONFIG = 1 << 14
BUILD_PANELS = {
    "Index": ("bytes_per_example", "layers"),
    "Corpus": ("model", "data", "out", "fields", "max_tokens"),
    "Machine": ("workers", "device", "dtype"),
}
"""Options of a build that have flags, by panel of the help; all others are given as -o name=value."""
_WITH_FLAGS = frozenset(name for names in BUILD_PANELS.values() for name in names)
_REPEATED = ("model", "data", "layers")


class ConfigCommand(cloup.Command):
    """A command with the options of `BuildConfig`, which is imported when they are first needed.

    Args:
        without: options that the command does not have.
        kwargs: of `cloup.Command`.
    """

    def __init__(self, *args: Any, without: tuple[str, ...] = (), **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._without = without
        self._loaded = False

    def get_params(self, ctx: click.Context) -> list[click.Parameter]:
        """See `click.Command`."""
        if not self._loaded:
            self._loaded = True
            options: list[click.Parameter] = []
            for title, names in BUILD_PANELS.items():
                group = cloup.OptionGroup(title)
                options += [self._option(name, group) for name in names if name not in self._without]
            self.params = [*options, *self.params]
            _, self.option_groups, self.ungrouped_options = self._group_params(self.params)
        return super().get_params(ctx)

    def _option(self, name: str, group: cloup.OptionGroup) -> click.Option:
        field = _config_fields()[name]
        option_type: Any = field.annotation if field.annotation in (int, float) else str
        if name in ("bytes_per_example", "max_tokens"):
            option_type = int
        if name == "dtype":
            option_type = click.Choice(_choices(name))
        return cloup.Option(
            [f"--{name.replace('_', '-')}"],
            type=click.Path() if name in ("model", "data", "out") else option_type,
            multiple=name in _REPEATED,
            help=_help(name) + ("  Repeatable." if name in _REPEATED else ""),
            group=group,
        )

    def other_options(self) -> dict[str, str]:
        """The options without flags, with their help."""
        return {name: _help(name) for name in _config_fields() if name not in _WITH_FLAGS and name not in self._without}


def _config_fields() -> Mapping[str, Any]:
    from .ray_jobs.config import BuildConfig

    return BuildConfig.model_fields


def _help(name: str) -> str:
    field = _config_fields()[name]
    text = " ".join((field.description or "").split())
    shown = "[default:" in text or field.default in (None, ()) or field.is_required()
    default = str(field.default).lower() if isinstance(field.default, bool) else field.default
    choices = _choices(name)
    if choices and name not in _WITH_FLAGS:
        text, bracket, rest = text.partition("[default:")
        text = f"{text.strip()} One of {', '.join(choices)}." + (f"  {bracket}{rest}" if bracket else "")
    return text + ("" if shown else f"  [default: {default}]")


def _choices(name: str) -> tuple[str, ...]:
    """The texts that an option can be; empty where it is free."""
    from typing import Literal, get_args, get_origin

    annotation = _config_fields()[name].annotation
    members = get_args(annotation) or (annotation,)
    if get_origin(annotation) is Literal:
        return get_args(annotation)
    literals = [member for member in members if get_origin(member) is Literal]
    return get_args(literals[0]) if literals else ()


def _show_all(ctx: click.Context, parameter: click.Parameter, value: bool) -> None:
    if not value:
        return
    command = ctx.command
    assert isinstance(command, ConfigCommand)
    formatter = ctx.make_formatter()
    with formatter.section("Options that are given as -o NAME=VALUE, or in the --config file"):
        formatter.write_dl(list(command.other_options().items()))
    click.echo(f"{ctx.get_help()}\n\n{formatter.getvalue().rstrip()}")
    ctx.exit()


def config_options(function: Callable[..., Any]) -> Callable[..., Any]:
    """Add -o, --config and --help-all to a `ConfigCommand`."""
    options = (
        click.option("-o", "others", multiple=True, metavar="NAME=VALUE", help="Any other option of a build, such as -o rank=32."),
        click.option("--config", "config_file", type=click.Path(), help="TOML file with any options of a build, by their names."),
        click.option("--help-all", is_flag=True, is_eager=True, expose_value=False, callback=_show_all, help="List the other options."),
    )
    for option in reversed(options):
        function = option(function)
    return function


def config_values(values: dict[str, Any]) -> dict[str, Any]:
    """Combine the options of a build: from -o and flags, else from the environment, else from the configuration file.

    Args:
        values: of a `ConfigCommand`'s parameters; the build's are removed from it.

    Raises:
        UsageError: an option is unknown, given twice, or has an invalid value.
    """
    ctx = click.get_current_context()
    command = ctx.command
    assert isinstance(command, ConfigCommand)
    others = command.other_options()
    combined: dict[str, Any] = {}
    file = values.pop("config_file")
    if file is not None:
        combined |= _toml(file)
    for name in others:
        text = os.environ.get(f"{ctx.auto_envvar_prefix}_{name.upper()}")
        if text is not None:
            combined[name] = _parsed(name, text)
    for name in (name for names in BUILD_PANELS.values() for name in names if name in values):
        value = values.pop(name)
        if value not in (None, ()):
            combined[name] = value
    for text in values.pop("others"):
        name, equals, value = text.partition("=")
        if not equals or name not in others:
            flags = ", ".join(others)
            raise UsageError(f"-o {text} is not an option of a build; write -o name=value with one of {flags} (--help-all describes them)")
        combined[name] = _parsed(name, value)
    unknown = sorted(combined.keys() - _config_fields().keys() | combined.keys() & set(command._without))
    if unknown:
        raise UsageError(f"{file}: there is no option {unknown[0]!r}; wherefrom build --help-all lists the names")
    return combined


def _parsed(name: str, text: str) -> Any:
    """A value of a build's option, from text: a number, true or false, or several values with commas between."""
    from pydantic import TypeAdapter, ValidationError

    from .ray_jobs.config import BuildConfig, option_problem

    field = BuildConfig.model_fields[name]
    if text == "none" and field.default is None:
        return None
    if "tuple" in str(field.annotation):
        return tuple(part.strip() for part in text.split(","))
    try:
        return TypeAdapter(field.rebuild_annotation()).validate_strings(text)
    except ValidationError as error:
        problem = error.errors()[0]
        raise UsageError(option_problem({**problem, "loc": (name,)}, BuildConfig)) from error


def _toml(file: str) -> dict[str, Any]:
    """Options of a small TOML file; the parser's time grows with the square of a file's size."""
    import tomllib

    if not Path(file).is_file():
        raise UsageError(f"there is no file {file}")
    with open(file, "rb") as opened:
        content = opened.read(_LARGEST_CONFIG + 1)
    if len(content) > _LARGEST_CONFIG:
        raise UsageError(f"{file} is longer than {_LARGEST_CONFIG >> 10} KiB, too long for a file of options")
    try:
        return tomllib.loads(content.decode())
    except RecursionError as error:
        raise UsageError(f"{file} cannot be read as TOML: it is nested too deeply") from error
    except UnicodeDecodeError as error:
        raise UsageError(f"{file} cannot be read as TOML: it is not UTF-8") from error
    except tomllib.TOMLDecodeError as error:
        raise UsageError(f"{file} cannot be read as TOML: {error}") from error


def _query_option(field: OptionField) -> Callable[..., Any]:
    kinds = {str: str, int: int, float: float}
    option = field.option
    text = ("JSON file: " if option.file else "") + option.help
    if option.default is not None and field.kind is not bool:
        text += f"  [default: {option.default}]"
    if field.kind is bool:
        return click.option(*field.flags, field.name, is_flag=True, default=bool(option.default), help=text)
    option_type = click.Choice(field.choices) if field.choices else click.Path() if option.file else kinds.get(field.kind, str)
    return click.option(*field.flags, field.name, type=option_type, multiple=field.name == "layers", help=text)


def query_options(title: str, owner: type, without: tuple[str, ...] = ()) -> Callable[..., Any]:
    """Add the fields of `Query` or the options of answers to a command, as a panel of its help."""
    fields = [field for name, field in option_fields(owner).items() if field.option.on_command_line and name not in without]
    return cloup.option_group(title, *(_query_option(field) for field in fields))


def given(values: dict[str, Any], owner: type) -> dict[str, Any]:
    """Take the values of an owner's options out of a command's, without those that were not given."""
    taken = {name: values.pop(name) for name in option_fields(owner) if name in values}
    if "weights" in taken:
        taken["weights"] = _weights(taken["weights"])
    return {name: value for name, value in taken.items() if value not in (None, ())}


def _weights(text: str | None) -> dict[str, float] | None:
    if text is None:
        return None
    weights = {}
    for part in text.split(","):
        name, _, number = part.partition("=")
        try:
            weights[name.strip()] = float(number)
        except ValueError as error:
            raise UsageError(f"--weights is {text!r}; it is written as head=1,blocks=0.5") from error
    return weights
