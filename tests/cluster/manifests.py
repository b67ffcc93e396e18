"""What cluster/kuberay holds, as Kubernetes would see it: documents, clusters, pods with KubeRay's labels."""

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import yaml

ROOT = Path(__file__).parents[2]
KUBERAY = ROOT / "cluster" / "kuberay"
NAMESPACE = "ray-ldm"
# Of each kind of KubeRay's, where the cluster is in its spec.
CLUSTER_FIELD = {"RayCluster": None, "RayJob": "rayClusterSpec", "RayService": "rayClusterConfig"}

Object = dict[str, Any]


@dataclass(frozen=True)
class Pod:
    """A pod as it would run: what its template says, and the labels that KubeRay adds."""

    name: str
    labels: Mapping[str, str]
    spec: Object

    @property
    def container(self) -> Object:
        """Ray's: KubeRay takes the first."""
        first: Object = self.spec["containers"][0]
        return first


def documents() -> list[tuple[str, Object]]:
    """(file name, document) of all files, in their order; a test may change them. Aliases are written out."""
    return [(name, json.loads(text)) for name, text in _parsed()]


def of_kind(kind: str) -> list[Object]:
    return [document for _, document in documents() if document["kind"] == kind]


def clusters() -> dict[str, Object]:
    """Name of the object that has the cluster → the RayCluster that there would be."""
    found = {}
    for _, document in documents():
        if document["kind"] in CLUSTER_FIELD:
            field = CLUSTER_FIELD[document["kind"]]
            spec = document["spec"] if field is None else document["spec"][field]
            found[document["metadata"]["name"]] = {"metadata": document["metadata"], "spec": spec}
    return found


def ray_pods() -> list[Pod]:
    """One of every group of every cluster."""
    return [
        _ray_pod(name, group, template)
        for name, cluster in clusters().items()
        for group, template in _templates(cluster["spec"])
    ]


def pods() -> list[Pod]:
    """Those of Ray, and Redis."""
    return [
        *ray_pods(),
        *(
            Pod(document["metadata"]["name"], template["metadata"]["labels"], template["spec"])
            for document in of_kind("StatefulSet")
            for template in [document["spec"]["template"]]
        ),
    ]


def everything(value: object) -> Iterator[Object]:
    """All mappings in a document, at any depth."""
    if isinstance(value, dict):
        yield value
        for part in value.values():
            yield from everything(part)
    elif isinstance(value, list):
        for part in value:
            yield from everything(part)


def selects(selector: Mapping[str, Any], labels: Mapping[str, str]) -> bool:
    """Kubernetes' label selector: all of matchLabels, and all of matchExpressions (In is all we use)."""
    expressions = selector.get("matchExpressions", [])
    assert {each["operator"] for each in expressions} <= {"In"}
    return all(labels.get(key) == value for key, value in selector.get("matchLabels", {}).items()) and all(
        labels.get(each["key"]) in each["values"] for each in expressions
    )


@cache
def _parsed() -> list[tuple[str, str]]:
    return [
        (path.name, json.dumps(document))
        for path in sorted(KUBERAY.glob("*.yaml"))
        for document in yaml.safe_load_all(path.read_text())
    ]


def _templates(spec: Object) -> Iterator[tuple[str, Object]]:
    yield "head", spec["headGroupSpec"]["template"]
    for group in spec["workerGroupSpecs"]:
        yield group["groupName"], group["template"]


def _ray_pod(cluster: str, group: str, template: Object) -> Pod:
    is_head = group == "head"
    added = {
        "ray.io/cluster": cluster,
        "ray.io/group": "headgroup" if is_head else group,
        "ray.io/is-ray-node": "yes",
        "ray.io/node-type": "head" if is_head else "worker",
    }
    return Pod(f"{cluster}/{group}", {**template["metadata"]["labels"], **added}, template["spec"])
