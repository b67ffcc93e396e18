"""``ldm runs``: the records of runs: listed, compared, and followed from image shards to what is served."""

from pydantic import Field, model_validator
from pydantic_settings import CliPositionalArg

from jobs.config import JobConfig
from jobs.run_record import RunRecord, read_records
from ldm.errors import LdmError, UserError

__all__ = ["BrokenLineageError", "RunsJob"]


class BrokenLineageError(LdmError):
    """What lies there says something else than the records of its runs."""


class RunsJob(JobConfig):
    """List the runs that wrote FOLDERS, or the outputs in them, oldest first.

    A run's record is in OUTPUT.runs, beside what it wrote. With --lineage follow them from images to the
    model that is served, and compare with what the files say now; exit status 1 where these contradict.
    """

    folders: CliPositionalArg[list[str]] = Field(description="outputs, or folders that outputs are in")
    # One text: of a list, ids that are digits alone would be read as numbers.
    compare: str | None = Field(
        None, description="A,B: two runs, by their ids or how these begin or end; show what differs"
    )
    lineage: bool = Field(False, description="show what was made of what")

    @model_validator(mode="after")
    def _one_view(self) -> "RunsJob":
        if self.compare is not None and self.compare.count(",") != 1:
            raise ValueError(f"compare is {self.compare!r}; give two runs, as A,B")
        if self.compare and self.lineage:
            raise ValueError("compare and lineage are two views; give one of them")
        return self

    def run(self) -> dict[str, object]:
        """``runs``, a record each; or ``compare``, name → [A, B]; or ``lineage`` and ``findings``."""
        from jobs.runs_view import differences, print_differences, print_runs

        records = {record.run: record for folder in self.folders for record in read_records(folder)}
        if not records:
            raise UserError(
                f"no runs are recorded beside {', '.join(self.folders)}",
                allowed="outputs of ldm commands, or folders that these are in",
            )
        if self.compare:
            pair = [_one(records, name) for name in self.compare.split(",")]
            found = differences(*pair)
            print_differences(pair, found)
            return {"compare": found}
        if self.lineage:
            return self._lineage(list(records.values()))
        ordered = sorted(records.values(), key=lambda record: (record.started, record.run))
        print_runs(ordered)
        return {"runs": [{**record.model_dump(), "status": record.shown_status} for record in ordered]}

    def _lineage(self, records: list[RunRecord]) -> dict[str, object]:
        from jobs.lineage import Lineage
        from jobs.lineage_view import print_lineage

        lineage = Lineage.of(records)
        findings = lineage.findings()
        print_lineage(lineage)
        for finding in findings:
            print(finding)
        if findings:
            raise BrokenLineageError(f"{len(findings)} findings")
        return {"lineage": lineage.as_json(), "findings": findings}


def _one(records: dict[str, RunRecord], name: str) -> RunRecord:
    found = [run for run in records if run.startswith(name) or run.endswith(name)]
    if len(found) != 1:
        raise UserError(f"{len(found)} runs have an id like {name!r}", do="see the ids with ldm runs FOLDERS")
    return records[found[0]]
