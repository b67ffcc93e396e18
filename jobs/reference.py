"""The reference of every option, written from the config models: ``python -m jobs.reference FILE``.

All of it comes from the models' JSON schema, so that a key, its bounds and its description cannot differ from
what a command takes. `make docs` writes docs/reference.md, and a test compares.
"""

import inspect
import json
import re
import sys
from collections import Counter
from importlib import import_module
from pathlib import Path
from typing import Any

from pydantic import BaseModel
from pydantic.json_schema import models_json_schema
from pydantic_settings import CliPositionalArg

from jobs.cli import COMMANDS
from jobs.config import JobConfig, job_class
from pipelines.serve.config import ServeConfig

__all__ = ["reference"]

Schema = dict[str, Any]
REF = "#/$defs/"
# Defaults that are those of the machine which the command runs on: (command, key) → what to print.
OF_THE_MACHINE = {
    ("demo", "cluster.num_cpus"): "the machine's CPUs, at least 4",
    ("bench encode", "threads"): "the machine's CPUs",
    ("bench train", "threads"): "the machine's CPUs less one",
    ("bench tiling", "threads"): "the machine's CPUs",
    ("evaluate by-f", "threads"): "the machine's CPUs",
    ("savings", "threads"): "the machine's CPUs",
}
NAMES = {
    "integer": "int",
    "number": "float",
    "string": "str",
    "boolean": "bool",
    "null": "null",
    "object": "mapping",
}
BOUNDS = {"minimum": "≥", "exclusiveMinimum": ">", "maximum": "≤", "exclusiveMaximum": "<"}
COUNTS = {
    "minItems": "at least {} values",
    "maxItems": "at most {} values",
    "minProperties": "at least {} entries",
    "minLength": "at least {} characters",
    "maxLength": "at most {} characters",
}
POSITIONAL = CliPositionalArg[str].__metadata__[0]  # type: ignore[attr-defined]  # an Annotated
HEAD = """\
<!-- Written by `make docs` from the config models; do not edit. -->
# Reference: every command and every key

A key `max_size` of the group `encoder` is written

| where | how |
|---|---|
| on the command line | `ldm encode … --encoder.max-size 4` |
| in the environment | `LDM_ENCODE__ENCODER__MAX_SIZE=4` |
| in the YAML file of `--config` | `encoder: {max_size: 4}` |

and the first of these counts that says something. Lists are written `64,256` on the command line and in
YAML as lists, `null` is no value, and a key without a default must be given. Names in capitals are given
by their place. `--config FILE` and `--json` (the result as one last line of JSON) belong to every
command. A key whose type is a link is a group; beside it stand the defaults in which it differs from the
group's own.
"""


def reference() -> str:
    """The page, with a line end at its end; the same on every machine."""
    jobs = {command: job_class(import_module(module)) for command, (module, _) in COMMANDS.items()}
    models: list[type[BaseModel]] = [*jobs.values(), ServeConfig]
    refs, schema = models_json_schema([(model, "validation") for model in models])
    page = _Page(schema["$defs"])
    for model in models:
        page.names.pop(_target(refs[model, "validation"]), None)
    parts = [HEAD, "## Commands\n"]
    for command, job in jobs.items():
        parts.append(_command(page, command, job, page.defs[_target(refs[job, "validation"])]))
    served = page.defs[_target(refs[ServeConfig, "validation"])]
    parts += [
        "## `args` of cluster/serve.yaml\n",
        "What `serve deploy` takes, and `ldm serve` makes of its options.\n",
        page.table(served),
        "## Groups\n",
    ]
    for target, name in sorted(page.names.items(), key=lambda item: item[1].lower()):
        group = page.defs[target]
        parts += [f"### {name}\n", *_said(group.get("description", "")), page.table(group)]
    return "\n".join(parts).rstrip("\n") + "\n"


def _command(page: "_Page", command: str, job: type[JobConfig], schema: Schema) -> str:
    places = [name for name, field in job.model_fields.items() if POSITIONAL in field.metadata]
    line = " ".join(["ldm", command, *(_capitals(name) for name in places)])
    table = page.table(schema, command, places)
    return "\n".join(
        [f"### ldm {command}\n", *_said(inspect.getdoc(job) or ""), f"    {line} [options]\n", table]
    )


