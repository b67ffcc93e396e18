"""Whether a stage of a chain is complete: its record says of what, and its output is still that.

STATE/<stage>.json    what the stage was begun with; once it has ended well, what it left
"""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass

from fsspec import AbstractFileSystem
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from jobs.artifacts import file_sha256, listing_sha256
from jobs.chain_file import INPUTS, PUBLISHED_WHOLE, Stage
from jobs.config import JobConfig
from ldm.errors import LdmError, UserError
from pipelines.publish import publish

__all__ = ["StageRecord", "StageRecords", "fingerprint", "stage_digest"]


class StageRecord(BaseModel):
    """``digest``: of command, options, inputs; ``left``: path → fingerprint, empty until it is complete."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    stage: str
    digest: str
    left: dict[str, str] = Field({})


@dataclass(frozen=True)
class StageRecords:
    """The records of a chain."""

    filesystem: AbstractFileSystem
    root: str

    def read(self, stage: Stage) -> StageRecord | None:
        """None where the stage was never begun. UserError where the record is damaged."""
        path = self._path(stage)
        try:
            return StageRecord.model_validate_json(self.filesystem.cat_file(path))
        except FileNotFoundError:
            return None
        except ValidationError as error:
            raise UserError(f"{path} is no record of a stage", do="remove it to run the stage") from error

    def left_by(self, stage: Stage, digest: str) -> list[str] | None:
        """Fingerprints of what the stage left; None unless it ended well with this digest and they hold."""
        record = self.read(stage)
        if record is None or record.digest != digest or not record.left:
            return None
        holds = all(fingerprint(path) == found for path, found in record.left.items())
        return list(record.left.values()) if holds else None

    def was_published(self, stage: Stage, digest: str, paths: Sequence[str]) -> bool:
        """Whether what appears in one step was begun with this digest and is there: then it is done."""
        record = self.read(stage)
        is_begun = record is not None and record.digest == digest and not record.left
        return is_begun and stage.command in PUBLISHED_WHOLE and all(fingerprint(path) for path in paths)

    def begin(self, stage: Stage, digest: str, paths: Sequence[str]) -> None:
        """Record that the stage is about to run.

        Not where what appears in one step is there before: then it is not this stage's, which will refuse it.
        """
        if stage.command in PUBLISHED_WHOLE and any(fingerprint(path) for path in paths):
            return
        self._write(stage, StageRecord(stage=stage.name, digest=digest))

    def complete(self, stage: Stage, digest: str, paths: Sequence[str]) -> list[str]:
        """Record that it ended well; fingerprints of what it left. LdmError for what is not there."""
        left = {path: fingerprint(path) for path in paths}
        if missing := [path for path, found in left.items() if not found]:
            raise LdmError(f"stage {stage.name} ended well and left no {missing[0]}: see its done_when")
        self._write(stage, StageRecord(stage=stage.name, digest=digest, left=left))
        return list(left.values())

    def _write(self, stage: Stage, record: StageRecord) -> None:
        data = f"{record.model_dump_json(indent=1)}\n".encode()
        publish(self.filesystem, self._path(stage), data)

    def _path(self, stage: Stage) -> str:
        return f"{self.root}/{stage.name}.json"


def stage_digest(stage: Stage, config: JobConfig, before: Sequence[str]) -> str:
    """Changes with the command, its options, the images that it reads, and what the stages before it left."""
    content = [stage.command, stage.options, _input_version(stage, config), list(before)]
    return hashlib.sha256(json.dumps(content, sort_keys=True, default=str).encode()).hexdigest()


def fingerprint(url: str) -> str:
    """SHA-256 of a file, or of the names and sizes in a folder; empty for what is not there, or empty.

    Records of runs are no part of an output: what is done stays done when one appears.
    """
    from ldm import storage

    filesystem, path = storage.filesystem(url)
    filesystem.invalidate_cache()
    if filesystem.isfile(path):
        return file_sha256(filesystem, path)
    return listing_sha256(filesystem, path)


def _input_version(stage: Stage, config: JobConfig) -> str:
    """Of the shards of an input: another one when a shard is added or edited."""
    from pipelines.shards import InputConfig, list_shards
    from pipelines.shards.shard import version_of_all

    if stage.command not in INPUTS:
        return ""
    read = getattr(config, "read", InputConfig())
    shards = list_shards(getattr(config, INPUTS[stage.command]), read)
    return version_of_all(part for shard in shards for part in (shard.url, shard.version))
