"""What was made of what: run records joined by fingerprints, and compared with what lies there now."""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Literal

from jobs.artifacts import identify, identify_vae
from jobs.run_record import Artifact, RunRecord, read_records
from ldm.errors import LdmError

__all__ = ["SHORT", "Lineage", "State"]

State = Literal["as it was", "changed since", "gone"]
SHORT = 12
# A checkpoint of a checkpoint of …: no more steps back than this.
MAX_STEPS = 100


@dataclass
class Lineage:
    """Runs by their start, those upstream included that wrote what they read."""

    runs: Sequence[RunRecord]
    _now: dict[tuple[str, str], Artifact | None] = field(default_factory=dict)

    @classmethod
    def of(cls, records: Iterable[RunRecord]) -> "Lineage":
        """``records``, and the runs whose records are beside their inputs, and so on."""
        found = {record.run: record for record in records}
        asked: set[str] = set()
        for _ in range(MAX_STEPS):
            urls = {artifact.url for record in found.values() for artifact in record.inputs} - asked
            urls -= {url for url in urls if "***" in url}  # as the record has it, nobody can read it
            if not urls:
                break
            asked |= urls
            found |= {record.run: record for url in urls for record in read_records(url)}
        return cls(sorted(found.values(), key=lambda record: (record.started, record.run)))

    def roots(self) -> list[Artifact]:
        """What runs read first, and no run made."""
        made = {_key(artifact) for run in self.runs for artifact in run.outputs}
        firsts = {_key(run.inputs[0]): run.inputs[0] for run in self.runs if run.inputs}
        return [artifact for key, artifact in firsts.items() if key not in made]

    def runs_on(self, artifact: Artifact) -> list[RunRecord]:
        """Those that read it first."""
        return [run for run in self.runs if run.inputs and _key(run.inputs[0]) == _key(artifact)]

    def runs_on_nothing(self) -> list[RunRecord]:
        """Those whose inputs nobody knows."""
        return [run for run in self.runs if not run.inputs]

    def now(self, artifact: Artifact) -> Artifact | None:
        """What lies where the artifact was; None where nothing does, or nothing that can be read."""
        place = (artifact.kind, artifact.url)
        if place not in self._now:
            try:
                found = identify_vae(artifact.url) if artifact.kind == "vae" else identify(artifact.url)
            except (LdmError, OSError, ValueError, KeyError, TypeError):
                found = None
            self._now[place] = found
        return self._now[place]

    def state(self, artifact: Artifact) -> State:
        """Of what lies there now, beside what the run saw."""
        found = self.now(artifact)
        if found is None:
            return "gone"
        return "as it was" if _key(found) == _key(artifact) else "changed since"

    def findings(self) -> list[str]:
        """Contradictions: an output's last run and what lies there; a file and the run that it is of."""
        return [*self._changed(), *(said for run in self.runs for said in self._contradictions(run))]

    def as_json(self) -> list[dict[str, object]]:
        """A run each."""

        def told(artifacts: Sequence[Artifact]) -> list[dict[str, object]]:
            return [{**artifact.model_dump(), "now": self.state(artifact)} for artifact in artifacts]

        return [
            {
                "run": run.run,
                "command": run.command,
                "status": run.shown_status,
                "inputs": told(run.inputs),
                "outputs": told(run.outputs),
            }
            for run in self.runs
        ]

    def _changed(self) -> Iterator[str]:
        last = {artifact.url: (run, artifact) for run in self.runs for artifact in run.outputs}
        running = {run.output for run in self.runs if run.shown_status == "running"}
        for url, (run, artifact) in last.items():
            if url not in running and self.state(artifact) == "changed since":
                yield f"{_told(artifact)} is not what its last run {run.run} ({run.command}) left"

    def _contradictions(self, run: RunRecord) -> Iterator[str]:
        """Of what the run left, as far as it is still there."""
        read = {artifact.kind: artifact for artifact in run.inputs}
        for artifact in run.outputs:
            found = self.now(artifact)
            if found is None or _key(found) != _key(artifact):
                continue
            for kind, fingerprint in found.made_of.items():
                said = f"{_told(artifact)} says that it is of {kind} {fingerprint[:SHORT]}"
                if kind in read and read[kind].fingerprint != fingerprint:
                    yield f"{said}; run {run.run} ({run.command}) read {read[kind].fingerprint[:SHORT]}"
                for source in run.inputs:
                    of = source.made_of.get(kind)
                    if of is not None and of != fingerprint:
                        yield f"{said}; {_told(source)}, which it was made from, is of {of[:SHORT]}"


def _key(artifact: Artifact) -> tuple[str, str]:
    return artifact.kind, artifact.fingerprint


def _told(artifact: Artifact) -> str:
    return f"{artifact.kind} {artifact.url}"