class _Page:
    """What a table needs of the others: definitions, and the headings of those that are groups."""

    def __init__(self, defs: dict[str, Schema]) -> None:
        self.defs = defs
        targets = [target for target, schema in defs.items() if "properties" in schema]
        short = {target: target.rpartition("__")[2] for target in targets}
        count = Counter(short.values())
        self.names = {target: name if count[name] == 1 else target for target, name in short.items()}

    def table(self, schema: Schema, command: str = "", places: list[str] | None = None) -> str:
        """A row for each key; places: those that are given without their name."""
        required = schema.get("required", [])
        rows = ["| key | type | allowed | default | what it is |", "|---|---|---|---|---|"]
        for key, field in schema["properties"].items():
            name = _capitals(key) if key in (places or []) else key
            default = "**required**" if key in required else self._default(field, command, key)
            said = _one_line(field.get("description", ""))
            cells = (f"`{name}`", self._type(field), self._allowed(field), default, said)
            rows.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
        return "\n".join(rows) + "\n"

    def _type(self, field: Schema) -> str:
        if "$ref" in field:
            target = _target(field)
            name = self.names.get(target)
            return f"[{name}](#{name.lower()})" if name else self._type(self.defs[target])
        if "anyOf" in field:
            return " or ".join(self._type(each) for each in field["anyOf"])
        kind = field.get("type", "")
        if kind == "array":
            values = field.get("prefixItems") or [field["items"]]
            return f"{len(values) if 'prefixItems' in field else 'list of'} {self._type(values[0])}"
        if kind == "object" and isinstance(field.get("additionalProperties"), dict):
            return f"mapping of str to {self._type(field['additionalProperties'])}"
        return "path" if field.get("format") == "path" else NAMES[kind]

    def _allowed(self, field: Schema) -> str:
        if "$ref" in field:
            target = self.defs[_target(field)]
            return "" if "properties" in target else self._allowed(target)
        if "const" in field or "enum" in field:
            return ", ".join(f"`{value}`" for value in field.get("enum", [field.get("const")]))
        inner = [self._allowed(each) for each in field.get("anyOf", [])]
        if field.get("type") == "array":
            values = field.get("prefixItems") or [field["items"]]
            inner.append(self._allowed(values[0]))
            if "prefixItems" in field:
                return inner[0]
        bounds = [f"{sign} {field[name]:g}" for name, sign in BOUNDS.items() if name in field]
        bounds += [text.format(field[name]) for name, text in COUNTS.items() if name in field]
        bounds += [f"`{field['pattern']}`"] if "pattern" in field else []
        return ", ".join(dict.fromkeys(text for text in (*inner, *bounds) if text))

    def _default(self, field: Schema, command: str, key: str) -> str:
        default = field.get("default")
        said = OF_THE_MACHINE.get((command, key))
        if said:
            return said
        if "$ref" not in field or not isinstance(default, dict):
            return f"`{_yaml(default)}`"
        lines = []
        for path, value in self._differences(_target(field), default):
            said = OF_THE_MACHINE.get((command, f"{key}.{path}"), f"`{_yaml(value)}`")
            lines.append(f"`{path}`: {said}")
        return ", ".join(lines)

    def _differences(self, target: str, values: Schema) -> list[tuple[str, object]]:
        """Paths at which ``values`` are not the group's own defaults."""
        found: list[tuple[str, object]] = []
        for key, field in self.defs[target]["properties"].items():
            value = values.get(key)
            if "$ref" in field and isinstance(value, dict):
                own = field.get("default")
                if value != own:
                    found += [
                        (f"{key}.{path}", inner) for path, inner in self._differences(_target(field), value)
                    ]
            elif value != field.get("default"):
                found.append((key, value))
        return found


def _target(field: Schema) -> str:
    return str(field["$ref"]).removeprefix(REF)


def _capitals(key: str) -> str:
    return key.upper().replace("_", "-")


def _yaml(value: object) -> str:
    return value if isinstance(value, str) and value else json.dumps(value, ensure_ascii=False)


def _one_line(text: str) -> str:
    return " ".join(_markdown(text).split())


def _said(text: str) -> list[str]:
    """A docstring as paragraphs; nothing where there is none."""
    return [_markdown(inspect.cleandoc(text)) + "\n"] if text else []


def _markdown(text: str) -> str:
    """Docstrings have code in double backticks, and sizes that Markdown would take for tags."""
    return re.sub(r"<(\w+)>", r"`<\1>`", text.replace("``", "`"))


if __name__ == "__main__":
    Path(sys.argv[1]).write_text(reference(), encoding="utf-8")
