"""A chain: jobs in order, each with the record by which it is known to be complete."""

from collections.abc import Mapping
from pathlib import Path

from pydantic import Field, field_validator, model_validator

from jobs.config import JobConfig, Section
from jobs.job_file import JobFile, read_model

__all__ = ["ChainFile", "Stage", "read_chain"]

# command → what it writes last, in terms of its options. Of a folder that appears in one step, the folder.
RECORDS: Mapping[str, str] = {
    "shards": "{out}",
    "encode": "{output}/stats.json",
    "train": "{out}/ldm.json",
    "train-vae": "{out}/metrics.json",
    "generate": "{out}/generate.yaml",
    "evaluate recon": "{page}",
    "evaluate by-f": "{page}",
    "evaluate samples": "{page}",
}
# These refuse an output that is there, so one that was begun and has an output must not run again.
PUBLISHED_WHOLE = ("shards",)
# command → its option that is an input of images, whose files may change between two runs of a chain.
INPUTS: Mapping[str, str] = {
    "encode": "input",
    "train-vae": "input",
    "evaluate recon": "input",
    "evaluate by-f": "input",
    "evaluate samples": "reference",
}
ENDLESS = "serve"


class Stage(JobFile):
    """A job of a chain."""

    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_.-]*$", description="names its record, too")
    done_when: tuple[str, ...] = Field(
        (), description="files or folders that it writes last; by default what ldm COMMAND is known to"
    )

    @model_validator(mode="after")
    def _has_a_record(self) -> "Stage":
        if not self.done_when and self.command not in (*RECORDS, ENDLESS):
            raise ValueError(
                f"stage {self.name}: no record of 'ldm {self.command}' is known; "
                "give done_when: [a file or folder that it writes last]"
            )
        return self

    @field_validator("done_when", mode="before")
    @classmethod
    def _one_or_more(cls, value: object) -> object:
        return (value,) if isinstance(value, str) else value

    @property
    def is_endless(self) -> bool:
        """Whether it runs until it is stopped."""
        return self.command == ENDLESS

    def records(self, config: JobConfig) -> tuple[str, ...]:
        """What is there once the stage, whose config that is, is complete."""
        if self.done_when or self.is_endless:
            return self.done_when
        # As given: Path makes s3:/ of s3://.
        values = {name: getattr(config, name) for name in type(config).model_fields} | self.options
        named = {
            name: value.rstrip("/") if isinstance(value, str) else value for name, value in values.items()
        }
        return (RECORDS[self.command].format(**named),)


class ChainFile(Section):
    """Stages in order, and the folder where their completion is recorded."""

    state: str = Field(description="folder or URL for the records of this chain, one for each stage")
    stages: tuple[Stage, ...] = Field(min_length=1)

    @model_validator(mode="after")
    def _check_order(self) -> "ChainFile":
        names = [stage.name for stage in self.stages]
        if twice := sorted({name for name in names if names.count(name) > 1}):
            raise ValueError(f"two stages are named {twice[0]!r}")
        if endless := [stage.name for stage in self.stages[:-1] if stage.is_endless]:
            raise ValueError(f"stage {endless[0]} runs until it is stopped: only the last stage may")
        return self

    def check(self, file: Path, *, on_cluster: bool) -> list[JobConfig]:
        """Every stage's config; UserError where one would be refused, or a variable is not set."""
        configs = []
        for index, stage in enumerate(self.stages):
            configs.append(stage.check(file, ("stages", str(index)), on_cluster=on_cluster))
            stage.runtime_env()
        return configs


def read_chain(path: Path) -> ChainFile:
    """A chain's YAML file. UserError where it is none."""
    return read_model(ChainFile, path)
