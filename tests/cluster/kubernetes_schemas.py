"""Whether Kubernetes and KubeRay would take a document: by their schemas, and unknown fields are refused."""

import json
from functools import cache
from importlib.util import find_spec
from pathlib import Path

import yaml
from jsonschema import Draft202012Validator
from referencing import Registry, Resource
from referencing.jsonschema import DRAFT202012

from tests.cluster.manifests import Object

# The oldest that cluster/kuberay/README.md allows: what it knows, newer ones know.
KUBERNETES = "1.29"
DEFINITIONS = "https://kubernetes.io/api/_definitions.json"  # as the file calls itself
KUBERAY_SCHEMA = Path(__file__).with_name("kuberay_v1.yaml")


def faults(document: Object) -> list[str]:
    """One line for each, with its place; empty if there is none. A kind that nobody knows is a KeyError."""
    group, _, version = document["apiVersion"].rpartition("/")
    if group == "ray.io":
        schema = f"urn:kuberay#/{document['kind']}"
    else:
        schema = f"{DEFINITIONS}#/$defs/{_kinds()[group, version, document['kind']]}"
    errors = Draft202012Validator({"$ref": schema}, registry=_registry()).iter_errors(document)
    return [f"{'.'.join(map(str, error.absolute_path))}: {error.message}" for error in errors]


@cache
def _definitions() -> Object:
    """Of all of Kubernetes' types, from the files of the package kubernetes-validate."""
    found = find_spec("kubernetes_validate")
    assert found is not None
    assert found.origin is not None
    (file,) = Path(found.origin).parent.glob(
        f"kubernetes-json-schema/v{KUBERNETES}*-local-strict/_definitions.json"
    )
    definitions: Object = json.loads(file.read_text())
    return definitions


@cache
def _kinds() -> dict[tuple[str, str, str], str]:
    """(group, version, kind) → name of its definition."""
    return {
        (each["group"], each["version"], each["kind"]): name
        for name, definition in _definitions()["$defs"].items()
        for each in definition.get("x-kubernetes-group-version-kind", [])
    }


@cache
def _registry() -> Registry:
    resources = {DEFINITIONS: _definitions(), "urn:kuberay": yaml.safe_load(KUBERAY_SCHEMA.read_text())}
    return Registry(retrieve=_named_type).with_resources(
        (name, Resource(contents=contents, specification=DRAFT202012)) for name, contents in resources.items()
    )


def _named_type(reference: str) -> Resource:
    """``kubernetes:PodTemplateSpec`` → that type's definition, of the version v1 that it is in."""
    name = reference.removeprefix("kubernetes:")
    (full,) = [
        each
        for each in _definitions()["$defs"]
        if each.endswith(f".v1.{name}") and each.split(".")[-3] in ("core", "networking", "meta")
    ]
    return Resource(contents={"$ref": f"{DEFINITIONS}#/$defs/{full}"}, specification=DRAFT202012)
