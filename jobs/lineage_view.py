"""A lineage as a tree: what was read, the runs that read it first, what they made of it, and so on."""

from rich.console import Console
from rich.text import Text
from rich.tree import Tree

from jobs.lineage import SHORT, Lineage
from jobs.run_record import Artifact, RunRecord

__all__ = ["print_lineage"]

# The terminal breaks long lines; a file has them whole.
NO_WRAP = 10_000


def print_lineage(lineage: Lineage) -> None:
    """Print it. What several runs made, or read, is followed once."""
    console, shown = Console(width=NO_WRAP), set[tuple[str, str]]()
    for artifact in lineage.roots():
        tree = Tree(_artifact(lineage, artifact))
        _add_runs(tree, lineage, artifact, shown)
        console.print(tree)
    for run in lineage.runs_on_nothing():
        tree = Tree(_run(run))
        _add_outputs(tree, lineage, run, shown)
        console.print(tree)


def _add_runs(tree: Tree, lineage: Lineage, artifact: Artifact, shown: set[tuple[str, str]]) -> None:
    key = (artifact.kind, artifact.fingerprint)
    if key in shown:
        return
    shown.add(key)
    for run in lineage.runs_on(artifact):
        _add_outputs(tree.add(_run(run)), lineage, run, shown)


def _add_outputs(tree: Tree, lineage: Lineage, run: RunRecord, shown: set[tuple[str, str]]) -> None:
    for artifact in run.outputs:
        _add_runs(tree.add(_artifact(lineage, artifact)), lineage, artifact, shown)


def _artifact(lineage: Lineage, artifact: Artifact) -> Text:
    short = artifact.fingerprint[:SHORT]
    return Text(f"{artifact.kind} {artifact.url}  {short}  {lineage.state(artifact)}")


def _run(run: RunRecord) -> Text:
    others = ", ".join(f"{each.kind} {each.url} {each.fingerprint[:SHORT]}" for each in run.inputs[1:])
    return Text(f"{run.command}  {run.run}  {run.shown_status}{f'  with {others}' if others else ''}")
