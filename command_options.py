"""Options of commands, generated from the definitions of builds (ray_jobs/config.py) and of queries (query/options.py)."""

import os
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

import click
import cloup

from .query.options import OptionField, option_fields
from .store.errors import UsageError

_LARGEST_CONFIG = 1 << 14  # bytes; the time of the TOML parser may grow with their square
BUILD_PANELS = {
    "Index": ("bytes_per_example", "layers"),
    "Corpus": ("model", "data", "out", "fields", "max_tokens"),
    "Machine": ("workers", "device", "dtype"),
}
"""Options of a build that have flags, by panel of the help; all others are given as -o name=value."""
BUILD_FLAGS = {name: f"--{name.replace('_', '-')}" for names in BUILD_PANELS.values() for name in names}
_FLAG_TYPES: dict[str, click.ParamType] = {
    **dict.fromkeys(("model", "data", "out"), click.Path()),
    **dict.fromkeys(("bytes_per_example", "max_tokens", "workers"), click.INT),
}
_REPEATED = ("model", "data", "layers")


class ConfigCommand(cloup.Command):
    """A command with the options of `BuildConfig`, which is imported when they are first needed.

    Args:
        without: options that the command does not have.
        args, kwargs: those of `cloup.Command`.
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
        choices = _choices(name)
        return cloup.Option(
            [BUILD_FLAGS[name]],
            type=click.Choice(choices) if choices else _FLAG_TYPES.get(name, click.STRING),
            multiple=name in _REPEATED,
            help=_help(name) + ("  Repeatable." if name in _REPEATED else ""),
            group=group,
        )

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        """See `click.Command`; an option that is written as a flag and has none is refused with the way to write it."""
        try:
            return super().parse_args(ctx, args)
        except click.NoSuchOption as error:
            name = error.option_name.lstrip("-").replace("-", "_")
            if name in self.other_options():
                raise click.UsageError(f"the option {name} has no flag; write -o {name}=value", ctx) from error
            raise

    def other_options(self) -> dict[str, str]:
        """The options without flags, with their help."""
        return {name: _help(name) for name in _config_fields() if name not in BUILD_FLAGS and name not in self._without}


def _config_fields() -> Mapping[str, Any]:
    from .ray_jobs.config import BuildConfig

    return BuildConfig.model_fields


def _help(name: str) -> str:
    field = _config_fields()[name]
    text = " ".join((field.description or "").split())
    has_default = "[default:" not in text and field.default not in (None, ()) and not field.is_required()
    default = str(field.default).lower() if isinstance(field.default, bool) else field.default
    choices = _choices(name)
    if choices and name not in BUILD_FLAGS:
        text, bracket, rest = text.partition("[default:")
        text = f"{text.strip()} One of {', '.join(choices)}." + (f"  {bracket}{rest}" if bracket else "")
    return text + (f"  [default: {default}]" if has_default else "")


def _choices(name: str) -> tuple[str, ...]:
    """Return the only texts that an option can be; empty if there are others."""
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


def with_flags(message: str, command: click.Command) -> str:
    """Return a message of the library, which names options as in Python (`long=split`), with a command's names for them."""
    flags = {parameter.name: max(parameter.opts, key=len) for parameter in command.params if isinstance(parameter, click.Option)}
    other_options = command.other_options() if isinstance(command, ConfigCommand) else {}

    def name_of(match: re.Match[str]) -> str:
        name = match[1]
        value = match[2]
        if name in flags:
            return flags[name] + (f" {value}" if value else "")
        return ("-o " if name in other_options else "") + name + (f"={value}" if value else "")

    return re.sub("`([a-z_]+)(?:=([a-z_]+))?`", name_of, message)


def config_options(function: Callable[..., Any]) -> Callable[..., Any]:
    """Add -o, --config and --help-all to a `ConfigCommand`."""
    options = (
        click.option("-o", "others", multiple=True, metavar="NAME=VALUE", help="Any other option of a build, such as -o seed=1."),
        click.option("--config", "config_file", type=click.Path(), help="TOML file with any options of a build, by their names."),
        click.option("--help-all", is_flag=True, is_eager=True, expose_value=False, callback=_show_all, help="List the other options."),
    )
    for option in reversed(options):
        function = option(function)
    return function


def take_config_values(values: dict[str, Any]) -> dict[str, Any]:
    """Combine the options of a build: from -o and flags, else from the environment, else from the configuration file.

    Args:
        values: the values of a `ConfigCommand`'s parameters; those of the build are removed.

    Raises:
        UsageError: an option is unknown, given twice, or has an invalid value.
    """
    ctx = click.get_current_context()
    command = ctx.command
    assert isinstance(command, ConfigCommand)
    other_options = command.other_options()
    combined: dict[str, Any] = {}
    file = values.pop("config_file")
    if file is not None:
        combined |= _toml(file)
    for name in other_options:  # click has read the environment's variables of flags
        text = os.environ.get(f"{ctx.auto_envvar_prefix}_{name.upper()}")
        if text is not None:
            combined[name] = _parsed(name, text)
    for name in BUILD_FLAGS:
        value = values.pop(name, None)
        if value not in (None, ()):
            combined[name] = value
    repeated = set()
    for text in values.pop("others"):
        name, equals, value = text.partition("=")
        if name in BUILD_FLAGS and name not in command._without:
            raise UsageError(f"-o {text}: this option has a flag; write {BUILD_FLAGS[name]}")
        if name in other_options and not equals:
            raise UsageError(f"-o {name}: write it with a value, as -o {name}=value")
        if name not in other_options:
            names = ", ".join(other_options)
            raise UsageError(f"-o {text} is not an option of a build; write -o name=value with one of {names} (--help-all describes them)")
        if name in repeated:
            raise UsageError(f"-o {name} is given twice; give it once")
        repeated.add(name)
        combined[name] = _parsed(name, value)
    option_names = _config_fields().keys() - set(command._without)
    unknown = sorted(combined.keys() - option_names)
    if unknown:
        raise UsageError(f"{file}: there is no option {unknown[0]!r}; wherefrom build --help-all lists the names")
    return combined


def _parsed(name: str, text: str) -> Any:
    """Return the value of a build's option from text: a number, true, false or none, or several values with commas between."""
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
    """Return the options of a TOML file."""
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
    except ValueError as error:  # not TOML, or not UTF-8
        raise UsageError(f"{file} cannot be read as TOML: {error}") from error


def _query_option(field: OptionField) -> Callable[..., Any]:
    option = field.option
    text = (f"{option.file}: " if option.file else "") + option.help
    if option.default is not None and field.kind is not bool:
        text += f"  [default: {option.default}]"
    if field.kind is bool:
        return click.option(*field.flags, field.name, is_flag=True, default=bool(option.default), help=text)
    plain = field.kind if field.kind in (int, float) else str
    option_type = click.Choice(field.choices) if field.choices else click.Path() if option.file else plain
    return click.option(*field.flags, field.name, type=option_type, multiple=field.name == "layers", help=text)


def query_options(title: str, definition: type, without: tuple[str, ...] = ()) -> Callable[..., Any]:
    """Add the fields of a definition (`Query`, `Options` or `ScoreOptions`) to a command, as a panel of its help."""
    fields = [field for name, field in option_fields(definition).items() if field.option.on_command_line and name not in without]
    return cloup.option_group(title, *(_query_option(field) for field in fields))


def take_options(values: dict[str, Any], definition: type) -> dict[str, Any]:
    """Remove the options of a definition (as of `query_options`) from a command's values, and return those that were given."""
    taken = {name: values.pop(name) for name in option_fields(definition) if name in values}
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
