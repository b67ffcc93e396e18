"""A job as a YAML file describes it: which ``ldm`` command, with which options, on what of a cluster."""

import os
import re
from collections.abc import Callable, Mapping, Sequence
from importlib import import_module
from pathlib import Path
from typing import Any, TypeVar

import yaml
from pydantic import (
    Field,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    ValidationError,
    field_validator,
    model_validator,
)
from pydantic_settings import InitSettingsSource

from jobs.cli import COMMANDS, unknown_command
from jobs.config import JobConfig, Section, build, job_class
from jobs.option_errors import explained
from jobs.option_sources import KeyPath, OptionPlace, OptionSource, read_mapping
from ldm.errors import UserError

__all__ = ["EntrypointResources", "JobFile", "command_line", "read_job", "read_model", "secrets"]

# Commands that are about jobs, and start nothing that a cluster could run.
NOT_JOBS = ("plan", "submit", "jobs list", "jobs logs", "jobs stop", "chain", "cluster up")
# Options of type str that are paths or URLs; those of type Path are known by it.
PATH_NAMES = ("input", "output", "dataset", "reference")
# No line of the options can be this: each has a colon, or is indented.
END_OF_OPTIONS = "END_OF_OPTIONS"
Model = TypeVar("Model", bound=Section)


class EntrypointResources(Section):
    """What the command's own process takes. Its actors and workers have options of their own.

    With none of them Ray starts it on the head node.
    """

    num_cpus: NonNegativeFloat = 0
    num_gpus: NonNegativeFloat = 0
    memory_bytes: NonNegativeInt = 0
    custom: dict[str, PositiveFloat] = Field({}, description="resources that nodes were started with")


class JobFile(Section):
    """One job. ``options`` has the keys of ``ldm COMMAND --config FILE``."""

    command: str
    options: dict[str, Any] = Field({}, description="of the command")
    resources: EntrypointResources = EntrypointResources()
    env: tuple[str, ...] = Field((), description="names of environment variables to pass on: secrets")
    working_dir: Path | None = Field(None, description="folder that goes with the job and is where it runs")
    excludes: tuple[str, ...] = Field(
        (), description="of working_dir, as in .gitignore, beside what that has"
    )
    image: str | None = Field(None, description="container image that the job runs in instead")

    @field_validator("command")
    @classmethod
    def _is_a_job(cls, command: str) -> str:
        jobs = [known for known in COMMANDS if known not in NOT_JOBS]
        if command not in jobs:
            raise ValueError(unknown_command(command, jobs))
        return command

    @field_validator("env")
    @classmethod
    def _are_names(cls, names: tuple[str, ...]) -> tuple[str, ...]:
        # What is not a name may be a secret: it is not shown.
        if not all(re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]*", name) for name in names):
            raise ValueError("names of variables are allowed, without values; set those where you submit")
        return names

    @model_validator(mode="after")
    def _one_place_to_run(self) -> "JobFile":
        if self.working_dir is not None and self.image is not None:
            raise ValueError("working_dir and image exclude each other: put the files into the image")
        if self.excludes and self.working_dir is None:
            raise ValueError("excludes needs working_dir, the folder that they are left out of")
        return self

    def check(self, file: Path, prefix: KeyPath = (), *, on_cluster: bool) -> JobConfig:
        """The config that the command will have; UserError where it would refuse the options.

        file, prefix: where the job stands, for messages. on_cluster: as it will be there, where a
        relative path means nothing unless it is in working_dir.
        """
        model = job_class(import_module(COMMANDS[self.command][0]))
        values = self.options_there(model) if on_cluster else self.options
        spell = _dotted((*prefix, "options"))
        config = build(model, [OptionSource(values, spell, file, settings=InitSettingsSource(model, values))])
        if on_cluster:
            for name, value in _paths(config, values):
                self._check_path(f"{spell((name,))} in {file}", value)
        return config

    def options_there(self, model: type[JobConfig] | None = None) -> dict[str, Any]:
        """The options as the cluster gets them: the job joins the cluster that it runs on."""
        model = model or job_class(import_module(COMMANDS[self.command][0]))
        cluster = self.options.get("cluster", {})
        if "cluster" not in model.model_fields or not isinstance(cluster, Mapping):
            return self.options
        if cluster.get("address", "auto") != "auto":
            raise UserError(
                f"options.cluster.address is {cluster['address']!r} in a job that is submitted",
                do="leave it out: a job joins the cluster that it runs on",
            )
        return {**self.options, "cluster": {**cluster, "address": "auto"}}

    def runtime_env(self) -> dict[str, Any]:
        """What Ray makes of working_dir, env and image. Holds secrets: never print it."""
        there: dict[str, Any] = {"env_vars": secrets(self.env)} if self.env else {}
        if self.working_dir is not None:
            there |= {"working_dir": str(self.working_dir.absolute()), "excludes": list(self.excludes)}
        if self.image is not None:
            there["image_uri"] = self.image
        return there

    def _check_path(self, where: str, value: str) -> None:
        if "://" in value or Path(value).is_absolute():
            return
        if self.working_dir is not None and (self.working_dir / value).exists():
            return
        raise UserError(
            f"{where} is {value!r}, a path in a folder that ends with the job",
            allowed="an absolute path that every node sees, a URL, or what is in working_dir",
        )


def read_job(path: Path) -> JobFile:
    """A job's YAML file. UserError where it is none, or a key is unknown."""
    return read_model(JobFile, path)


def read_model(model: type[Model], path: Path) -> Model:
    """A YAML file as a ``model``. UserError, which never quotes the file beyond a single value."""
    values = read_mapping(path, str(path))
    try:
        return model.model_validate(values)
    except ValidationError as error:
        raise explained(error, model, [OptionPlace(values, ".".join, path)]) from error


def secrets(names: Sequence[str]) -> dict[str, str]:
    """The variables of these names here; UserError where one is not set, or empty."""
    missing = [name for name in names if not os.environ.get(name)]
    if missing:
        raise UserError(
            f"environment variable {', '.join(missing)} is not set",
            do="set it where you submit, or take its name out of env",
        )
    return {name: os.environ[name] for name in names}


def command_line(command: str, options: Mapping[str, Any]) -> str:
    """The shell's line that runs a job: its options come on standard input, so that no file is needed.

    `python -m jobs.cli` is `ldm`; it is found in a working_dir that is a working tree, too. `exec`: what
    is stopped, and whose exit status counts, is the command and no shell around it.
    """
    text = yaml.safe_dump(dict(options), sort_keys=False, allow_unicode=True)
    start = f"exec python -m jobs.cli {command} --config /dev/stdin"
    return f"{start} <<'{END_OF_OPTIONS}'\n{text}{END_OF_OPTIONS}\n"


def _dotted(prefix: KeyPath) -> Callable[[KeyPath], str]:
    return lambda path: ".".join((*prefix, *path))


def _paths(config: JobConfig, values: Mapping[str, Any]) -> list[tuple[str, str]]:
    """(name, path) of the options that are paths; as given, because Path makes s3:/ of s3://."""
    found = [(name, getattr(config, name)) for name in type(config).model_fields]
    return [
        (name, str(values.get(name, value)))
        for name, value in found
        if isinstance(value, Path) or (name in PATH_NAMES and isinstance(value, str))
    ]
