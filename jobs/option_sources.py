"""The three places where a person can set an option: command line, environment, YAML file."""

import argparse
import inspect
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from difflib import get_close_matches
from pathlib import Path
from typing import Any, NoReturn, TypeVar

import yaml
from pydantic_settings import (
    BaseSettings,
    CliSettingsSource,
    EnvSettingsSource,
    InitSettingsSource,
    PydanticBaseSettingsSource,
    SettingsError,
)

from ldm.errors import UserError

__all__ = [
    "KeyPath",
    "OptionPlace",
    "OptionSource",
    "TypedLine",
    "command_line",
    "environment",
    "environment_name",
    "nearest",
    "read_mapping",
    "yaml_file",
]

KeyPath = tuple[str, ...]
Parsed = TypeVar("Parsed")
NONE_TEXT = "null"  # what stands for None on the command line and in the environment, as in YAML


@dataclass(frozen=True)
class OptionPlace:
    """Values found in one place, and how a key is written there.

    ``values`` is nested as the config is; ``spell(("pool", "max_size"))`` may be ``--pool.max-size``;
    ``file`` is the file that holds them, if there is one.
    """

    values: Mapping[str, object]
    spell: Callable[[KeyPath], str]
    file: Path | None = None


@dataclass(frozen=True)
class OptionSource(OptionPlace):
    """A place that a job's config is built from."""

    settings: PydanticBaseSettingsSource = field(kw_only=True)


@dataclass(frozen=True)
class TypedLine:
    """A command line that has been read: its options, and the two flags that every job has."""

    source: OptionSource
    config_file: Path | None
    as_json: bool


def command_line(job: type[BaseSettings], command: str, args: Sequence[str]) -> TypedLine:
    """Read ``args`` by the options of ``job``. Raises ``UserError`` for an option it does not have."""
    parser = _OneLineParser(
        prog=f"ldm {command}",
        description=inspect.getdoc(job),
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    cli = CliSettingsSource[argparse.ArgumentParser](
        job,
        root_parser=parser,
        cli_avoid_json=True,
        cli_hide_none_type=True,
        cli_implicit_flags=True,
        cli_kebab_case=True,
        cli_parse_none_str=NONE_TEXT,
        add_argument_method=_add_argument,
    )
    common = parser.add_argument_group("options of every job")
    # A colon cannot stand in the name of a config's field, so these two meet none.
    common.add_argument("--config", dest=":config", metavar="FILE", type=Path, help="YAML file with options")
    common.add_argument(
        "--json", dest=":json", action="store_true", help="print the result as one last line of JSON"
    )
    found, unknown = parser.parse_known_intermixed_args(args)
    if unknown:
        raise _unknown_argument(unknown, parser)
    options = vars(found)
    config_file, as_json = options.pop(":config"), options.pop(":json")
    settings = _parsed(lambda: cli(parsed_args=options), "command line")
    spell = _positional_or_flag({action.dest for action in parser._get_positional_actions()})
    values = _parsed(settings, "command line")
    return TypedLine(OptionSource(values, spell, settings=settings), config_file, as_json)


def environment(job: type[BaseSettings], command: str) -> OptionSource:
    """Options in environment variables. Raises ``UserError`` for a variable that names no option."""
    prefix = environment_name(command, ())
    for name in sorted(os.environ):
        field = name[len(prefix) :].split("__")[0].lower()
        if name.upper().startswith(prefix) and field not in job.model_fields:
            hint = nearest(field, job.model_fields, lambda field: environment_name(command, (field,)))
            raise UserError(f"environment variable {name} sets no option", do=hint)
    settings = EnvSettingsSource(
        job, env_prefix=prefix, env_nested_delimiter="__", env_parse_none_str=NONE_TEXT
    )
    values = _parsed(settings, "environment")
    return OptionSource(values, lambda path: environment_name(command, path), settings=settings)


def environment_name(command: str, path: KeyPath) -> str:
    """Name of the variable for a key: ``("pool", "max_size")`` of encode is LDM_ENCODE__POOL__MAX_SIZE."""
    job = command.upper().replace("-", "_").replace(" ", "_")
    return f"LDM_{job}__" + "__".join(part.upper() for part in path)


def yaml_file(job: type[BaseSettings], path: Path) -> OptionSource:
    """Options in a YAML file. Raises ``UserError`` if there is no such file, or no mapping in it."""
    values = read_mapping(path, f"--config {path}")
    return OptionSource(values, ".".join, path, settings=InitSettingsSource(job, values))


def read_mapping(path: Path, what: str) -> dict[str, Any]:
    """A YAML file of keys and values; what: how an error names a file that cannot be read."""
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise UserError(f"cannot read {what}: {reason}", do="give a YAML file") from error
    except yaml.YAMLError as error:
        # The text of the error quotes the file, which may hold a secret: only its place is told.
        mark = getattr(error, "problem_mark", None)
        place = f" at line {mark.line + 1}, column {mark.column + 1}" if mark else ""
        raise UserError(f"{path} is not valid YAML{place}", do="correct the file") from error
    if values is None:
        return {}
    if not isinstance(values, dict) or not all(isinstance(key, str) for key in values):
        raise UserError(f"{path} holds no options", allowed="a mapping of option names to values")
    return values


def _parsed(read: Callable[[], Parsed], place: str) -> Parsed:
    """Call ``read``; what pydantic-settings cannot parse becomes a ``UserError``."""
    try:
        return read()
    except SettingsError as error:
        raise UserError(f"{place}: {error}", do="write lists and mappings as JSON") from error


def _positional_or_flag(positional: set[str]) -> Callable[[KeyPath], str]:
    def spell(path: KeyPath) -> str:
        name = ".".join(path).replace("_", "-")
        return name.upper() if path and path[0] in positional else f"--{name}"

    return spell


def _add_argument(container: argparse.ArgumentParser, *names: str, **options: Any) -> argparse.Action:
    # A positional may also come from the environment or the YAML file: whether one is missing is
    # known only when all places have been read, so argparse must not insist on it.
    if not names[0].startswith("-"):
        options["nargs"] = "*" if options.get("nargs") in ("*", "+") else "?"
    # pydantic-settings 2.15, the last for Python 3.10, takes `--sizes 64,96` for lists but not for tuples.
    elif str(options.get("metavar")).startswith("tuple["):
        options["action"] = "append"
    return argparse.ArgumentParser.add_argument(container, *names, **options)


def _unknown_argument(unknown: Sequence[str], parser: argparse.ArgumentParser) -> UserError:
    flag = next((argument for argument in unknown if argument.startswith("-")), None)
    if flag is None:
        return UserError(f"unexpected argument '{unknown[0]}'", do=f"see {parser.prog} --help")
    typed = flag.split("=")[0]
    return UserError(f"unknown option '{typed}'", do=nearest(typed, parser._option_string_actions))


def nearest(name: str, known: Iterable[str], spell: Callable[[str], str] = str) -> str:
    """What to do about an unknown ``name``: the one of ``known`` it may have meant, or all of them.

    ``spell`` says how a name is written where ``name`` was found.
    """
    candidates = list(known)
    close = get_close_matches(name, candidates, n=1, cutoff=0.5)
    if close:
        return f"did you mean '{spell(close[0])}'?"
    return f"allowed: {', '.join(spell(candidate) for candidate in candidates)}"


class _OneLineParser(argparse.ArgumentParser):
    """Reports a mistake by raising ``UserError`` instead of printing the usage and leaving."""

    def error(self, message: str) -> NoReturn:
        raise UserError(message, do=f"see {self.prog} --help")
