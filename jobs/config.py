"""What a job's config model is, and how its values are found.

Highest priority first: the command line, environment variables (``LDM_ENCODE__POOL__MAX_SIZE``),
the YAML file of ``--config``, the model's defaults. A config built in code takes none of these: it
holds what the code gives it and defaults.
"""

import os
from abc import abstractmethod
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType
from typing import TypeVar

import yaml
from pydantic import BaseModel, ConfigDict, ValidationError
from pydantic_settings import BaseSettings, PydanticBaseSettingsSource, SettingsConfigDict
from pydantic_settings.sources import DefaultSettingsSource

from jobs.option_errors import explained
from jobs.option_sources import OptionSource, command_line, environment, yaml_file

__all__ = ["JobConfig", "Section", "build", "job_class", "load", "resolved", "save_resolved"]


class Section(BaseModel):
    """A group of options inside a job's config, such as ``pool`` in ``--pool.max-size``."""

    model_config = ConfigDict(frozen=True, extra="forbid")


class JobConfig(BaseSettings):
    """Options of one job. The docstring of a subclass is its ``--help``; ``run`` does the work."""

    model_config = SettingsConfigDict(frozen=True, extra="forbid")

    @abstractmethod
    def run(self) -> dict[str, object]:
        """Do the job and return its result as plain values, which ``--json`` prints as one line.

        Raises ``ldm.errors.UserError`` for a mistake that the user can put right.
        """

    @classmethod
    def settings_customise_sources(
        cls,
        settings_cls: type[BaseSettings],
        init_settings: PydanticBaseSettingsSource,
        env_settings: PydanticBaseSettingsSource,
        dotenv_settings: PydanticBaseSettingsSource,
        file_secret_settings: PydanticBaseSettingsSource,
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        """Only what the code gives: `load` is the one place that reads the environment."""
        return (init_settings,)


Job = TypeVar("Job", bound=JobConfig)


def job_class(module: ModuleType) -> type[JobConfig]:
    """The one subclass of `JobConfig` that ``module`` defines.

    Raises ValueError if there is none, or more than one.
    """
    found = [
        value
        for value in vars(module).values()
        if isinstance(value, type) and issubclass(value, JobConfig) and value.__module__ == module.__name__
    ]
    if len(found) != 1:
        raise ValueError(f"{module.__name__} defines {len(found)} job configs, expected exactly 1")
    return found[0]


def load(job: type[Job], command: str, args: Sequence[str]) -> tuple[Job, bool]:
    """Build a ``job`` from ``args`` (what follows ``ldm COMMAND``), environment and YAML file.

    Returns the config and whether ``--json`` was given. Raises ``UserError`` for a value or key
    that is not allowed; leaves through ``SystemExit(0)`` after ``--help``.
    """
    typed = command_line(job, command, args)
    sources = [typed.source, environment(job, command)]
    if typed.config_file is not None:
        sources.append(yaml_file(job, typed.config_file))
    return build(job, sources), typed.as_json


def build(job: type[Job], sources: Sequence[OptionSource]) -> Job:
    """A ``job`` from places with options, highest priority first, and its defaults. Raises ``UserError``."""
    # Without this last one `--pool.max-size 4` would lose what the model sets for `pool.min_size`.
    defaults = DefaultSettingsSource(job, nested_model_default_partial_update=True)
    try:
        return job(_build_sources=((*(source.settings for source in sources), defaults), {}))
    except ValidationError as error:
        raise explained(error, job, sources) from error


def resolved(config: BaseModel) -> str:
    """Every option of ``config``, defaults included, as YAML for ``--config``; secrets are masked."""
    return yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False, allow_unicode=True)


def save_resolved(config: BaseModel, path: str | os.PathLike[str]) -> None:
    """Write `resolved` in one step: a reader sees the old file or the whole new one."""
    target = Path(path)
    text = resolved(config)
    target.parent.mkdir(parents=True, exist_ok=True)
    part = target.with_name(f".{target.name}.{os.getpid()}.part")
    part.write_text(text, encoding="utf-8")
    part.replace(target)
